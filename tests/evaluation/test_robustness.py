from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.evaluation.corruptions import CorruptedImages, GaussianBlur, Rotation
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.few_shot import FewShot
from quiltnet.evaluation.knn import KNN
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.outcome import Outcome, percentile_interval
from quiltnet.evaluation.robustness import Robustness
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

NAMES = ["red", "green", "blue"]


@dataclass(frozen=True)
class SwapRedAndGreen:
    """Of every image whose place in the set is a multiple of ``every``."""

    every: int = 1

    def __call__(self, image: Image.Image, index: int) -> Image.Image:
        pixels = np.array(image)
        return Image.fromarray(pixels[..., [1, 0, 2]]) if index % self.every == 0 else image

    def describe(self) -> dict:
        return {"corruption": "swap", "every": self.every}


@dataclass
class Undefined:
    """An evaluator whose metric is undefined under one corruption."""

    dataset: LabelledSet
    split: str = "val"

    def run(self, encoder: SetEncoder) -> Outcome:
        images = self.dataset.images
        if isinstance(images, CorruptedImages) and images.corruption == SwapRedAndGreen(2):
            return Outcome({}, details={"undefined": {"auroc": "one class only"}})
        return Outcome({"auroc": 0.75, "accuracy": 0.5})

    def describe(self) -> dict:
        return {}


def colour_set(count: int, seed: int, **options) -> LabelledSet:
    tiles = [noise_tile(1000 * seed + index, NAMES[index % 3]) for index in range(count)]
    return LabelledSet(tiles, torch.arange(count) % 3, NAMES, **options)


def nearest(**options) -> KNN:
    return KNN(colour_set(30, seed=0), colour_set(30, seed=1), ks=[1], k=1, **options)


def test_a_drop_is_what_the_corruption_costs():
    evaluator = Robustness(nearest(), {"swap": SwapRedAndGreen(), "turn": Rotation(90)})
    outcome = evaluator.run(SetEncoder(ColourModel()))
    assert outcome.scores == pytest.approx(
        {
            "balanced_accuracy": 1,
            "balanced_accuracy@swap": 1 / 3,  # red and green tiles are taken for each other
            "balanced_accuracy@turn": 1,
            "drop@swap": 2 / 3,
            "drop@turn": 0,
            "mean_drop": 1 / 3,
        }
    )
    assert set(outcome.replicates) == set(outcome.scores)


def test_replicates_of_drops_are_paired():
    evaluator = Robustness(nearest(), {"half": SwapRedAndGreen(2), "blur": GaussianBlur(1)})
    encoder = SetEncoder(ToyModel())
    outcome = evaluator.run(encoder)
    clean = nearest().run(encoder)
    assert torch.equal(outcome.replicates["balanced_accuracy"], clean.replicates["balanced_accuracy"])
    assert outcome.items == clean.items
    assert outcome.details == clean.details
    for name in ("half", "blur"):
        paired = clean.replicates["balanced_accuracy"] - outcome.replicates[f"balanced_accuracy@{name}"]
        assert torch.equal(outcome.replicates[f"drop@{name}"], paired)
    mean = (outcome.replicates["drop@half"] + outcome.replicates["drop@blur"]) / 2
    torch.testing.assert_close(outcome.replicates["mean_drop"], mean)
    low, high = percentile_interval(outcome.replicates["drop@half"])
    assert low < outcome.scores["drop@half"] < high


def test_it_is_the_evaluator_on_a_set_of_corrupted_images():
    corruption = SwapRedAndGreen(3)
    encoder = SetEncoder(ToyModel())
    evaluator = nearest()
    swapped = [np.array(corruption(evaluator.test[index][0], index)) for index in range(30)]
    by_hand = replace(evaluator, test=replace(evaluator.test, images=swapped)).run(encoder)
    outcome = Robustness(evaluator, {"third": corruption}).run(encoder)
    assert outcome.scores["balanced_accuracy@third"] == by_hand.scores["balanced_accuracy"]
    assert torch.equal(outcome.replicates["balanced_accuracy@third"], by_hand.replicates["balanced_accuracy"])


