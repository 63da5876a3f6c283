from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quiltnet.errors import UserError
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.image_retrieval import ImageRetrieval, Labelled, find_neighbours
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.retrieval_metrics import on_grid
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

KS = (1, 3, 5)


def drawn_set(count: int, classes: int = 3, groups: list[str] | None = None, first: int = 0) -> LabelledSet:
    labels = torch.arange(count) % classes
    images = [noise_tile(first + index, ["red", "green", "blue"][index % classes % 3]) for index in range(count)]
    return LabelledSet(images, labels, [f"class {label}" for label in range(classes)], groups=groups)


def labelled(features: torch.Tensor, labels: list[int], groups: list[int] | None = None) -> Labelled:
    groups = list(range(len(labels))) if groups is None else groups
    return Labelled(features, torch.tensor(labels), torch.tensor(groups))


def worst_order(similarity: np.ndarray, labels: np.ndarray, label: int, k: int) -> tuple[bool, bool]:
    """Of one query: whether one of the first k is right, and whether most are, in the worst order of equals."""
    hit, majority = True, True
    for order in permutations(range(len(labels))):
        if all(similarity[a] >= similarity[b] for a, b in pairwise(order)):
            first = labels[list(order[:k])]
            votes = np.bincount(first, minlength=max(label, labels.max()) + 1)
            own, votes[label] = votes[label], 0
            hit &= own > 0
            majority &= own > votes.max()
    return bool(hit), bool(majority)


@pytest.mark.parametrize("seed", range(6))
def test_neighbours_by_definition(seed):
    # Signs of 0.5 in four dimensions: similarities are -1, -0.5, 0, 0.5 and 1 only, so most of them tie.
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(8, 4, generator=generator).sign() / 2
    labels = torch.randint(0, 3, (8,), generator=generator)
    groups = torch.randint(0, 6, (8,), generator=generator)
    dataset = Labelled(features, labels, groups)
    found = find_neighbours(dataset, dataset, KS)
    similarity = (on_grid(features) @ on_grid(features).T).numpy()
    for query in range(8):
        others = (groups != groups[query]).numpy()
        assert found.candidates[query] == others.sum()
        assert found.right[query] == (others & (labels == labels[query]).numpy()).sum()
        for k in [k for k in KS if k <= others.sum() and found.right[query] > 0]:
            hit, majority = worst_order(similarity[query][others], labels.numpy()[others], int(labels[query]), k)
            assert bool(found.wrong_ahead[query] < k) == hit
            assert bool(found.is_majority[k][query]) == majority


