"""The images that ``quiltnet embed`` is given: a folder, a table, shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image
from torch.utils.data import Dataset

from quiltnet.data.decoding import BrokenSample, decode_pil
from quiltnet.data.evaluation_sets import IMAGE_COLUMNS
from quiltnet.data.image_files import IMAGE_ENDINGS, walk_files
from quiltnet.data.manifest import MANIFEST_NAME, tars_in
from quiltnet.data.shard_files import resolve_shards
from quiltnet.data.stored_pairs import StoredPairs
from quiltnet.data.tables import TABLE_ENDINGS, as_text, open_table, require_columns
from quiltnet.errors import UserError

_REMEDY = "no image is left out silently: repair it, or take it out"


class ImageFiles(Dataset):
    """``[i]`` is (RGB image,).

    Args:
        files: N.
        ids: N, what the files are called in a result.
    """

    def __init__(self, files: Sequence[Path], ids: Sequence[str]) -> None:
        self.files = files
        self.ids = ids

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image]:
        try:
            return (decode_pil(self.files[index].read_bytes()),)
        except (BrokenSample, OSError) as error:
            raise UserError(f"cannot read {self.files[index]} ({error}); {_REMEDY}") from error

    def content(self) -> list[str]:
        """A line a file: its place, size and time."""
        statuses = (file.stat() for file in self.files)
        return [f"{file} {s.st_size} {s.st_mtime_ns}" for file, s in zip(self.files, statuses, strict=True)]

    def sha256(self) -> str:
        """Of ids and sizes: the same wherever the files lie."""
        lines = (f"{name} {file.stat().st_size}\n" for name, file in zip(self.ids, self.files, strict=True))
        return hashlib.sha256("".join(lines).encode("utf-8", "backslashreplace")).hexdigest()


class ShardImages(Dataset):
    """``[i]`` is (RGB image,) of all samples of local shards, in shard order; ids are ``tar/key``.

    Raises:
        UserError: there are no such shards, or they hold fewer samples than their manifest says.
    """

    def __init__(self, shards: str) -> None:
        self._pairs = StoredPairs(resolve_shards(shards))
        if self._pairs.missing:
            raise UserError(f"shards lack samples that their manifest lists ({self._pairs.missing}); bring them back")
        self.ids = [f"{Path(self._pairs.shard_of(i)).stem}/{self._pairs.key(i)}" for i in range(len(self._pairs))]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image]:
        try:
            return (decode_pil(self._pairs[index].image),)
        except BrokenSample as error:
            raise UserError(f"cannot read {self.ids[index]} ({error.reason}); {_REMEDY}") from error

    def content(self) -> list[str]:
        """What tells each tar from another."""
        return [f"{shard.path} {of}" for shard, of in zip(self._pairs.shards, self._pairs.identities, strict=True)]

    def sha256(self) -> str:
        """Of ids and of what tells each tar from another."""
        lines = [*self._pairs.identities, *self.ids]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def find_embed_images(
    data: str, image_column: str | None = None, images: Path | None = None
) -> ImageFiles | ShardImages:
    """What a user names, whatever it is.

    Args:
        data: a folder of images at any depth; a csv, tsv or parquet table with a column of images; a folder of shards,
            a tar, or a brace pattern of tars.
        image_column: of a table; by default the first that is called as such columns usually are.
        images: the folder that paths of a table start from; the table's own by default.

    Raises:
        UserError: nothing is there, or files that a table names are missing.
    """
    path = Path(os.path.abspath(Path(data).expanduser()))
    if path.suffix.lower() in TABLE_ENDINGS:
        return _images_of_table(path, image_column, path.parent if images is None else images.expanduser())
    if image_column is not None or images is not None:
        raise UserError(f"--image-column and --images are for a table ({', '.join(TABLE_ENDINGS)}), not for {data}")
    if not path.exists() and not any(sign in data for sign in "{:"):  # no brace pattern and no address
        raise UserError(
            f"{data} does not exist; give a folder of images, a table ({', '.join(TABLE_ENDINGS)}) or shards"
        )
    if not path.is_dir() or (path / MANIFEST_NAME).is_file() or tars_in(path):
        return ShardImages(data)
    found = (Path(place, name).relative_to(path).as_posix() for place, names in walk_files(path) for name in names)
    names = sorted(name for name in found if _is_image(name))
    if not names:
        raise UserError(
            f"{data} holds no images ({', '.join(IMAGE_ENDINGS)}) and no shards; give a folder of images, a table "
            f"({', '.join(TABLE_ENDINGS)}) or shards"
        )
    return ImageFiles([path / name for name in names], names)


def _is_image(name: str) -> bool:
    is_hidden = name.rpartition("/")[2].startswith(".")
    return name.rpartition(".")[2].lower() in IMAGE_ENDINGS and not is_hidden


def _images_of_table(table: Path, image_column: str | None, root: Path) -> ImageFiles:
    """A row of features for each row of the table."""
    columns, batches = open_table(table)
    column = image_column or next((name for name in IMAGE_COLUMNS if name in columns), None)
    if column is None:
        raise UserError(f"{table} has no column of a usual name; say --image-column, one of {', '.join(columns)}")
    require_columns(columns, table, [column])
    ids = [name for batch in batches for name in as_text(batch.column(column)).to_pylist()]
    if not ids:
        raise UserError(f"{table} has no rows; give a table that names images")
    empty = next((row for row, name in enumerate(ids, start=1) if not name), None)
    if empty is not None:
        raise UserError(f"row {empty} of {table} names no image in column {column}; take such rows out")
    unsafe = next((name for name in ids if name.startswith("/") or ".." in PurePosixPath(name).parts), None)
    if unsafe is not None:
        raise UserError(f"{table} names {unsafe}; image paths start from {root}, and stay below it")
    files = [root / name for name in ids]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(files):,} images that {table} names do not exist, such as {missing[0]}; "
            "say --images, the folder that its paths start from"
        )
    return ImageFiles(files, ids)
