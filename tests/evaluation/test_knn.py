from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation import knn
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.knn import KNN, knn_logits, vote_shares
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import NO_CLASS, balanced_accuracy, cosine_similarity, predict
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

NAMES = ["red", "green", "blue"]


def colour_set(count: int, seed: int, wrong: float = 0.0, **options) -> LabelledSet:
    """Plain tiles, a share of whose labels is wrong."""
    rng = np.random.default_rng(seed)
    shown = [index % 3 for index in range(count)]
    tiles = [noise_tile(1000 * seed + index, NAMES[label]) for index, label in enumerate(shown)]
    labels = [(label + 1) % 3 if rng.random() < wrong else label for label in shown]
    return LabelledSet(tiles, torch.tensor(labels), NAMES, **options)


def unit_features(count: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain_vote(similarity: list[float], labels: list[int], k: int) -> int:
    """The definition, for one query."""
    ranked = sorted(zip(similarity, labels, strict=True), reverse=True)
    kth = ranked[k - 1][0]
    rivals = [label for value, label in ranked if value == kth]
    if ranked[k:] and ranked[k][0] == kth and len(set(rivals)) > 1:
        return NO_CLASS
    votes = Counter(label for _, label in ranked[:k])
    sums = {label: sum(value for value, other in ranked[:k] if other == label) for label in votes}
    best = max((votes[label], sums[label]) for label in votes)
    winners = [label for label in votes if (votes[label], sums[label]) == best]
    return winners[0] if len(winners) == 1 else NO_CLASS


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_tiles_give_the_plain_vote(monkeypatch, chunk):
    monkeypatch.setattr(knn, "QUERIES", chunk)
    monkeypatch.setattr(knn, "CANDIDATES", chunk + 2)
    queries, train = unit_features(60, 3, seed=0), unit_features(40, 3, seed=1)
    train[20:30] = train[:10]  # twins, some of them of another class
    labels = torch.arange(40) % 3
    similarity = cosine_similarity(queries, train).tolist()
    logits = knn_logits(queries, train, labels, num_classes=4, ks=[1, 2, 4, 40])
    for k, found in logits.items():
        plain = [plain_vote(row, labels.tolist(), k) for row in similarity]
        assert predict(found).tolist() == plain
    assert NO_CLASS in predict(logits[1]).tolist()
    assert len(set(predict(logits[4]).tolist())) > 2


def test_equal_votes_go_to_the_more_similar():
    train = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.3], [1.0, 0.2], [1.0, 0.4], [0.0, 1.0]]), dim=-1)
    query = torch.tensor([[1.0, 0.0]])
    logits = knn_logits(query, train, torch.tensor([1, 1, 0, 0, 0]), num_classes=2, ks=[4, 5])
    assert predict(logits[4]).tolist() == [1]
    assert predict(logits[5]).tolist() == [0]  # more votes beat more similarity
    assert vote_shares(logits[4], 4).tolist() == [[0.5, 0.5]]
    assert vote_shares(logits[5], 5).tolist() == [[0.6, 0.4]]


def test_the_last_neighbour_counts_in_the_sum():
    similarity = torch.tensor([0.9, 0.7, 0.8, 0.75, 0.1])
    train = torch.stack([similarity, (1 - similarity**2).sqrt()], dim=1)
    logits = knn_logits(torch.tensor([[1.0, 0.0]]), train, torch.tensor([0, 0, 1, 1, 1]), num_classes=2, ks=[4])
    assert predict(logits[4]).tolist() == [0]  # 1.6 against 1.55


def test_twins_of_one_class_are_no_tie():
    train = torch.eye(3)[[0, 0, 1, 2]]
    query = F.normalize(torch.tensor([[3.0, 2.0, 1.0]]), dim=-1)
    of_one = knn_logits(query, train, torch.tensor([0, 0, 1, 1]), num_classes=2, ks=[1])
    of_two = knn_logits(query, train, torch.tensor([0, 1, 1, 1]), num_classes=2, ks=[1, 2, 3])
    assert predict(of_one[1]).tolist() == [0]
    assert predict(of_two[1]).tolist() == [NO_CLASS]  # which of the twins is the nearest?
    assert predict(of_two[2]).tolist() == [NO_CLASS]  # a vote each, and as similar
    assert predict(of_two[3]).tolist() == [1]


def test_agrees_with_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    queries, train = unit_features(50, 8, seed=2), unit_features(200, 8, seed=3)
    labels = torch.arange(200) % 2
    for k, logits in knn_logits(queries, train, labels, num_classes=2, ks=[1, 5, 21]).items():
        theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
        assert predict(logits).tolist() == theirs.predict(queries).tolist()
        np.testing.assert_allclose(vote_shares(logits, k), theirs.predict_proba(queries))


def test_reaches_what_can_be_reached():
    outcome = KNN(colour_set(60, seed=0), colour_set(30, seed=1), ks=[1, 5], k=3).run(SetEncoder(ColourModel()))
    for metric in ("accuracy", "balanced_accuracy@k=1", "macro_f1@k=3", "weighted_f1@k=5", "auroc"):
        assert outcome.scores[metric] == 1.0
        assert outcome.replicates[metric].shape == (1000,)
    assert outcome.details["k"] == 3