def test_musks_metrics_where_nothing_ties():
    """As in MUSK's image_retrieval_metrics: distances sorted, the diagonal left out."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = F.normalize(torch.randn(60, 8, generator=generator) + 0.8 * F.one_hot(labels, 8), dim=-1)
    nearest = labels[torch.cdist(features, features).fill_diagonal_(torch.inf).argsort(dim=1)]
    dataset = labelled(features, labels.tolist())
    found = find_neighbours(dataset, dataset, KS)
    for k in KS:
        hits = (nearest[:, :k] == labels[:, None]).any(dim=1)
        assert ((found.wrong_ahead < k) == hits).all()
        assert 0 < hits.double().mean() < 1
        votes = F.one_hot(nearest[:, :k], 3).sum(dim=1).sort(dim=1, descending=True)
        is_single = votes.values[:, 0] > votes.values[:, 1]  # MUSK takes the lowest label of equals
        assert torch.equal(found.is_majority[k], is_single & (votes.indices[:, 0] == labels))


def test_tiles_do_not_show(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(23, 5, generator=generator), dim=-1)
    dataset = labelled(features, (torch.arange(23) % 4).tolist())
    whole = find_neighbours(dataset, dataset, KS)
    monkeypatch.setattr("quiltnet.evaluation.image_retrieval.TILE_ELEMENTS", 100)  # four queries at a time
    tiled = find_neighbours(dataset, dataset, KS)
    assert torch.equal(whole.wrong_ahead, tiled.wrong_ahead)
    assert all(torch.equal(whole.is_majority[k], tiled.is_majority[k]) for k in KS)


def test_nan_counts_against():
    good = torch.tensor([[1.0, 0.0]])
    nan = torch.full((1, 2), torch.nan)
    query = labelled(good, [0], [9])
    beside = find_neighbours(query, labelled(torch.cat([good, good, nan]), [0, 0, 1], [0, 1, 2]), [1, 3])
    assert beside.wrong_ahead.tolist() == [1]
    assert not beside.is_majority[1].item()
    assert beside.is_majority[3].item()  # two of three
    right = find_neighbours(query, labelled(torch.cat([nan, -good]), [0, 1], [0, 1]), [1])
    assert right.wrong_ahead.tolist() == [1]
    of_nan = find_neighbours(labelled(nan, [0], [9]), labelled(torch.cat([good, good]), [0, 0], [0, 1]), [1])
    assert of_nan.wrong_ahead.tolist() == [2]
    assert not of_nan.is_majority[1].item()


def test_a_perfect_model():
    outcome = ImageRetrieval(drawn_set(30)).run(SetEncoder(ColourModel()))
    assert set(outcome.scores) == {f"{metric}@{k}" for metric in ("accuracy", "majority_vote_accuracy") for k in KS}
    assert set(outcome.scores.values()) == {1.0}
    assert outcome.details["queries"] == 30
    assert outcome.details["undefined"] == {}


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    outcome = ImageRetrieval(drawn_set(30)).run(SetEncoder(BrokenModel(value)))
    assert set(outcome.scores.values()) == {0.0}


def test_an_image_is_not_found_by_its_own_group():
    # Every image three times, each threesome a group: what is most similar must not count.
    copies = [noise_tile(index // 3) for index in range(24)]
    labels = torch.arange(24) // 3 % 2
    groups = [f"patient {index // 3}" for index in range(24)]
    alone = LabelledSet(copies, labels, ["red", "green"])
    grouped = LabelledSet(copies, labels, ["red", "green"], groups=groups)
    slides = LabelledSet(copies, labels, ["red", "green"], slides=groups)
    everything, without, by_slide = (
        ImageRetrieval(dataset).run(SetEncoder(ToyModel())) for dataset in (alone, grouped, slides)
    )
    assert everything.scores["accuracy@1"] == 1
    assert without.details["gallery"]["fewest_candidates"] == 21
    assert without.scores["majority_vote_accuracy@3"] < everything.scores["majority_vote_accuracy@3"]
    assert by_slide.scores == without.scores


def test_queries_without_a_right_answer_are_left_out():
    groups = ["a", "a", *(f"g{index}" for index in range(2, 9))]
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    dataset = LabelledSet([noise_tile(index) for index in range(9)], labels, ["x", "y", "z"], groups=groups)
    outcome = ImageRetrieval(dataset, ks=[1, 8]).run(SetEncoder(ToyModel()))
    assert (outcome.details["queries"], outcome.details["queries_without_a_right_answer"]) == (7, 2)
    assert set(outcome.scores) == {f"{metric}@{k}" for metric in ("accuracy", "majority_vote_accuracy") for k in (1, 8)}
    assert outcome.scores["accuracy@8"] == 1
    larger = ImageRetrieval(dataset, ks=[1, 9]).run(SetEncoder(ToyModel()))
    assert set(larger.details["undefined"]) == {"accuracy@9", "majority_vote_accuracy@9"}


def test_nothing_to_find():
    dataset = LabelledSet([noise_tile(0), noise_tile(1)], torch.tensor([0, 1]), ["x", "y"])
    outcome = ImageRetrieval(dataset, ks=[1]).run(SetEncoder(ToyModel()))
    assert outcome.scores == {}
    assert outcome.details["undefined"]["accuracy@1"] == "no query has an image of its class to find"


def test_a_gallery_of_its_own():
    queries, gallery = drawn_set(12), drawn_set(30, first=100)
    evaluator = ImageRetrieval(queries, gallery)
    outcome = evaluator.run(SetEncoder(ColourModel()))
    assert set(outcome.scores.values()) == {1.0}
    assert outcome.details["gallery"] == {"images": 30, "fewest_candidates": 30}
    assert outcome.items != ImageRetrieval(queries).run(SetEncoder(ColourModel())).items
    grouped = ImageRetrieval(
        drawn_set(12, groups=["a", "b"] * 6), drawn_set(30, groups=["b", *"cdefghijk" * 3, "l", "m"])
    )
    assert grouped.run(SetEncoder(ColourModel())).details["gallery"]["fewest_candidates"] == 29
    with pytest.raises(UserError, match="same classes"):
        ImageRetrieval(queries, drawn_set(30, classes=2))


def test_intervals_and_describe():
    evaluator = ImageRetrieval(drawn_set(40, classes=4))
    outcome = evaluator.run(SetEncoder(ToyModel()))
    assert outcome.replicates.keys() == outcome.scores.keys()
    low, high = outcome.intervals()["accuracy@1"]
    assert low < outcome.scores["accuracy@1"] < high
    assert evaluator.split == "test"
    found = evaluator.describe()
    assert (found["dataset"]["images"], found["gallery"], found["ks"]) == (40, "all other images", [1, 3, 5])
    with pytest.raises(UserError, match="all 1 or more"):
        ImageRetrieval(drawn_set(9), ks=[0])
