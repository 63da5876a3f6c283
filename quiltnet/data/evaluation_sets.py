"""Evaluation sets that training data is compared with: folders of images, tables of labels, shards."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from quiltnet.data.examining import Portion
from quiltnet.data.manifest import MANIFEST_NAME
from quiltnet.data.shard_sets import SetShard, find_shard_set
from quiltnet.errors import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".tif", ".tiff", ".webp"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
IMAGE_COLUMNS = ("image_path", "image", "file", "filename", "file_name", "path")

_FILES_AT_ONCE = 500


def evaluation_portions(place: str, group: str) -> list[Portion]:
    """What ``--against`` names, in portions of ``group``.

    Args:
        place: a folder of images at any depth; a csv or tsv table of labels with a column of image paths, which start
            from its folder or from ``images`` in it; a shard set, a folder of tars, or a tar.

    Raises:
        UserError: nothing is there, or a table names images that do not exist.
    """
    path = Path(os.path.abspath(Path(place).expanduser()))
    if path.is_file() and path.suffix.lower() in SEPARATORS:
        return list(_portions(group, _images_of_table(path)))
    if not path.exists():
        raise UserError(f"--against {place}: there is nothing; give a folder of images, a table of labels, or shards")
    holds_shards = path.is_file() or (path / MANIFEST_NAME).is_file() or any(path.glob("*.tar"))
    files = [] if holds_shards else sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if files:
        return list(_portions(group, files))
    return [Portion(group, shard.path, shard.entry) for shard in _shards(place)]


def _shards(place: str) -> list[SetShard]:
    try:
        return find_shard_set(place).shards
    except UserError as error:
        raise UserError(
            f"--against {place} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) and no shards; "
            "give a folder of images, a table of labels, or shards"
        ) from error


def _portions(group: str, files: list[Path]) -> Iterator[Portion]:
    for begin in range(0, len(files), _FILES_AT_ONCE):
        yield Portion(group, files=tuple(files[begin : begin + _FILES_AT_ONCE]))


def _images_of_table(table: Path) -> list[Path]:
    names = _image_names(table)
    unsafe = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if unsafe:
        raise UserError(f"{table} names {unsafe[0]}; image paths start from the table's folder, and stay below it")
    for root in (table.parent, table.parent / "images"):
        files = [root / name for name in names]
        if files and all(map(Path.is_file, files)):
            return files
    raise UserError(
        f"images that {table} names are neither beside it nor in {table.parent / 'images'} "
        f"(as {names[0] if names else 'it names none'}); put the table where its paths start from"
    )


def _image_names(table: Path) -> list[str]:
    """Every image path of the table, once."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:  # -sig: Excel writes a byte-order mark
            reader = csv.DictReader(file, delimiter=SEPARATORS[table.suffix.lower()])
            columns = reader.fieldnames or []
            column = next((name for name in IMAGE_COLUMNS if name in columns), None)
            names = {row[column] for row in reader if row[column]} if column else set()
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a table: {error}") from error
    if column is None:
        raise UserError(
            f"{table} has no column of images (one of {', '.join(IMAGE_COLUMNS)}); its columns are {', '.join(columns)}"
        )
    return sorted(names)
