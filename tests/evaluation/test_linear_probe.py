from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation import linear_probe
from quiltnet.evaluation.datasets import LabelledSet, csv_labels, in_memory
from quiltnet.evaluation.linear_probe import LinearProbe
from quiltnet.evaluation.metrics import balanced_accuracy
from quiltnet.evaluation.probe import fit_probes
from tests.evaluation.toy import BrokenModel, ColourModel, ToyModel, noise_tile

NAMES = ["red", "green", "blue"]


def colour_set(count: int, seed: int, wrong: float = 0.0, groups: list[str] | None = None) -> LabelledSet:
    """Plain tiles, a share of whose labels is wrong."""
    rng = np.random.default_rng(seed)
    shown = [index % 3 for index in range(count)]
    tiles = [noise_tile(1000 * seed + index, NAMES[label]) for index, label in enumerate(shown)]
    labels = [(label + 1) % 3 if rng.random() < wrong else label for label in shown]
    return LabelledSet(tiles, torch.tensor(labels), NAMES, groups)


def test_reaches_what_can_be_reached():
    scores = dict(LinearProbe(colour_set(60, seed=0), colour_set(30, seed=1)).run(ColourModel()))
    assert scores["accuracy"] == scores["balanced_accuracy"] == 1.0
    assert scores["c"] in linear_probe.C_VALUES


def test_wrong_labels_cost_what_they_must():
    test = colour_set(90, seed=1, wrong=0.3)
    shown = torch.arange(90) % 3
    scores = dict(LinearProbe(colour_set(300, seed=0, wrong=0.1), test).run(ColourModel()))
    assert scores["accuracy"] == pytest.approx((test.labels == shown).double().mean().item())


def noise_sets() -> tuple[LabelledSet, LabelledSet, LabelledSet]:
    return tuple(colour_set(count, seed, wrong=0.4) for count, seed in ((90, 0), (60, 1), (60, 2)))


def test_test_labels_choose_nothing():
    train, test, _ = noise_sets()
    turned = LabelledSet(test.images, (test.labels + 1) % 3, NAMES)
    found, found_turned = (dict(LinearProbe(train, labelled).run(ToyModel())) for labelled in (test, turned))
    assert found["c"] == found_turned["c"]
    assert found["accuracy"] != found_turned["accuracy"]


def test_c_is_the_smallest_of_the_best_on_validation():
    train, test, validation = noise_sets()
    model = ToyModel()

    def encode(dataset: LabelledSet) -> torch.Tensor:
        return model.encode_image(torch.stack([model.transform(dataset[index][0]) for index in range(len(dataset))]))

    c_values = [1000.0, 0.01, 1.0]
    scored = {}
    for probe in fit_probes(encode(train), train.labels, num_classes=3, c_values=c_values):
        predicted = probe.logits(encode(validation)).argmax(-1)
        scored[probe.c] = balanced_accuracy(predicted, validation.labels)
    best = max(scored.values())
    assert best > min(scored.values())
    found = dict(LinearProbe(train, test, validation, c_values=c_values).run(model))
    assert found["c"] == min(c for c, score in scored.items() if score == best)


def test_the_last_fit_sees_all_of_train_and_nothing_else(monkeypatch):
    train, test, validation = noise_sets()
    fits = []

    def spy(features, labels, *, num_classes, c_values):
        fits.append((len(labels), list(c_values)))
        return fit_probes(features, labels, num_classes=num_classes, c_values=c_values)

    monkeypatch.setattr(linear_probe, "fit_probes", spy)
    found = dict(LinearProbe(train, test, c_values=[1, 10]).run(ToyModel()))
    rows, c_values = fits[0]
    assert c_values == [1, 10]
    assert 65 <= rows <= 72  # a fifth of 90, a few more where a class does not divide
    assert fits[1] == (90, [found["c"]])
    fits.clear()
    found = dict(LinearProbe(train, test, validation, c_values=[1, 10]).run(ToyModel()))
    assert fits == [(90, [1, 10]), (90, [found["c"]])]


def test_of_equally_good_c_the_smallest_is_taken():
    train, test = colour_set(60, seed=0), colour_set(30, seed=1)  # plain tiles: any of these C is never wrong
    assert dict(LinearProbe(train, test, c_values=[1e4, 1e2, 1e3]).run(ColourModel()))["c"] == 1e2


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_broken_model_does_not_score(value):
    test = colour_set(31, seed=1)
    scores = dict(LinearProbe(colour_set(60, seed=0), test).run(BrokenModel(value)))
    # On equal features a probe can only name one class for all, which is chance; on NaN it names none.
    assert scores["balanced_accuracy"] < 1 / 3 + 1e-9
    assert ("c" in scores) == (value == 1.0)
    if value != 1.0:
        assert scores["accuracy"] == 0


def test_door():
    train, test = colour_set(30, seed=0), colour_set(9, seed=1)
    other = in_memory(([noise_tile(0), noise_tile(1)], [0, 1], ["red", "blue"]))
    with pytest.raises(UserError, match="same classes"):
        LinearProbe(train, other)
    with pytest.raises(UserError, match="validation"):
        LinearProbe(train, test, other)
    with pytest.raises(UserError, match="above 0"):
        LinearProbe(train, test, c_values=[1, 0])
    with pytest.raises(UserError, match="between 0 and 1"):
        LinearProbe(train, test, validation_fraction=1)
    with pytest.raises(UserError, match="too few images or groups"):
        LinearProbe(colour_set(3, seed=0), test)
    with pytest.raises(UserError, match="too few images or groups"):
        LinearProbe(colour_set(30, seed=0, groups=["only case"] * 30), test)
    LinearProbe(colour_set(3, seed=0), test, validation=colour_set(3, seed=2))


def test_a_group_on_both_sides_is_refused():
    train = colour_set(30, seed=0, groups=[f"case {index % 10}" for index in range(30)])
    test = colour_set(9, seed=1, groups=[f"case {index % 3 + 9}" for index in range(9)])
    with pytest.raises(UserError, match=r"1 groups are in both train and test \(first: case 9\)"):
        LinearProbe(train, test)


def test_describe():
    train, test, validation = noise_sets()
    described = json.loads(json.dumps(LinearProbe(train, test).describe()))
    assert described["c_chosen_on"] == {"fraction_of_train": 0.2, "seed": 0}
    assert described["test"]["images"] == 60
    assert LinearProbe(train, test, validation).describe()["c_chosen_on"]["images"] == 60


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
    scores = dict(LinearProbe(train, val).run(ToyModel(width=64)))
    assert scores["balanced_accuracy"] > 0.4  # 64 random projections of an 8x8 thumbnail; chance is 0.2
