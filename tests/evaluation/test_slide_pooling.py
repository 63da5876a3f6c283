from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.datasets import csv_labels, in_memory
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import predict
from quiltnet.evaluation.outcome import paired_difference
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.slide_pooling import SlidePooling, pool_slides, slide_set
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

PROMPTS = PromptSet(["a {} tile", "stained {}"])
COLOURS = ["red", "green", "blue"]


def tiles_of(slides: dict[str, tuple[str, list[str]]], split: str = "test") -> LabelledSet:
    """slide -> its class and the colours of its tiles."""
    colours = [colour for _, tiles in slides.values() for colour in tiles]
    labels = [COLOURS.index(label) for label, tiles in slides.values() for _ in tiles]
    names = [slide for slide, (_, tiles) in slides.items() for _ in tiles]
    dataset = in_memory(([noise_tile(seed, colour) for seed, colour in enumerate(colours)], labels, COLOURS))
    return replace(dataset, slides=names, split=split)


def noise_slides(count: int, prefix: str = "slide", split: str = "test", seed: int = 0) -> LabelledSet:
    """Slides of one to six tiles, in no order."""
    rng = np.random.default_rng(seed)
    slides = np.repeat(np.arange(count), rng.integers(1, 7, count))
    rng.shuffle(slides)
    tiles = [noise_tile(seed * 1000 + number) for number in range(len(slides))]
    dataset = in_memory((tiles, (slides % 3).tolist(), COLOURS))
    return replace(dataset, slides=[f"{prefix}-{slide}" for slide in slides], split=split)


def brute_force(similarity: np.ndarray, slides: list[str], j: int) -> dict[str, list[float]]:
    pooled = {}
    for slide in sorted(set(slides)):
        of_slide = [row for row, name in zip(similarity, slides, strict=True) if name == slide]
        pooled[slide] = [
            float(np.mean(sorted((float(row[label]) for row in of_slide), reverse=True)[:j]))
            for label in range(similarity.shape[1])
        ]
    return pooled


@pytest.mark.parametrize("j", [1, 2, 3, 5, 100])
def test_pooling_is_the_mean_of_the_best_tiles(j):
    slides = noise_slides(20).slides
    similarity = torch.randn(len(slides), 4, generator=torch.Generator().manual_seed(0))
    expected = brute_force(similarity.numpy(), slides, j)
    pooled = pool_slides(similarity, slides, j)
    order = list(dict.fromkeys(slides))
    assert pooled.dtype == torch.float64
    torch.testing.assert_close(pooled, torch.tensor([expected[slide] for slide in order], dtype=torch.float64))


def test_classes_with_equal_tiles_tie():
    column = torch.randn(1001, 1, generator=torch.Generator().manual_seed(0))
    pooled = pool_slides(column.expand(-1, 13).contiguous(), ["a"] * 1001, 777)
    assert (pooled == pooled[:, :1]).all()
    assert predict(pooled).tolist() == [-1]


def test_a_nan_tile_is_not_pooled_away():
    similarity = torch.tensor([[0.9, 0.1], [torch.nan, 0.2], [0.8, 0.3]])
    assert predict(pool_slides(similarity, ["a", "a", "b"], 1)).tolist() == [-1, 0]


def test_slides_are_right_where_most_tiles_are_wrong():
    dataset = tiles_of({"s1": ("red", ["blue", "red", "blue"]), "s2": ("blue", ["blue", "blue"])})
    # One tile a class: a red and a blue tile are both as good as can be; three: two of s1 are blue.
    mild = {"s1": ("red", ["red", "red", "blue"]), "s2": ("blue", ["blue", "red", "blue"])}
    evaluator = ZeroShotClassification(tiles_of(mild), PROMPTS, SlidePooling(j=2))
    scores = evaluator.run(SetEncoder(ColourModel())).scores
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["slide_accuracy"] == scores["slide_balanced_accuracy"] == 1
    scores = ZeroShotClassification(dataset, PROMPTS, SlidePooling(j=3)).run(SetEncoder(ColourModel())).scores
    assert scores["slide_accuracy"] == 0.5


