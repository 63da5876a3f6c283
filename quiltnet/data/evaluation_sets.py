"""Evaluation sets that training data is compared with: folders of images, tables of labels, shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from quiltnet.data.examining import Portion
from quiltnet.data.image_files import walk_files
from quiltnet.data.manifest import MANIFEST_NAME, TAR_ENDINGS, tars_in
from quiltnet.data.shard_sets import SetShard, find_shard_set
from quiltnet.data.stored_pairs import IMAGE_EXTENSIONS
from quiltnet.data.tables import TABLE_ENDINGS, as_text, open_table
from quiltnet.errors import UserError

IMAGE_COLUMNS = ("image_path", "image", "file", "filename", "file_name", "path")

_FILES_AT_ONCE = 500


def evaluation_portions(place: str, group: str) -> list[Portion]:
    """What ``--against`` names, in portions of ``group``.

    Args:
        place: a folder of images at any depth; a csv, tsv or parquet table of labels with a column of image paths,
            which start from its folder or from ``images`` in it; a shard set, a folder of tars, or a tar.

    Raises:
        UserError: nothing is there, or a table names images that do not exist.
    """
    path = Path(os.path.abspath(Path(place).expanduser()))
    if path.is_file() and path.suffix.lower() in TABLE_ENDINGS:
        return list(_portions(group, _images_of_table(path)))
    if not path.exists():
        raise UserError(f"--against {place}: there is nothing; give a folder of images, a table of labels, or shards")
    if path.is_file() and not path.name.endswith(TAR_ENDINGS):
        raise UserError(
            f"--against {place} is no table ({', '.join(TABLE_ENDINGS)}) and no .tar; give one of them, or a folder"
        )
    holds_shards = path.is_file() or (path / MANIFEST_NAME).is_file() or tars_in(path)
    files = [] if holds_shards else [file for file in _files_below(path) if file.suffix.lower()[1:] in IMAGE_EXTENSIONS]
    if files:
        return list(_portions(group, files))
    return [Portion(group, shard.path, shard.entry) for shard in _shards(place)]


def _shards(place: str) -> list[SetShard]:
    try:
        return find_shard_set(place).shards
    except UserError as error:
        raise UserError(
            f"--against {place} holds no images ({', '.join(IMAGE_EXTENSIONS)}) and no shards; "
            "give a folder of images, a table of labels, or shards"
        ) from error


def _files_below(folder: Path) -> Iterator[Path]:
    return (Path(place, name) for place, names in walk_files(folder) for name in names)


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
    columns, batches = open_table(table)
    column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if column is None:
        raise UserError(
            f"{table} has no column of images (one of {', '.join(IMAGE_COLUMNS)}); its columns are {', '.join(columns)}"
        )
    return sorted({name for batch in batches for name in as_text(batch.column(column)).to_pylist() if name})
