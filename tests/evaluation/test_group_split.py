from __future__ import annotations

import numpy as np
import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.group_split import part_by_group, split_by_group, with_groups
from quiltnet.evaluation.labelled_set import LabelledSet

FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}


def grouped_set(groups: list[str], labels: list[int], classes: int = 3) -> LabelledSet:
    tile = np.zeros((2, 2, 3), np.uint8)
    names = [f"{group}/{number}" for number, group in enumerate(groups)]
    class_names = [f"class {number}" for number in range(classes)]
    return LabelledSet([tile] * len(groups), torch.tensor(labels), class_names, groups=groups, names=names)


def patients(count: int, seed: int = 0) -> LabelledSet:
    """Patients with one to thirty images, most of one class, some of several; class 2 is rare."""
    rng = np.random.default_rng(seed)
    groups, labels = [], []
    for patient in range(count):
        main = rng.choice(3, p=[0.5, 0.4, 0.1]) if patient > 9 else patient % 3
        for _ in range(rng.integers(1, 30)):
            groups.append(f"p{patient}")
            labels.append(int(main if rng.random() < 0.9 else rng.integers(2)))
    return grouped_set(groups, labels)


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_exact_and_share_no_group(seed):
    dataset = patients(120, seed)
    parts = split_by_group(dataset, FRACTIONS, seed=seed)
    assert {part: dataset.split for part, dataset in parts.items()} == {part: part for part in FRACTIONS}
    assert sorted(name for part in parts.values() for name in part.names) == sorted(dataset.names)
    groups = [set(part.groups) for part in parts.values()]
    assert sum(map(len, groups)) == len(set(dataset.groups)) == len(set.union(*groups))
    counts = torch.bincount(dataset.labels)
    for name, part in parts.items():
        share = torch.bincount(part.labels, minlength=3) / counts
        assert share.tolist() == pytest.approx([FRACTIONS[name]] * 3, abs=0.03)
        assert part.describe()["split_by_group"] == {"fractions": FRACTIONS, "seed": seed}


def test_parts_depend_on_the_seed_and_not_on_the_order():
    dataset = patients(60)
    parts = split_by_group(dataset, FRACTIONS, seed=1)
    shuffled = dataset.select(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)))
    backwards = dict(reversed(FRACTIONS.items()))
    again = split_by_group(shuffled, backwards, seed=1)
    other = split_by_group(dataset, FRACTIONS, seed=2)
    for part in FRACTIONS:
        assert sorted(again[part].names) == sorted(parts[part].names)
    assert sorted(other["test"].names) != sorted(parts["test"].names)
    assert part_by_group(dataset, "test", FRACTIONS, seed=1).sha256() == parts["test"].sha256()


def test_every_class_is_in_every_part_where_it_can_be():
    # Two large groups would both go to train, were it for sizes alone.
    dataset = grouped_set(["a"] * 50 + ["b"] * 50 + list("cdefghij"), [0] * 100 + [1, 2] * 4)
    parts = split_by_group(dataset, {"train": 0.9, "test": 0.1})
    assert all(set(part.labels.tolist()) == {0, 1, 2} for part in parts.values())


def test_door(tmp_path):
    dataset = grouped_set(["a", "a", "b", "c", "d"], [0, 0, 1, 1, 1])
    with pytest.raises(UserError, match=r"class 'class 0' are too few \(1\)"):
        split_by_group(dataset, {"train": 0.5, "test": 0.5})
    with pytest.raises(UserError, match=r"class 'class 0' are too few \(2\).* all 3 parts"):
        split_by_group(grouped_set(list("abcdef"), [0, 0, 1, 1, 1, 1]), FRACTIONS)
    for fractions in ({"train": 1.0}, {"train": 0.5, "test": 0.4}, {"train": 1.0, "test": 0.0}):
        with pytest.raises(UserError, match="1 together"):
            split_by_group(dataset, fractions)
    with pytest.raises(UserError, match="part 'fold'"):
        split_by_group(dataset, {"fold": 1.0})
    with pytest.raises(UserError, match="part='val' is not among"):
        part_by_group(grouped_set(list("abcd"), [0, 0, 1, 1]), "val", {"train": 0.5, "test": 0.5})
    ungrouped = LabelledSet(dataset.images, dataset.labels, dataset.class_names)
    with pytest.raises(UserError, match="without a leak"):
        split_by_group(ungrouped, FRACTIONS)


def test_groups_of_a_table(tmp_path):
    dataset = grouped_set(list("abcd"), [0, 0, 1, 1])
    table = tmp_path / "groups.csv"
    rows = [*zip(dataset.names, "wwxy", strict=True), ("another set's", "z")]
    table.write_text("\n".join(["image_path,group_id", *(",".join(row) for row in reversed(rows))]))
    regrouped = with_groups(dataset, table)
    assert regrouped.groups == ["w", "w", "x", "y"]
    assert regrouped.describe()["groups"] == str(table)
    assert (regrouped.names, dataset.groups) == (dataset.names, list("abcd"))
    table.write_text("image_path,group_id\na/0,w\n")
    with pytest.raises(UserError, match=r"3 of 4 images have no group .*first: b/1"):
        with_groups(dataset, table)
    table.write_text("image_path,group_id\na/0,w\n./a/0,x\n")
    with pytest.raises(UserError, match="a/0 in both 'w' and 'x'"):
        with_groups(dataset, table)
