"""Public labelled sets as they are published: what lies below the root, and labels bound to QuiltNet's class names."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quiltnet.errors import UserError
from quiltnet.evaluation.class_names import index_labels
from quiltnet.evaluation.image_files import existing_images, find_images, relative_names, require_once
from quiltnet.evaluation.label_table import read_columns
from quiltnet.evaluation.labelled_set import LabelledSet, Split

T = TypeVar("T")

CLASS_NAMES_OF = "github.com/wisdomikezogwo/quilt1m eval/en_classnames.json"
NO_SPLIT = "none published: all images are tested on"
_LISTED = 5  # missing paths that a message names


@dataclass(frozen=True)
class PublishedLayout:
    """What has to lie below a set's root, and where it comes from.

    Args:
        name: of the set.
        root: the folder it was unpacked to.
        paths: what is needed of it, from the root; a folder ends in a slash.
        url: where to get it.

    Raises:
        UserError: something of it is missing. As all errors of a layout, it lists what is expected, and the address.
    """

    name: str
    root: Path
    paths: Sequence[str]
    url: str

    def __post_init__(self) -> None:
        missing = [path for path in self.paths if not (self.root / path).exists()]
        if missing:
            raise self.missing(missing)

    def missing(self, paths: Sequence[str]) -> UserError:
        """The error that says that these are missing (paths from the root)."""
        rest = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
        return self.faulty(f"there is no {', '.join(paths[:_LISTED])}{rest}")

    def faulty(self, what: str | Exception) -> UserError:
        """The error that says what is wrong, what is expected, and where to get it."""
        return UserError(
            f"{self.name} in {self.root} is not as published: {what}. "
            f"Expected below it: {', '.join(self.paths)}. Get it from {self.url}"
        )

    def images_of(self, folders: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Paths of all images below the folders, from the root and sorted within each, and each image's label.

        Args:
            folders: folder, from the root -> label.
        """
        names, labels, empty = [], [], []
        for folder, label in folders.items():
            found = find_images(self.root / folder)
            names += [f"{folder}/{name}" for name in found]
            labels += [label] * len(found)
            if not found:
                empty.append(f"image in {folder}/")
        if empty:
            raise self.missing(empty)
        return names, labels

    def table(self, path: str, columns: Sequence[str]) -> dict[str, list[Any]]:
        """column -> cells of a csv (text) or xlsx (text and numbers) file of the set."""
        file = self.root / path
        try:
            return _read_xlsx(file, columns) if file.suffix == ".xlsx" else read_columns(file, columns)
        except UserError as error:
            raise self.faulty(error) from error

    def labelled_set(
        self,
        names: Sequence[str],
        labels: Sequence[str],
        class_names: Mapping[str, str],
        *,
        split: Split,
        split_of: str = NO_SPLIT,
        groups: Sequence[str] | None = None,
        slides: Sequence[str] | None = None,
        is_ordered: bool = False,
        **choices: Any,
    ) -> LabelledSet:
        """Images with labels by name.

        Args:
            names: N paths of images, from the root.
            labels: N labels as the set spells them.
            class_names: label -> name in prompts, in the order of the classes.
            split_of: what says which images are of this split.
            choices: what else was chosen, for the record.
        """
        unknown = sorted(set(labels) - set(class_names))
        if unknown:
            raise self.faulty(f"it has the label {unknown[0]!r}, and known are {', '.join(class_names)}")
        try:
            names = relative_names(names, self.name)
            require_once(names, self.name)
            images = existing_images(self.root, names, self.name)
        except UserError as error:
            raise self.faulty(error) from error
        return LabelledSet(
            images=images,
            labels=index_labels(labels, class_names),
            class_names=list(class_names.values()),
            groups=groups,
            slides=slides,
            names=names,
            split=split,
            is_ordered=is_ordered,
            origin=self.origin(class_names, split_of=split_of, **choices),
        )

    def origin(self, class_names: Mapping[str, str], **choices: Any) -> dict[str, Any]:
        """For the record of a result."""
        return {
            "set": self.name,
            "root": str(self.root),
            "url": self.url,
            "class_names": dict(class_names),
            "class_names_of": CLASS_NAMES_OF,
            **choices,
        }


def choose(option: str, value: str, known: Mapping[str, T]) -> T:
    """What the value stands for.

    Raises:
        UserError: it is none of the known.
    """
    if value not in known:
        raise UserError(f"{option}={value!r} must be one of {', '.join(known)}")
    return known[value]


def _read_xlsx(file: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    import pandas as pd

    try:
        table = pd.read_excel(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:  # depends on where a file was cut short
        raise UserError(f"{file} cannot be read as a table ({error})") from error
    absent = [column for column in columns if column not in table.columns]
    if absent:
        present = ", ".join(map(str, table.columns))
        raise UserError(f"{file} has no column {absent[0]!r}; its columns are {present}")
    return {column: table[column].tolist() for column in columns}