@pytest.mark.parametrize("j", [1, 3])
def test_slide_scores_are_those_of_brute_force(j):
    dataset, model = noise_slides(30), ToyModel()
    prompts = PROMPTS.fill(COLOURS)
    of_classes = [model.encode_text(model.tokenize(texts)).numpy().mean(axis=0) for texts in prompts.values()]
    of_classes = np.stack([mean / np.linalg.norm(mean) for mean in of_classes])
    images = model.encode_image(torch.stack([model.transform(dataset[row][0]) for row in range(len(dataset))]))
    pooled = brute_force(images.numpy() @ of_classes.T, dataset.slides, j)
    right = [int(np.argmax(scores)) == int(slide.split("-")[1]) % 3 for slide, scores in pooled.items()]
    outcome = ZeroShotClassification(dataset, PROMPTS, SlidePooling(j=j)).run(SetEncoder(model))
    assert 0 < np.mean(right) < 1
    assert outcome.scores["slide_accuracy"] == pytest.approx(np.mean(right))
    assert outcome.details["slides"]["j"] == j
    assert sum(map(sum, outcome.details["slides"]["confusion_matrix"])) == 30
    assert sum(map(sum, outcome.details["confusion_matrix"])) == len(dataset)


def test_tile_scores_stay_what_they_were():
    dataset, encoder = noise_slides(30), SetEncoder(ToyModel())
    without = ZeroShotClassification(dataset, PROMPTS).run(encoder)
    pooled = ZeroShotClassification(dataset, PROMPTS, SlidePooling(j=2)).run(encoder)
    assert {metric: pooled.scores[metric] for metric in without.scores} == without.scores
    assert set(pooled.scores) == {*without.scores, *(f"slide_{metric}" for metric in without.scores)}
    assert set(pooled.replicates) == set(pooled.scores)
    json.dumps(pooled.as_json())


def test_two_models_are_compared_on_slides():
    dataset = noise_slides(30)
    dataset = replace(dataset, groups=dataset.slides)  # patients of one slide, and of two below
    evaluator = ZeroShotClassification(dataset, PROMPTS, SlidePooling(j=2))
    one, other = (evaluator.run(SetEncoder(ToyModel(width))) for width in (16, 8))
    assert paired_difference(one, other, "slide_accuracy") is not None
    cut = replace(dataset, slides=[f"{slide} {row % 2}" for row, slide in enumerate(dataset.slides)])
    of_other_slides = ZeroShotClassification(cut, PROMPTS, SlidePooling(j=2)).run(SetEncoder(ToyModel()))
    assert paired_difference(one, of_other_slides, "slide_accuracy") is None


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    validation = noise_slides(9, "validation", "val", seed=1)
    for pooling in (SlidePooling(j=2), SlidePooling(validation=validation)):
        outcome = ZeroShotClassification(noise_slides(9), PROMPTS, pooling).run(SetEncoder(BrokenModel(value)))
        assert outcome.scores["slide_accuracy"] == outcome.scores["slide_balanced_accuracy"] == 0
    assert outcome.details["slides"]["j"] == 1


def test_j_is_the_best_on_validation_and_the_test_set_has_no_say():
    # On validation only the means of two or more tiles are right; on the test set only the single best tile is.
    validation = tiles_of({"v1": ("red", ["red", "red", "blue"]), "v2": ("blue", ["blue", "blue", "red"])}, split="val")
    tiles = {"t1": ("red", ["red", "blue", "blue"]), "t2": ("blue", ["blue", "red", "red"])}
    pooling = SlidePooling(validation=validation, candidates=[100, 2, 1])
    outcome = ZeroShotClassification(tiles_of(tiles), PROMPTS, pooling).run(SetEncoder(ColourModel()))
    assert outcome.details["slides"]["j"] == 2
    scores = outcome.details["slides"]["validation_balanced_accuracy"]
    assert scores["2"] == scores["100"] == 1 > scores["1"]
    assert outcome.scores["slide_accuracy"] == 0


