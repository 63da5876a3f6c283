from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation import few_shot
from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.few_shot import FewShot, draw_supports, nearest_prototypes, run_episodes
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import NO_CLASS, balanced_accuracy
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

NAMES = ["red", "green", "blue"]


def tint_set(count: int, seed: int, **options) -> LabelledSet:
    """Noise with a hint of colour, so that few images a class are hardly enough."""
    rng = np.random.default_rng(seed)
    tiles = [noise_tile(1000 * seed + index) for index in range(count)]
    labels = [index % 3 for index in range(count)]
    for tile, label in zip(tiles, labels, strict=True):
        tile[..., label] = np.minimum(tile[..., label] + rng.integers(0, 60), 255)
    return LabelledSet(tiles, torch.tensor(labels), NAMES, **options)


def features(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain_episode(supports: Tensor, queries: Tensor) -> list[int]:
    """The definition, image by image: (C, k, D), (N, D)."""
    mean = supports.double().flatten(0, 1).mean(dim=0)
    prototypes = torch.stack([F.normalize(own.double() - mean, dim=-1).mean(dim=0) for own in supports])
    distances = [(prototypes - F.normalize(query.double() - mean, dim=-1)).norm(dim=-1) for query in queries]
    return [int(distance.argmin()) for distance in distances]


@pytest.mark.parametrize("shots", [1, 3])
def test_products_of_matrices_give_the_plain_episodes(shots):
    supports, queries = features(7, 4, shots, 6, seed=0), features(50, 6, seed=1)
    found = nearest_prototypes(supports, queries)
    assert found.shape == (50, 7)
    for episode in range(7):
        assert found[:, episode].tolist() == plain_episode(supports[episode], queries)


def test_features_far_from_the_origin_lose_no_digits():
    supports, queries = features(3, 4, 2, 6, seed=0), features(50, 6, seed=1)
    far = nearest_prototypes(supports.double() + 100, queries.double() + 100)
    assert far.tolist() == nearest_prototypes(supports, queries).tolist()


def test_agrees_with_scikit_learn():
    from sklearn.neighbors import NearestCentroid

    supports, queries = features(1, 3, 5, 8, seed=0), features(40, 8, seed=1)
    mean = supports[0].flatten(0, 1).mean(dim=0)
    theirs = NearestCentroid().fit(F.normalize(supports[0] - mean, dim=-1).flatten(0, 1), [0] * 5 + [1] * 5 + [2] * 5)
    ours = nearest_prototypes(supports, queries)[:, 0]
    assert ours.tolist() == theirs.predict(F.normalize(queries - mean, dim=-1)).tolist()


@pytest.mark.parametrize("elements", [1, 500, 2**22])
def test_episodes_do_not_depend_on_how_many_run_at_a_time(monkeypatch, elements):
    train, test = tint_set(30, seed=0), tint_set(20, seed=1)
    encoder = SetEncoder(ToyModel())
    expected = FewShot(train, test, shots=[2], episodes=9).run(encoder)
    monkeypatch.setattr(few_shot, "CHUNK_ELEMENTS", elements)
    found = FewShot(train, test, shots=[2], episodes=9).run(encoder)
    assert found.scores == pytest.approx(expected.scores, abs=1e-12)


def test_both_scores_are_those_of_their_definitions():
    train, test = tint_set(30, seed=0), tint_set(21, seed=1)
    encoder = SetEncoder(ToyModel())
    outcome = FewShot(train, test, shots=[1, 4], episodes=25, seed=3).run(encoder)
    support_features, queries = (encoder.images(one, batch_size=8) for one in (train, test))
    for shots in (1, 4):
        supports = draw_supports(train.labels, [0, 1, 2], shots, episodes=25, seed=3)
        predicted = torch.tensor([plain_episode(support_features[rows], queries) for rows in supports])  # (E, N)
        each = [balanced_accuracy(row, test.labels) for row in predicted]
        assert outcome.scores[f"balanced_accuracy@{shots}-shot"] == pytest.approx(np.mean(each))
        spread = outcome.details["balanced_accuracy_over_episodes"][f"{shots}-shot"]
        assert spread["standard_deviation"] == pytest.approx(np.std(each, ddof=1))
        assert spread["interval"] == pytest.approx(np.quantile(each, [0.025, 0.975]))
        votes = torch.stack([torch.bincount(column, minlength=3) for column in predicted.T])  # (N, C)
        is_tied = (votes == votes.amax(dim=1, keepdim=True)).sum(dim=1) > 1
        elected = votes.argmax(dim=1).masked_fill(is_tied, NO_CLASS)
        vote = outcome.scores[f"majority_vote_balanced_accuracy@{shots}-shot"]
        assert vote == pytest.approx(balanced_accuracy(elected, test.labels))
        assert vote != outcome.scores[f"balanced_accuracy@{shots}-shot"]


@pytest.mark.parametrize("groups", [None, [f"case {index % 7}" for index in range(21)]])
def test_replicates_are_means_over_episodes_of_resampled_scores(groups):
    train, test = tint_set(30, seed=0), tint_set(21, seed=1, groups=groups)
    encoder = SetEncoder(ToyModel())
    outcome = FewShot(train, test, shots=[2], episodes=5).run(encoder)
    support_features, queries = (encoder.images(one, batch_size=8) for one in (train, test))
    predicted = nearest_prototypes(
        support_features[draw_supports(train.labels, [0, 1, 2], 2, episodes=5, seed=0)], queries
    )
    counts = torch.cat(list(Resamples.of_set(test).counts())).long()
    for resample in (0, 1, 999):
        rows = torch.arange(21).repeat_interleave(counts[resample])
        each = [balanced_accuracy(column[rows], test.labels[rows]) for column in predicted.T]
        assert outcome.replicates["balanced_accuracy@2-shot"][resample].item() == pytest.approx(np.mean(each))
        right = (predicted[rows] == test.labels[rows, None]).double().mean().item()
        assert outcome.replicates["accuracy@2-shot"][resample].item() == pytest.approx(right)
    assert outcome.replicates["balanced_accuracy@2-shot"].std() > 0


def test_draws_are_of_the_class_and_without_repetition():
    labels = torch.tensor([2, 0, 2, 0, 2, 1, 1, 1, 0])
    drawn = draw_supports(labels, [0, 2], 3, episodes=4, seed=0)
    assert drawn.shape == (4, 2, 3)
    for episode in drawn:
        assert sorted(episode[0].tolist()) == [1, 3, 8]
        assert sorted(episode[1].tolist()) == [0, 2, 4]
    many = draw_supports(labels, [0, 1, 2], 1, episodes=50, seed=0)
    assert many[:8].tolist() == draw_supports(labels, [0, 1, 2], 1, episodes=8, seed=0).tolist()
    assert many.tolist() != draw_supports(labels, [0, 1, 2], 1, episodes=50, seed=1).tolist()
    assert all(len(many[:, place].unique()) == 3 for place in range(3))


def test_reaches_what_can_be_reached():
    train, test = (
        LabelledSet([noise_tile(seed + index, NAMES[index % 3]) for index in range(18)], torch.arange(18) % 3, NAMES)
        for seed in (0, 100)
    )
    outcome = FewShot(train, test, shots=[1, 4], episodes=10).run(SetEncoder(ColourModel()))
    assert len(outcome.scores) == 2 * (2 + 4)
    assert set(outcome.scores.values()) == {1.0}
    assert set(outcome.replicates) == set(outcome.scores)


@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    outcome = FewShot(tint_set(30, seed=0), tint_set(20, seed=1), shots=[1, 3], episodes=5).run(
        SetEncoder(BrokenModel(value))
    )
    assert set(outcome.scores.values()) == {0.0}


def test_rounding_is_no_difference():
    generator = torch.Generator().manual_seed(0)
    almost = F.normalize(torch.ones(61, 16), dim=-1)
    almost = almost * (1 + 1e-7 * torch.randn(almost.shape, generator=generator))  # the last bit of float32
    assert set(nearest_prototypes(almost[:60].view(5, 4, 3, 16), almost).flatten().tolist()) == {NO_CLASS}


def test_a_broken_image_spoils_the_episodes_that_draw_it():
    supports, queries = features(2, 3, 2, 6, seed=0), features(9, 6, seed=1)
    whole = nearest_prototypes(supports, queries)
    supports[1, 2, 0, 4] = torch.nan
    queries[5, 0] = torch.nan
    broken = nearest_prototypes(supports, queries)
    assert set(broken[:, 1].tolist()) == {NO_CLASS}
    whole[5, 0] = NO_CLASS
    assert broken[:, 0].tolist() == whole[:, 0].tolist()


def test_a_class_without_images_is_never_predicted():
    train, test = (one.select(one.labels != 1) for one in (tint_set(30, seed=0), tint_set(30, seed=1)))
    encoder = SetEncoder(ToyModel())
    supports = draw_supports(train.labels, [0, 2], 2, episodes=6, seed=0)
    found = run_episodes(
        encoder.images(train, batch_size=8), encoder.images(test, batch_size=8), test, supports, [0, 2]
    )
    assert found.votes[:, 1].sum() == 0
    assert found.votes.sum() == 6 * len(test)
    outcome = FewShot(train, test, shots=[2], episodes=6).run(encoder)
    assert outcome.scores["balanced_accuracy@2-shot"] == pytest.approx(found.balanced_accuracy.mean().item())


def test_one_episode_of_two_images():
    two = LabelledSet([noise_tile(0, "red"), noise_tile(1, "green")], torch.tensor([0, 1]), NAMES)
    outcome = FewShot(two, two, shots=[1], episodes=1).run(SetEncoder(ColourModel()))
    assert outcome.scores["balanced_accuracy@1-shot"] == 1
    assert "standard_deviation" not in outcome.details["balanced_accuracy_over_episodes"]["1-shot"]
    json.dumps(outcome.as_json(), allow_nan=False)


def test_door():
    train, test = tint_set(30, seed=0), tint_set(9, seed=1)
    with pytest.raises(UserError, match="same classes"):
        FewShot(train, replace(test, class_names=NAMES[::-1]))
    with pytest.raises(UserError, match="has 10 images of 'red'"):
        FewShot(train, test, shots=[1, 16])
    with pytest.raises(UserError, match="has 0 images of 'blue'"):
        FewShot(train.select(train.labels != 2), test, shots=[1])
    with pytest.raises(UserError, match="each 1 or more"):
        FewShot(train, test, shots=[0, 1])
    with pytest.raises(UserError, match="episodes=0"):
        FewShot(train, test, shots=[1], episodes=0)
    with pytest.raises(UserError, match="in both train and test"):
        FewShot(replace(train, groups=["case"] * 30), replace(test, groups=["case"] * 9), shots=[1])


def test_describe():
    evaluator = FewShot(tint_set(30, seed=0), tint_set(9, seed=1), shots=[4, 1])
    described = json.loads(json.dumps(evaluator.describe()))
    assert described["shots"] == [1, 4]
    assert (described["episodes"], described["seed"]) == (1000, 0)
    assert evaluator.split == "test"
