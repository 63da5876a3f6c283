from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quiltnet.evaluation.datasets import LabelledSet, csv_labels, in_memory
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

PROMPTS = PromptSet(["a {} tile", "stained {}"])


def colour_set(colours: list[str], class_names: list[str]) -> LabelledSet:
    tiles = [noise_tile(seed, colour) for seed, colour in enumerate(colours)]
    return in_memory((tiles, [class_names.index(colour) for colour in colours], class_names))


@pytest.mark.parametrize("class_names", [["red", "green", "blue"], ["blue", "red", "green"]])
def test_a_model_that_knows_the_classes_is_right(class_names):
    dataset = colour_set(["red", "blue", "blue", "green", "red"], class_names)
    scores = dict(ZeroShotClassification(dataset, PROMPTS, batch_size=2).run(ColourModel()))
    assert scores == {"accuracy": 1.0, "balanced_accuracy": 1.0, "weighted_f1": pytest.approx(1.0)}


def test_known_mistakes():
    tiles = [noise_tile(seed, colour) for seed, colour in enumerate(["red", "red", "red", "blue"])]
    dataset = in_memory((tiles, [0, 0, 1, 1], ["red", "blue"]))  # the third tile's label is wrong
    scores = dict(ZeroShotClassification(dataset, PROMPTS).run(ColourModel()))
    assert scores["accuracy"] == 0.75
    assert scores["balanced_accuracy"] == 0.75
    assert scores["weighted_f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_scores_are_those_of_the_definition():
    class_names = ["ape", "cat", "dog"]
    dataset = in_memory(([noise_tile(seed) for seed in range(40)], [s % 3 for s in range(40)], class_names))
    model = ToyModel()
    classifier = []
    for name in class_names:
        prompt_features = model.encode_text(model.tokenize([f"a {name} tile", f"stained {name}"])).numpy()
        mean = prompt_features.mean(axis=0)
        classifier.append(mean / np.linalg.norm(mean))
    images = torch.stack([model.transform(dataset[index][0]) for index in range(len(dataset))])
    predicted = (model.encode_image(images).numpy() @ np.stack(classifier).T).argmax(axis=1)
    scores = dict(ZeroShotClassification(dataset, PROMPTS, batch_size=7).run(model))
    assert 0 < scores["accuracy"] < 1
    assert scores["accuracy"] == pytest.approx((predicted == dataset.labels.numpy()).mean())


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    dataset = colour_set(["red", "green", "blue"], ["red", "green", "blue"])
    scores = dict(ZeroShotClassification(dataset, PROMPTS).run(BrokenModel(value)))
    assert set(scores.values()) == {0.0}


def test_describe_records_what_moves_the_result():
    evaluator = ZeroShotClassification(colour_set(["red", "blue", "blue"], ["red", "blue"]), PROMPTS)
    described = json.loads(json.dumps(evaluator.describe()))
    assert described["class_names"] == ["red", "blue"]
    assert described["templates"] == ["a {} tile", "stained {}"]
    assert described["dataset"]["images_per_class"] == {"red": 1, "blue": 2}


def test_real_tiles(shared_data):
    root = shared_data / "quilt_like"
    dataset = csv_labels(
        root / "lc25000_labels.csv",
        root / "images",
        name_column="class_name",
        split_column="split",
        split="val",
    )
    scores = dict(ZeroShotClassification(dataset, PROMPTS).run(ToyModel()))
    assert 0 < scores["balanced_accuracy"] < 0.6  # random weights