def test_slides_of_one_patient_stay_together():
    dataset = tiles_of({name: ("red" if name < "c" else "blue", ["red"] * 2) for name in "abcd"})
    patients = replace(dataset, groups=["p1"] * 4 + ["p2"] * 4)
    assert slide_set(patients).groups == ["p1", "p1", "p2", "p2"]
    regions = replace(dataset, groups=[str(row) for row in range(8)])
    assert slide_set(regions).groups is None
    assert slide_set(regions).names == ["a", "b", "c", "d"]


def test_settings_are_checked_at_the_door():
    dataset = noise_slides(9)
    validation = noise_slides(9, "validation", "val", seed=1)
    for options, message in [
        ({}, "give either j"),
        ({"j": 2, "validation": validation}, "give either j"),
        ({"j": 0}, "j=0 must be a whole number"),
        ({"j": 1.5}, "j=1.5 must be"),
        ({"validation": validation, "candidates": [0, 1]}, "j=0 must be"),
        ({"validation": validation, "candidates": []}, "candidates is empty"),
        ({"validation": dataset}, "chosen on a test split"),
        ({"validation": replace(validation, slides=None)}, "give a set with slides"),
    ]:
        with pytest.raises(UserError, match=message):
            SlidePooling(**options)


def test_sets_that_do_not_fit_are_refused():
    dataset = noise_slides(9)
    validation = noise_slides(9, "validation", "val", seed=1)

    def refused(message: str, scored: LabelledSet = dataset, chosen_on: LabelledSet = validation) -> None:
        with pytest.raises(UserError, match=message):
            ZeroShotClassification(scored, PROMPTS, SlidePooling(validation=chosen_on))

    refused("give a set with slides", scored=replace(dataset, slides=None))
    refused(
        "slide 'all' has tiles of 'red' and 'green' and 'blue'", scored=replace(dataset, slides=["all"] * len(dataset))
    )
    refused("same classes in the same order", chosen_on=replace(validation, class_names=["red", "blue", "green"]))
    refused("9 slides of the scored set are also", chosen_on=replace(dataset, split="val"))
    refused(
        "1 groups of the scored set are also",
        scored=replace(dataset, groups=["patient"] * len(dataset)),
        chosen_on=replace(validation, groups=["patient"] * len(validation)),
    )


def test_describe_says_how_slides_are_pooled():
    validation = noise_slides(9, "validation", "val", seed=1)
    for pooling in (SlidePooling(j=5), SlidePooling(validation=validation, candidates=[5, 1])):
        described = json.loads(json.dumps(ZeroShotClassification(noise_slides(9), PROMPTS, pooling).describe()))
        if pooling.validation is None:
            assert described["slide_pooling"] == {"j": 5}
        else:
            assert described["slide_pooling"]["candidates"] == [1, 5]
            assert described["slide_pooling"]["chosen_on"]["split"] == "val"


def test_real_tiles(shared_data):
    root = shared_data / "quilt_like"
    table = (root / "lc25000_labels.csv", root / "images")
    options = {"name_column": "class_name", "split_column": "split"}
    scored, validation = (csv_labels(*table, **options, split=split) for split in ("val", "train"))
    # The tiles do not say their slides: four of a class stand for one.
    scored, validation = (
        replace(dataset, slides=[f"{name} {label} {row // 4}" for row, label in _numbered(dataset)], split=split)
        for dataset, name, split in ((scored, "scored", "test"), (validation, "validation", "val"))
    )
    pooling = SlidePooling(validation=validation, candidates=(1, 2, 3))
    outcome = ZeroShotClassification(scored, PROMPTS, pooling).run(SetEncoder(ToyModel()))
    assert 0 < outcome.scores["slide_balanced_accuracy"] < 0.6  # random weights
    assert outcome.details["slides"]["per_class"].keys() == outcome.details["per_class"].keys()
    assert sum(map(sum, outcome.details["slides"]["confusion_matrix"])) == len(set(scored.slides)) < len(scored) / 3


def _numbered(dataset: LabelledSet) -> list[tuple[int, int]]:
    """Each image's number within its class, and its label."""
    labels = dataset.labels.tolist()
    return [(labels[:row].count(label), label) for row, label in enumerate(labels)]
