from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation import linear_probe
from quiltnet.evaluation.datasets import csv_labels, in_memory
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.linear_probe import LinearProbe
from quiltnet.evaluation.metrics import balanced_accuracy
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.probe import fit_probes, fit_probes_on_subsets
from quiltnet.evaluation.probe_splits import hold_out, hold_out_folds
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

NAMES = ["red", "green", "blue"]


def colour_set(
    count: int, seed: int, wrong: float = 0.0, groups: list[str] | None = None, split: str = "test"
) -> LabelledSet:
    """Plain tiles, a share of whose labels is wrong."""
    rng = np.random.default_rng(seed)
    shown = [index % 3 for index in range(count)]
    tiles = [noise_tile(1000 * seed + index, NAMES[label]) for index, label in enumerate(shown)]
    labels = [(label + 1) % 3 if rng.random() < wrong else label for label in shown]
    return LabelledSet(tiles, torch.tensor(labels), NAMES, groups, split=split)


def noise_sets() -> tuple[LabelledSet, LabelledSet, LabelledSet]:
    """train, test, validation."""
    return tuple(
        colour_set(count, seed, wrong=0.4, split=split)
        for count, seed, split in ((90, 0, "train"), (60, 1, "test"), (60, 2, "val"))
    )


def encode(dataset: LabelledSet) -> Tensor:
    return SetEncoder(ToyModel()).images(dataset, batch_size=64)


def run(evaluator: LinearProbe, model: ToyModel | None = None) -> Outcome:
    return evaluator.run(SetEncoder(model or ToyModel()))


def best_c(probes_of_parts: list, parts: list[tuple[Tensor, Tensor]]) -> float:
    """The C with the best balanced accuracy, then the least cross-entropy, on all parts, each by its own probe."""
    labels = torch.cat([labels for _, labels in parts])
    scored = {}
    for probes in zip(*probes_of_parts, strict=True):
        logits = torch.cat([probe.logits(part) for probe, (part, _) in zip(probes, parts, strict=True)])
        of_labels = logits.log_softmax(-1)[torch.arange(len(labels)), labels]
        scored[probes[0].c] = balanced_accuracy(logits.argmax(-1), labels), of_labels.mean().item()
    assert max(scored.values())[0] > min(scored.values())[0]
    return max(scored, key=scored.get)


def test_reaches_what_can_be_reached():
    outcome = run(LinearProbe(colour_set(60, seed=0), colour_set(30, seed=1)), ColourModel())
    assert outcome.scores["accuracy"] == outcome.scores["balanced_accuracy"] == outcome.scores["auroc"] == 1.0
    assert outcome.details["c"][0] in linear_probe.C_VALUES
    assert outcome.replicates["balanced_accuracy"].shape == (1000,)
    assert "c" not in outcome.replicates


def test_wrong_labels_cost_what_they_must():
    test = colour_set(90, seed=1, wrong=0.3)
    shown = torch.arange(90) % 3
    outcome = run(LinearProbe(colour_set(300, seed=0, wrong=0.1), test), ColourModel())
    assert outcome.scores["accuracy"] == pytest.approx((test.labels == shown).double().mean().item())


def test_test_labels_choose_nothing():
    train, test, _ = noise_sets()
    turned = LabelledSet(test.images, (test.labels + 1) % 3, NAMES)
    found, found_turned = (run(LinearProbe(train, labelled)) for labelled in (test, turned))
    assert found.details["c"] == found_turned.details["c"]
    assert found.scores["accuracy"] != found_turned.scores["accuracy"]


def test_c_is_the_best_on_validation():
    train, test, validation = noise_sets()
    c_values = [1000.0, 0.01, 1.0]
    probes = fit_probes(encode(train), train.labels, num_classes=3, c_values=c_values)
    expected = best_c([probes], [(encode(validation), validation.labels)])
    assert run(LinearProbe(train, test, validation, c_values=c_values)).details["c"][0] == expected


@pytest.mark.parametrize("folds", [None, 3])
def test_c_is_the_best_on_what_was_held_out(folds):
    train, test = colour_set(180, seed=0, wrong=0.4), colour_set(30, seed=1)
    features, labels = encode(train), train.labels
    if folds is None:
        masks = hold_out(labels, None, fraction=0.25, seed=3)[None]
    else:
        masks = hold_out_folds(labels, None, folds=folds, seed=3)
    c_values = [1e-3, 1.0, 1e2, 1e4]
    probes = [fit_probes(features[~mask], labels[~mask], num_classes=3, c_values=c_values) for mask in masks]
    expected = best_c(probes, [(features[mask], labels[mask]) for mask in masks])
    outcome = run(LinearProbe(train, test, c_values=c_values, seeds=[3], validation_fraction=0.25, folds=folds))
    assert outcome.details["c"][0] == expected
    assert outcome.details["held_out_in_turn"] == (folds or 1)


