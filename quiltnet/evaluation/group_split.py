"""Parting a set that comes without splits, so that no group is in two parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.image_files import relative_names
from quiltnet.evaluation.label_table import read_columns
from quiltnet.evaluation.labelled_set import SPLITS, LabelledSet, Split


def with_groups(
    dataset: LabelledSet, table: str | Path, *, image_column: str = "image_path", group_column: str = "group_id"
) -> LabelledSet:
    """The set with the groups of a table, such as one of near-duplicates, in place of its own.

    Args:
        table: csv, tsv or parquet; it may list more images than the set has.
        image_column: the names of the set's images: paths below its root.

    Raises:
        UserError: an image of the set that the table lacks or puts in two groups, or what is wrong with the table.
    """
    cells = read_columns(table, [image_column, group_column])
    group_of: dict[str, str] = {}
    for name, group in zip(relative_names(cells[image_column], table), cells[group_column], strict=True):
        if group_of.setdefault(name, group) != group:
            raise UserError(f"{table} puts {name} in both {group_of[name]!r} and {group!r}; choose one group")
    names = [dataset.name(index) for index in range(len(dataset))]
    lacking = [name for name in names if name not in group_of]
    if lacking:
        raise UserError(
            f"{len(lacking)} of {len(names)} images have no group in {table} (first: {lacking[0]}); its column "
            f"{image_column} must list all, as the set names them"
        )
    return replace(dataset, groups=[group_of[name] for name in names], origin={**dataset.origin, "groups": str(table)})


def part_by_group(dataset: LabelledSet, part: Split, fractions: Mapping[Split, float], *, seed: int = 0) -> LabelledSet:
    """One of the parts that ``split_by_group`` makes, for a configuration that names train and test one by one."""
    parts = split_by_group(dataset, fractions, seed=seed)
    if part not in parts:
        raise UserError(f"part={part!r} is not among the fractions; choose one of {', '.join(parts)}, or give it one")
    return parts[part]


def split_by_group(
    dataset: LabelledSet, fractions: Mapping[Split, float], *, seed: int = 0
) -> dict[Split, LabelledSet]:
    """Parts of a set: no group in two of them, every class in each, and each class parted by about these fractions.

    Groups are dealt out one by one, those that hold most of a class first, each to the part where it lessens the sum
    of squared differences (over parts and classes) between the shares that parts have and should have. The parts depend
    on the groups' names, the labels, fractions and seed alone, not on the order of the images.

    Args:
        fractions: part -> its share of the images, as ``{train: 0.7, val: 0.1, test: 0.2}``; 1 together.
        seed: decides between groups of about the same size.

    Raises:
        UserError: fractions that do not add up, a set without groups, or a class with too few groups for all parts.
    """
    _require_fractions(fractions)
    parts = [part for part in SPLITS if part in fractions]
    if dataset.groups is None:
        raise UserError(
            "a set without groups cannot be split without a leak; name its patients or slides by group_column, "
            "group_pattern or with_groups"
        )
    names, group_of = np.unique(np.asarray(dataset.groups, dtype=str), return_inverse=True)
    counts = np.zeros((len(names), len(dataset.class_names)), dtype=np.int64)  # images of each group and class
    np.add.at(counts, (group_of, dataset.labels.numpy()), 1)
    part_of = _deal(counts, np.array([fractions[part] for part in parts]), seed, dataset.class_names)
    record = {"split_by_group": {"fractions": dict(fractions), "seed": seed}}
    return {
        part: replace(
            dataset.select(torch.from_numpy(part_of[group_of] == number), split=part),
            origin={**dataset.origin, **record},
        )
        for number, part in enumerate(parts)
    }


def _deal(counts: np.ndarray, fractions: np.ndarray, seed: int, class_names: Sequence[str]) -> np.ndarray:
    """(G, C) images of each group and class -> (G,) the part of each group."""
    totals = np.maximum(counts.sum(axis=0), 1)  # (C,)
    shares = counts / totals  # (G, C) of each class
    lacking = np.tile(fractions[:, None], len(totals))  # (P, C) shares that each part should yet get
    has_class = np.zeros(lacking.shape, dtype=bool)
    waiting = (counts > 0).sum(axis=0)  # (C,) groups of each class that are not dealt out yet
    rarest_first = np.argsort(waiting, kind="stable")
    part_of = np.zeros(len(counts), dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(counts))
    # Large groups first, while there is room for them; in powers of two, so that the seed has a say.
    order = order[np.argsort(-np.floor(np.log2(shares[order].max(axis=1))), kind="stable")]
    for group in order:
        may_have = np.ones(len(fractions), dtype=bool)
        for label in rarest_first[counts[group, rarest_first] > 0]:
            # The last groups of a class go where it is absent: a part without it could not be scored on it.
            absent = ~has_class[:, label]
            if waiting[label] <= absent.sum() and (may_have & absent).any():
                may_have &= absent
        part = np.where(may_have, lacking @ shares[group], -np.inf).argmax()
        part_of[group] = part
        lacking[part] -= shares[group]
        has_class[part] |= counts[group] > 0
        waiting -= counts[group] > 0
    for label, groups in enumerate((counts > 0).sum(axis=0)):
        if groups and not has_class[:, label].all():
            raise UserError(
                f"groups that hold class {class_names[label]!r} are too few ({groups}) for it to be in all "
                f"{len(fractions)} parts; ask for fewer parts, or drop the class"
            )
    return part_of


def _require_fractions(fractions: Mapping[Split, float]) -> None:
    unknown = [part for part in fractions if part not in SPLITS]
    if unknown:
        raise UserError(f"fractions has a part {unknown[0]!r}; parts are {', '.join(SPLITS)}")
    if len(fractions) < 2 or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"fractions={dict(fractions)} must be of at least two parts, each above 0, 1 together")
