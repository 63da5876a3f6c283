"""Labelled sets of image files, and of arrays. Class names are bound to labels, never to positions in a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.class_names import bind_names, index_labels, sort_labels
from quiltnet.evaluation.image_files import (
    IMAGE_SUFFIXES,
    ImageFiles,
    existing_images,
    find_images,
    groups_in,
    relative_names,
    require_once,
)
from quiltnet.evaluation.label_table import read_columns
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.split_roles import SPLIT_ROLES, split_role


def folder_per_class(
    root: str | Path,
    class_names: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    *,
    group_pattern: str | None = None,
    split: Split = "test",
    ordered: bool = False,
) -> LabelledSet:
    """One folder a class, images at any depth below it; classes in the order of their folders' names.

    Args:
        root: the folder of folders; ``SET/train`` where a set is laid out as ``SET/train/CLASS``.
        class_names: folder -> name in prompts; folder names as they are where it is not given.
        drop: folders left out, such as the background class of NCT-CRC-HE-100K.
        group_pattern: regular expression, searched for in each image's path below its class folder; what its first
            bracket finds is the image's group, as ``^(patient\\d+)_``.
        split: what the images may be used for.
        ordered: whether the classes are grades, the least first: folders named by numbers, or the order of class_names.

    Raises:
        UserError: no such root, or one of splits; a folder without a name, a name without a folder, a folder without an
            image, an image without a group.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds one folder of images a class")
    present = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    present = [folder for folder in present if folder not in drop]
    if not present:
        raise UserError(f"{root} holds no folder of images; give the folder that holds one folder a class")
    if all(folder.lower() in SPLIT_ROLES for folder in present):
        raise UserError(f"{root} holds splits ({', '.join(sorted(present))}), not classes; give {root / present[0]}")
    folders = sort_labels(present, class_names, f"{root}", are_grades=ordered)
    names = bind_names(folders, class_names, f"the folders of {root}", "list it in drop")
    images, labels, below = [], [], []
    for folder in folders:
        found = find_images(root / folder)
        if not found:
            raise UserError(f"{root / folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); fill or drop it")
        images += [f"{folder}/{name}" for name in found]
        labels += [folder] * len(found)
        below += found
    return LabelledSet(
        images=ImageFiles(root, images),
        labels=index_labels(labels, names),
        class_names=list(names.values()),
        groups=groups_in(below, group_pattern, root),
        names=images,
        split=split,
        is_ordered=ordered,
        origin={"root": str(root), "class_names": names, "dropped": list(drop)},
    )


def csv_labels(
    table: str | Path,
    images: str | Path,
    *,
    image_column: str = "image_path",
    label_column: str = "label",
    class_names: Mapping[str, str] | None = None,
    name_column: str | None = None,
    split_column: str | None = None,
    split: str | None = None,
    used_as: Split | None = None,
    group_column: str | None = None,
    slide_column: str | None = None,
    ordered: bool = False,
) -> LabelledSet:
    """A table of labels (csv, tsv or parquet, with a header); classes in the order of their labels.

    The classes are those of the whole table, so that all its splits number them alike.

    Args:
        table: told by its ending; csv and tsv in UTF-8.
        images: folder that the image column's paths start from.
        class_names: label -> name in prompts. Labels as they are where neither it nor name_column is given.
        name_column: the column with the name in prompts, instead of class_names.
        split_column, split: only rows with this value in this column.
        used_as: what the images may be used for; told by the split's name where not given (``splits.SPLIT_ROLES``).
        group_column: what must not be torn apart when a part is held out, such as the patient.
        slide_column: the slide whose label a tile has, for slide-level scores.
        ordered: whether the classes are grades, the least first: labels that are numbers, or the order of class_names.

    Raises:
        UserError: no such file, column or split, an empty cell, a label without a name or with two, an image that is
            missing, listed twice, or in two splits.
    """
    if class_names is not None and name_column is not None:
        raise UserError("class_names and name_column both name the classes; give one of them")
    if (split_column is None) != (split is None):
        raise UserError(f"split_column={split_column!r} and split={split!r} belong together; give both or neither")
    named = [image_column, label_column, name_column, split_column, group_column, slide_column]
    cells = read_columns(table, [column for column in named if column is not None])
    labels, image_names = cells[label_column], relative_names(cells[image_column], table)
    if name_column is not None:
        class_names = _names_in(labels, cells[name_column], table)
    sorted_labels = sort_labels(labels, class_names, f"{table}", are_grades=ordered)
    names = bind_names(sorted_labels, class_names, f"the values of {label_column} in {table}", "delete its rows")
    require_once(image_names, table)
    rows = range(len(labels)) if split is None else _rows_of(cells[split_column], str(split), split_column, table)
    chosen = {column: [values[row] for row in rows] for column, values in cells.items()}
    image_names = [image_names[row] for row in rows]
    return LabelledSet(
        images=existing_images(images, image_names, table),
        labels=index_labels(chosen[label_column], names),
        class_names=list(names.values()),
        groups=None if group_column is None else chosen[group_column],
        slides=None if slide_column is None else chosen[slide_column],
        names=image_names,
        split=split_role(split, used_as),
        is_ordered=ordered,
        origin={"table": str(table), "class_names": names, "rows": "all" if split is None else {split_column: split}},
    )


def in_memory(
    tiles: tuple[Sequence[np.ndarray], Sequence[int], Sequence[str]], source: str = "memory", split: Split = "test"
) -> LabelledSet:
    """A set without files, such as drawn tiles.

    Args:
        tiles: N images (H, W, 3) or (H, W) uint8, N labels and C class names that the labels are indices into.
        source: what they are, for the record of a result.
        split: what they may be used for.
    """
    images, labels, class_names = tiles
    return LabelledSet(
        images=images,
        labels=torch.tensor(labels, dtype=torch.int64),
        class_names=list(class_names),
        names=[f"{source}/{index}" for index in range(len(images))],  # sets of another source are other items
        split=split,
        origin={"source": source},
    )


def _names_in(labels: Sequence[str], names: Sequence[str], table: str | Path) -> dict[str, str]:
    name_of: dict[str, str] = {}
    for label, name in zip(labels, names, strict=True):
        if name_of.setdefault(label, name) != name:
            raise UserError(
                f"label {label!r} is called both {name_of[label]!r} and {name!r} in {table}; choose one name"
            )
    return name_of


def _rows_of(splits: Sequence[str], split: str, split_column: str, table: str | Path) -> list[int]:
    rows = [row for row, value in enumerate(splits) if value == split]
    if not rows:
        raise UserError(f"no row of {table} has {split_column}={split}; there are {', '.join(sorted(set(splits)))}")
    return rows
