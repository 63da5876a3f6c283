"""Labelled image sets. Class names are bound to the names of labels, never to their position in a list."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quiltnet.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Pillow's words for a file that is no image, cut short or too large; SyntaxError is for a broken PNG.
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images with one label each.

    Args:
        images: N paths, or N arrays (H, W, 3) uint8.
        labels: (N,) int64, indices into class_names.
        class_names: C names as they go into prompts. Some may have no image here, as in a split without a
            rare class.
        groups: N names of what must not be torn apart by a split (patient, slide, original tile).
        origin: where it comes from and what was chosen, for the record of a result.

    Raises:
        UserError: no image, fewer than two classes among the labels, or two classes of the same name.
    """

    images: Sequence[Path] | Sequence[np.ndarray]
    labels: Tensor
    class_names: Sequence[str]
    groups: Sequence[str] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels)
        if not len(self.images):
            raise UserError(f"no labelled image in {self._where()}; choose a set that has some")
        present = [self.class_names[label] for label in self.labels.unique().tolist()]
        if len(present) < 2:
            raise UserError(
                f"all {len(self)} images of {self._where()} belong to the single class {present[0]!r}, "
                "which any model names right; give at least two classes"
            )
        repeated = sorted(name for name, count in Counter(self.class_names).items() if count > 1)
        if repeated:
            raise UserError(
                f"several classes of {self._where()} are called {repeated[0]!r}, so no prompt "
                "can tell them apart; give each its own name"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """RGB image and label.

        Raises:
            UserError: the file is no readable image. A measurement on fewer images is another measurement.
        """
        image, label = self.images[index], int(self.labels[index])
        if isinstance(image, np.ndarray):
            return Image.fromarray(image), label
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB"), label
        except UNREADABLE as error:
            raise UserError(
                f"cannot read {image} ({error}); images to measure on are never left out silently: "
                "repair it, or take it out of the set"
            ) from error

    def describe(self) -> dict[str, Any]:
        """What a reader of a result has to know of the set; JSON types only."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return {
            **self.origin,
            "images": len(self),
            "images_per_class": dict(zip(self.class_names, counts, strict=True)),
        }

    def _where(self) -> str:
        facts = [f"{key} {value}" for key, value in self.origin.items() if isinstance(value, str)]
        return ", ".join(facts) or "the set"


def folder_per_class(
    root: str | Path, class_names: Mapping[str, str] | None = None, drop: Sequence[str] = ()
) -> LabelledSet:
    """One folder a class, images at any depth below it; classes in the alphabetical order of their folders.

    Args:
        root: the folder of folders.
        class_names: folder -> name in prompts; folder names as they are where it is not given.
        drop: folders left out, such as the background class of NCT-CRC-HE-100K.

    Raises:
        UserError: no such root, a folder without a name, a name without a folder, a folder without an image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds one folder of images a class")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    folders = [folder for folder in folders if folder not in drop]
    if not folders:
        raise UserError(f"{root} holds no folder of images; give the folder that holds one folder a class")
    names = _names_of(folders, class_names, f"the folders of {root}", "list it in drop")
    images, labels = [], []
    for label, folder in enumerate(folders):
        found = sorted(path for path in (root / folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"{root / folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); fill or drop it")
        images += found
        labels += [label] * len(found)
    origin = {"root": str(root), "class_names": names, "dropped": list(drop)}
    return LabelledSet(images, torch.tensor(labels), list(names.values()), origin=origin)


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
    group_column: str | None = None,
) -> LabelledSet:
    """A table of labels (csv with a header, UTF-8); classes in the alphabetical order of their labels.

    The classes are those of the whole table, so that all its splits number them alike.

    Args:
        table: the csv file.
        images: folder that the image column's paths start from.
        class_names: label -> name in prompts. Labels as they are where neither it nor name_column is given.
        name_column: the column with the name in prompts, instead of class_names.
        split_column, split: only rows with this value in this column.
        group_column: what must not be torn apart when a part is held out, such as the patient.

    Raises:
        UserError: no such file, column or split, an empty cell, a label without a name or with two, a missing
            image.
    """
    if class_names is not None and name_column is not None:
        raise UserError("class_names and name_column both name the classes; give one of them")
    if (split_column is None) != (split is None):
        raise UserError(f"split_column={split_column!r} and split={split!r} belong together; give both or neither")
    columns = [image_column, label_column, name_column, split_column, group_column]
    rows = _read_rows(table, [column for column in columns if column is not None])
    if name_column is not None:
        class_names = _names_in(rows, label_column, name_column, table)
    label_names = sorted({row[label_column] for row in rows})
    names = _names_of(label_names, class_names, f"the values of {label_column} in {table}", "delete its rows")
    index_of = {label: index for index, label in enumerate(label_names)}
    if split is not None:
        rows = _rows_of_split(rows, split_column, split, table)
    return LabelledSet(
        images=_existing_images(rows, Path(images), image_column, table),
        labels=torch.tensor([index_of[row[label_column]] for row in rows], dtype=torch.int64),
        class_names=list(names.values()),
        groups=None if group_column is None else [row[group_column] for row in rows],
        origin={"table": str(table), "split": split, "class_names": names},
    )


def in_memory(tiles: tuple[Sequence[np.ndarray], Sequence[int], Sequence[str]], source: str = "memory") -> LabelledSet:
    """A set without files, such as drawn tiles.

    Args:
        tiles: N images (H, W, 3) uint8, N labels and C class names that the labels are indices into.
        source: what they are, for the record of a result.
    """
    images, labels, class_names = tiles
    return LabelledSet(images, torch.tensor(labels, dtype=torch.int64), list(class_names), origin={"source": source})


def _read_rows(table: str | Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """All rows, each with something in each of the columns."""
    if not Path(table).is_file():
        raise UserError(f"{table} is not a file; give the csv table of labels")
    with open(table, newline="", encoding="utf-8-sig") as file:  # -sig: Excel writes a byte-order mark
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
    present = reader.fieldnames or []
    missing = [column for column in columns if column not in present]
    if missing:
        raise UserError(f"{table} has no column {missing[0]!r}; its columns are {', '.join(present)}")
    for column in columns:
        empty = [number for number, row in enumerate(rows, start=1) if not row[column]]
        if empty:
            raise UserError(f"{len(empty)} rows of {table} have no {column} (first: row {empty[0]}); fill them in")
    return rows


def _names_in(rows: list[dict[str, str]], label_column: str, name_column: str, table: str | Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for row in rows:
        label, name = row[label_column], row[name_column]
        if names.setdefault(label, name) != name:
            raise UserError(f"label {label!r} is called both {names[label]!r} and {name!r} in {table}; choose one name")
    return names


def _names_of(labels: Sequence[str], class_names: Mapping[Any, str] | None, of: str, remedy: str) -> dict[str, str]:
    """label -> name in prompts, in the order of labels; the two must cover each other."""
    if class_names is None:
        return {label: label for label in labels}
    # str: YAML reads a label such as 0 as a number.
    names = {str(label): name for label, name in class_names.items()}
    nameless = [label for label in labels if not names.get(label)]
    if nameless:
        raise UserError(f"{nameless[0]!r}, one of {of}, has no class name; give it one, or {remedy}")
    unused = [label for label in names if label not in labels]
    if unused:
        raise UserError(f"class_names names {unused[0]!r}, which is not among {of}: {', '.join(labels)}")
    return {label: names[label] for label in labels}


def _rows_of_split(
    rows: list[dict[str, str]], split_column: str, split: str, table: str | Path
) -> list[dict[str, str]]:
    chosen = [row for row in rows if row[split_column] == split]
    if not chosen:
        present = ", ".join(sorted({row[split_column] for row in rows}))
        raise UserError(f"no row of {table} has {split_column}={split}; there are {present}")
    return chosen


def _existing_images(rows: list[dict[str, str]], images: Path, image_column: str, table: str | Path) -> list[Path]:
    paths = [images / row[image_column] for row in rows]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} images that {table} names do not exist (first: {missing[0]}); "
            f"give the folder that its {image_column} starts from"
        )
    return paths