def test_the_last_fit_sees_all_of_train_and_nothing_else(monkeypatch):
    train, test, validation = noise_sets()
    fits = []

    def spy(features, labels, row_weights, **options):
        fits.append((row_weights > 0).sum(dim=1).tolist())
        return fit_probes_on_subsets(features, labels, row_weights, **options)

    monkeypatch.setattr(linear_probe, "fit_probes_on_subsets", spy)
    outcome = run(LinearProbe(train, test, c_values=[1, 10], validation_fraction=0.4))
    ((rows, all_rows),) = fits
    assert all_rows == 90 and 48 <= rows <= 54
    (probe,) = fit_probes(encode(train), train.labels, num_classes=3, c_values=[outcome.details["c"][0]])
    predicted = probe.logits(encode(test)).argmax(-1)
    assert outcome.scores["accuracy"] == (predicted == test.labels).double().mean()
    fits.clear()
    run(LinearProbe(train, test, validation, c_values=[1, 10]))
    run(LinearProbe(train, test, c_values=[10]))
    assert fits == [[90], [90]]


def test_few_rows_are_all_held_out_in_turn():
    outcome = run(LinearProbe(colour_set(60, seed=0), colour_set(9, seed=1), c_values=[1, 10]))
    assert outcome.details["held_out_in_turn"] == 5
    outcome = run(LinearProbe(colour_set(150, seed=0), colour_set(9, seed=1), c_values=[1, 10]))
    assert outcome.details["held_out_in_turn"] == 1


def test_of_equally_good_c_the_one_with_the_least_cross_entropy_is_taken():
    train, test = colour_set(60, seed=0), colour_set(30, seed=1)  # plain tiles: any of these C is never wrong
    outcome = run(LinearProbe(train, test, c_values=[1e4, 1e2, 1e3]), ColourModel())
    assert outcome.details["c"][0] == 1e4
    assert outcome.scores["expected_calibration_error"] < 0.01


def test_parts_of_train():
    train, test = colour_set(120, seed=0, wrong=0.3), colour_set(60, seed=1, wrong=0.2)
    evaluator = LinearProbe(train, test, fractions=[0.1, 1], shots=[8], seeds=[0, 1, 2], c_values=[0.1, 1, 10, 100])
    outcome = run(evaluator)
    assert {"balanced_accuracy", "balanced_accuracy@10%", "balanced_accuracy@8-shot"} <= outcome.scores.keys()
    assert outcome.replicates.keys() == outcome.scores.keys()
    few = outcome.details["parts"]["8-shot"]
    assert few["images_to_learn_from"] == 24 and len(few["c"]) == 3
    each = [repeat["balanced_accuracy"] for repeat in few["repeats"]]
    assert len(set(each)) > 1
    assert outcome.scores["balanced_accuracy@8-shot"] == pytest.approx(statistics.mean(each))


def test_seeds_of_parts_are_repeats_with_a_validation_set_too():
    train, test, validation = noise_sets()
    evaluator = LinearProbe(train, test, validation, fractions=[1], shots=[1], seeds=[0, 1], c_values=[1, 10])
    outcome = run(evaluator)
    assert len(outcome.details["c"]) == 1  # nothing is left to chance
    assert len(outcome.details["parts"]["1-shot"]["c"]) == 2


def test_parts_alone():
    outcome = run(LinearProbe(colour_set(30, seed=0), colour_set(9, seed=1), fractions=[], shots=[2], c_values=[1, 10]))
    assert "balanced_accuracy@2-shot" in outcome.scores
    assert "balanced_accuracy" not in outcome.scores
    assert outcome.details["images_to_learn_from"] == 6


def test_balanced_classes():
    labels = torch.tensor([0] * 60 + [1] * 12)
    train = LabelledSet([noise_tile(index) for index in range(72)], labels, NAMES[:2])
    found = {
        class_weight: run(LinearProbe(train, train, class_weight=class_weight, c_values=[1e-3])).details["per_class"]
        for class_weight in (None, "balanced")
    }
    assert found[None]["green"]["recall"] == 0
    assert found["balanced"]["green"]["recall"] > 0.5