def test_only_test_images_are_corrupted_and_no_set_is_encoded_twice():
    model = ColourModel()
    seen = []
    model.encode_image = lambda image, *, projected=True: seen.extend(image) or ColourModel().encode_image(image)
    evaluator = nearest()
    Robustness(evaluator, {"swap": SwapRedAndGreen(), "turn": Rotation(90)}).run(SetEncoder(model))
    assert len(seen) == 30 + 3 * 30
    for dataset in (evaluator.train, evaluator.test):
        expected = torch.stack([model.transform(dataset[index][0]) for index in range(30)])
        assert any(torch.equal(torch.stack(seen[start : start + 30]), expected) for start in range(0, 120, 30))


def test_corrupted_images_keep_the_names_that_results_are_compared_by(tmp_path):
    for index in range(6):
        Image.fromarray(noise_tile(index)).save(tmp_path / f"tile{index}.png")
    dataset = LabelledSet(sorted(tmp_path.iterdir()), torch.arange(6) % 3, NAMES)
    seen = []

    @dataclass
    class Spy(Undefined):
        def run(self, encoder: SetEncoder) -> Outcome:
            seen.append(self.dataset)
            return Outcome({"accuracy": 0.5})

    Robustness(Spy(dataset), {"turn": Rotation(90)}, metric="accuracy").run(SetEncoder(ColourModel()))
    assert [one is dataset for one in seen] == [True, False]
    assert seen[1].sha256() == dataset.sha256()
    assert seen[1].content() != dataset.content()


def test_another_metric():
    evaluator = FewShot(colour_set(30, seed=0), colour_set(30, seed=1), shots=[2], episodes=3)
    outcome = Robustness(evaluator, {"swap": SwapRedAndGreen()}, metric="accuracy@2-shot").run(
        SetEncoder(ColourModel())
    )
    assert set(outcome.scores) == {"accuracy@2-shot", "accuracy@2-shot@swap", "drop@swap", "mean_drop"}
    assert outcome.scores["drop@swap"] == pytest.approx(2 / 3)


def test_what_is_undefined_is_said():
    corruptions = {"half": SwapRedAndGreen(2), "all": SwapRedAndGreen()}
    outcome = Robustness(Undefined(colour_set(6, seed=0)), corruptions, metric="auroc").run(SetEncoder(ColourModel()))
    assert outcome.scores == {"auroc": 0.75, "auroc@all": 0.75, "drop@all": 0}
    assert outcome.details["undefined"] == {"auroc@half": "one class only"}


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    outcome = Robustness(nearest(), {"swap": SwapRedAndGreen()}).run(SetEncoder(BrokenModel(value)))
    assert set(outcome.scores.values()) == {0}


def test_door():
    with pytest.raises(UserError, match="corruptions is empty"):
        Robustness(nearest(), {})
    with pytest.raises(UserError, match="Robustness has no labelled set to corrupt"):
        Robustness(Robustness(nearest(), {"turn": Rotation(90)}), {"turn": Rotation(90)})
    with pytest.raises(UserError, match="choose one of accuracy, accuracy@k=1"):
        Robustness(nearest(), {"turn": Rotation(90)}, metric="acc").run(SetEncoder(ColourModel()))


def test_describe():
    evaluator = Robustness(nearest(), {"turn": Rotation(90), "blur": GaussianBlur(2)})
    described = json.loads(json.dumps(evaluator.describe()))
    assert described["corruptions"]["turn"] == {"corruption": "rotation", "degrees": 90}
    assert described["evaluator"]["test"]["images"] == 30
    assert evaluator.split == "test"
    assert Robustness(Undefined(colour_set(6, seed=0)), {"turn": Rotation(90)}).split == "val"
