from __future__ import annotations

from collections import Counter

import pytest
import torch

from quiltnet.evaluation.probe_splits import TrainPart, hold_out, hold_out_folds


def test_hold_out_takes_a_fraction_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3])
    held_out = hold_out(labels, None, fraction=0.2, seed=0)
    # The single row of class 3 is trained on.
    assert Counter(labels[held_out].tolist()) == {0: 10, 1: 2, 2: 1}


def test_hold_out_keeps_groups_whole():
    labels = torch.arange(120) % 4
    groups = [f"case {index // 6 % 20}" for index in range(120)]  # 20 cases, each of all classes
    held_out = hold_out(labels, groups, fraction=0.2, seed=3).tolist()
    cases = {case: {out for out, of in zip(held_out, groups, strict=True) if of == case} for case in groups}
    assert all(len(sides) == 1 for sides in cases.values())
    assert 0.15 <= sum(held_out) / 120 <= 0.4


def test_hold_out_is_seeded():
    labels = torch.arange(100) % 2
    first, again, other = (hold_out(labels, None, fraction=0.2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_folds_hold_out_every_row_once_but_lone_groups():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2])
    masks = hold_out_folds(labels, None, folds=5, seed=0)
    assert masks.sum(dim=0).tolist() == [1] * 17 + [0]
    assert all(2 <= labels[mask].eq(0).sum() <= 2 and 1 <= labels[mask].eq(1).sum() <= 2 for mask in masks)
    assert not torch.equal(masks, hold_out_folds(labels, None, folds=5, seed=1))


def test_folds_keep_groups_whole():
    labels = torch.arange(60) % 2
    groups = [f"case {index % 2} {index // 10}" for index in range(60)]  # 6 cases a class
    masks = hold_out_folds(labels, groups, folds=3, seed=0)
    assert masks.sum(dim=1).tolist() == [20, 20, 20]
    for mask in masks:
        assert not {groups[row] for row in mask.nonzero()} & {groups[row] for row in (~mask).nonzero()}


def test_no_fold_is_empty():
    assert hold_out_folds(torch.tensor([0, 0, 1, 1]), None, folds=10, seed=0).sum(dim=1).tolist() == [1] * 4
    assert hold_out_folds(torch.tensor([0, 1]), None, folds=5, seed=0).shape == (0, 2)


@pytest.mark.parametrize(("part", "counts"), [(TrainPart(0.1), [10, 2, 1]), (TrainPart(shots=3), [3, 3, 3])])
def test_parts_are_drawn_class_by_class(part, counts):
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 4)
    rows = part.rows(labels, seed=0)
    assert torch.bincount(labels[rows]).tolist() == counts
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, part.rows(labels, seed=0))
    assert not torch.equal(rows, part.rows(labels, seed=1))


def test_parts_of_a_seed_lie_within_each_other():
    labels = torch.arange(200) % 2
    small, large = (set(TrainPart(fraction).rows(labels, seed=4).tolist()) for fraction in (0.1, 0.5))
    assert small < large
    assert set(TrainPart(shots=3).rows(labels, seed=4).tolist()) < small


def test_names():
    parts = [TrainPart(), TrainPart(0.1), TrainPart(0.005), TrainPart(shots=16)]
    assert [part.name for part in parts] == ["100%", "10%", "0.5%", "16-shot"]
    assert [part.is_whole for part in parts] == [True, False, False, False]