def test_features_before_the_projection_at_unit_length():
    train, test = colour_set(90, seed=0), colour_set(30, seed=1)
    (raw, raw_of_test) = (
        F.normalize(SetEncoder(ToyModel()).images(dataset, batch_size=64, projected=False), dim=-1)
        for dataset in (train, test)
    )
    (probe,) = fit_probes(raw, train.labels, num_classes=3, c_values=[10.0])
    probabilities = probe.logits(raw_of_test).softmax(-1)
    expected = roc_auc_score(test.labels, probabilities, multi_class="ovr")
    found, of_projected = (
        run(LinearProbe(train, test, c_values=[10.0], projected=projected)).scores["auroc"]
        for projected in (False, True)
    )
    assert found == pytest.approx(expected) != of_projected


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    test = colour_set(31, seed=1)
    outcome = run(LinearProbe(colour_set(60, seed=0), test, shots=[4]), BrokenModel(value))
    scores = outcome.scores
    # On equal features a probe can only name one class for all, which is chance; on NaN it names none.
    assert scores["balanced_accuracy"] < 1 / 3 + 1e-9
    assert scores["balanced_accuracy@4-shot"] < 1 / 3 + 1e-9
    assert bool(outcome.details["c"]) == (value == 1.0)
    if value != 1.0:
        assert scores["accuracy"] == 0
    assert all(math.isfinite(score) for score in scores.values())


def test_door():
    train, test = colour_set(30, seed=0), colour_set(9, seed=1)
    other = in_memory(([noise_tile(0), noise_tile(1)], [0, 1], ["red", "blue"]))
    with pytest.raises(UserError, match="same classes"):
        LinearProbe(train, other)
    with pytest.raises(UserError, match="validation"):
        LinearProbe(train, test, other)
    with pytest.raises(UserError, match="nothing is chosen"):
        LinearProbe(train, test, colour_set(3, seed=2))
    for options, message in [
        ({"c_values": [1, 0]}, "above 0"),
        ({"validation_fraction": 1}, "between 0 and 1"),
        ({"fractions": [0]}, "above 0 and at most 1"),
        ({"fractions": []}, "at least one part"),
        ({"shots": [0]}, "1 or more"),
        ({"shots": [11]}, "10 images of"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"class_weight": "equal"}, "balanced"),
        ({"folds": 1}, "2 or more"),
    ]:
        with pytest.raises(UserError, match=message):
            LinearProbe(train, test, **options)


@pytest.mark.parametrize("groups", [None, ["only case"] * 30])
def test_without_anything_to_hold_out_c_is_fixed(groups):
    train, test = colour_set(3 if groups is None else 30, seed=0, groups=groups), colour_set(9, seed=1)
    outcome = run(LinearProbe(train, test))
    assert outcome.details["c"] == [16 * 3 / 100]  # of a toy model's width
    assert outcome.details["c_was_chosen"] is False


def test_small_parts_have_a_fixed_c_and_large_ones_a_chosen_one():
    train, test = colour_set(60, seed=0), colour_set(9, seed=1)
    details = run(LinearProbe(train, test, shots=[1], seeds=[0, 1])).details
    assert details["c_was_chosen"] is True
    assert details["parts"]["1-shot"]["c_was_chosen"] is False and details["parts"]["1-shot"]["c"] == [0.48, 0.48]
    validation = colour_set(30, seed=2, split="val")
    assert run(LinearProbe(train, test, validation, shots=[1])).details["parts"]["1-shot"]["c_was_chosen"] is True
    assert run(LinearProbe(train, test, c_values=[3.0], shots=[1])).details["parts"]["1-shot"]["c"] == [3.0]


def test_a_group_on_both_sides_is_refused():
    train = colour_set(30, seed=0, groups=[f"case {index % 10}" for index in range(30)])
    test = colour_set(9, seed=1, groups=[f"case {index % 3 + 9}" for index in range(9)])
    with pytest.raises(UserError, match=r"1 groups are in both train and test \(first: case 9\)"):
        LinearProbe(train, test)


def test_describe():
    train, test, validation = noise_sets()
    described = json.loads(json.dumps(LinearProbe(train, test).describe()))
    assert described["protocol"] == "linear_probe/1"
    assert described["c_chosen_on"] == {"validation_fraction": 0.2, "folds": None}
    assert described["test"]["images"] == 60
    assert LinearProbe(train, test, validation).describe()["c_chosen_on"]["images"] == 60
    assert LinearProbe(train, test, validation).split == "test"


def test_real_tiles(shared_data):
    root = shared_data / "quilt_like"
    train, val = (
        csv_labels(
            root / "lc25000_labels.csv",
            root / "images",
            name_column="class_name",
            group_column="group_id",
            split_column="split",
            split=split,
        )
        for split in ("train", "val")
    )
    outcome = run(LinearProbe(train, val), ToyModel(width=64))
    assert outcome.scores["balanced_accuracy"] > 0.4  # 64 random projections of an 8x8 thumbnail; chance is 0.2
    json.dumps(outcome.as_json())