def test_k_is_the_best_on_validation_whatever_the_test_labels_are():
    train, validation, test = (
        colour_set(90, seed=seed, wrong=0.5, split=split) for seed, split in enumerate(("train", "val", "test"))
    )
    turned = replace(test, labels=(test.labels + 1) % 3)
    encoder = SetEncoder(ToyModel())
    found, found_turned = (KNN(train, one, validation, ks=[20, 1, 3]).run(encoder) for one in (test, turned))
    on_validation = KNN(train, validation, ks=[1, 3, 20]).run(encoder).scores
    best = max(on_validation[f"balanced_accuracy@k={k}"] for k in (1, 3, 20))
    k = found.details["k"]
    assert k == min(k for k in (1, 3, 20) if on_validation[f"balanced_accuracy@k={k}"] == best)
    assert found_turned.details["k"] == k
    assert found.scores["balanced_accuracy"] == found.scores[f"balanced_accuracy@k={k}"]
    assert found_turned.scores["balanced_accuracy"] != found.scores["balanced_accuracy"]


def test_of_equally_good_k_the_smallest_is_taken():
    validation = colour_set(9, seed=2, split="val")
    outcome = KNN(colour_set(60, seed=0), colour_set(30, seed=1), validation, ks=[5, 3]).run(SetEncoder(ColourModel()))
    assert outcome.details["k"] == 3


def test_nothing_is_chosen_where_nothing_can_be_chosen_on():
    outcome = KNN(colour_set(60, seed=0), colour_set(30, seed=1)).run(SetEncoder(ColourModel()))
    assert "balanced_accuracy@k=20" in outcome.scores
    assert "balanced_accuracy" not in outcome.scores
    assert outcome.details["k"] is None


@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    outcome = KNN(colour_set(60, seed=0), colour_set(31, seed=1), k=1).run(SetEncoder(BrokenModel(value)))
    assert {metric for metric in outcome.scores if outcome.scores[metric] > 0} <= {
        "auroc",
        "expected_calibration_error",
    }
    assert outcome.scores["auroc"] <= 0.5
    assert all(np.isfinite(score) for score in outcome.scores.values())


def test_a_broken_image_costs_itself_and_among_the_labelled_everything():
    queries, train = unit_features(4, 8, seed=0), unit_features(9, 8, seed=1)
    labels = torch.arange(9) % 3
    whole = predict(knn_logits(queries, train, labels, num_classes=3, ks=[1])[1])
    queries[2, 3] = torch.nan
    broken = predict(knn_logits(queries, train, labels, num_classes=3, ks=[1])[1])
    assert broken.tolist() == [*whole[:2].tolist(), NO_CLASS, *whole[3:].tolist()]
    train[4, 0] = torch.nan
    assert set(predict(knn_logits(queries, train, labels, num_classes=3, ks=[3])[3]).tolist()) == {NO_CLASS}


def test_a_class_that_train_lacks_is_never_right():
    train = colour_set(60, seed=0)
    train = train.select(train.labels != 2)
    outcome = KNN(train, colour_set(30, seed=1), k=1).run(SetEncoder(ColourModel()))
    assert outcome.scores["balanced_accuracy"] == pytest.approx(2 / 3)


def test_two_images_are_enough():
    two = LabelledSet([noise_tile(0, "red"), noise_tile(1, "green")], torch.tensor([0, 1]), NAMES)
    assert KNN(two, two, ks=[1], k=1).run(SetEncoder(ColourModel())).scores["balanced_accuracy"] == 1


def test_features_before_the_projection_count_by_their_direction():
    model, train, test = ToyModel(), colour_set(60, seed=0, wrong=0.3), colour_set(30, seed=1)
    outcome = KNN(train, test, k=5, projected=False).run(SetEncoder(model))
    raw, queries = (
        F.normalize(SetEncoder(model).images(one, batch_size=8, projected=False), dim=-1) for one in (train, test)
    )
    plain = [plain_vote(row, train.labels.tolist(), 5) for row in cosine_similarity(queries, raw).tolist()]
    assert outcome.scores["balanced_accuracy"] == balanced_accuracy(torch.tensor(plain), test.labels)


def test_door():
    train, test = colour_set(30, seed=0), colour_set(9, seed=1)
    other = LabelledSet([noise_tile(0), noise_tile(1)], torch.tensor([0, 1]), ["red", "blue"])
    with pytest.raises(UserError, match="same classes"):
        KNN(train, other)
    with pytest.raises(UserError, match="validation"):
        KNN(train, test, replace(other, split="val"))
    with pytest.raises(UserError, match="from 1 to the 30 images"):
        KNN(train, test, ks=[1, 31])
    with pytest.raises(UserError, match="from 1"):
        KNN(train, test, ks=[0])
    with pytest.raises(UserError, match="give one of them"):
        KNN(train, test, colour_set(9, seed=2, split="val"), k=5)
    with pytest.raises(UserError, match="test set, on which nothing is chosen"):
        KNN(train, test, colour_set(9, seed=2))


def test_a_group_on_both_sides_is_refused():
    train = colour_set(30, seed=0, groups=[f"case {index % 10}" for index in range(30)])
    test = colour_set(9, seed=1, groups=[f"case {index % 3 + 9}" for index in range(9)])
    with pytest.raises(UserError, match=r"1 groups are in both train and test \(first: case 9\)"):
        KNN(train, test)


def test_describe():
    validation = colour_set(9, seed=2, split="val")
    described = json.loads(json.dumps(KNN(colour_set(30, seed=0), colour_set(9, seed=1), validation).describe()))
    assert described["ks"] == [1, 3, 5, 10, 20]
    assert described["k_chosen_on"]["split"] == "val"
    assert KNN(colour_set(30, seed=0), colour_set(9, seed=1)).split == "test"
