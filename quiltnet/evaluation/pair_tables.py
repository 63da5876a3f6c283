"""Image-caption pairs in files: a table of one's own, or ARCH as it is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from quiltnet.errors import UserError
from quiltnet.evaluation.image_files import existing_images, is_image, relative_names
from quiltnet.evaluation.label_table import read_columns
from quiltnet.evaluation.labelled_set import SPLITS, UNREADABLE, Split, read_rgb

ArchPart = Literal["books", "pubmed"]


@dataclass(frozen=True, eq=False)
class FilePairs:
    """Image files with their captions; ``[i]`` is (RGB image, captions, image id).

    Args:
        images: N paths.
        captions: N lists.
        image_ids: N different names that hold wherever the set lies.
        split: what the pairs may be used for: nothing may be chosen on ``test``.
        origin: where they come from and what was left out, for the record of a result.
    """

    images: list[Path]
    captions: list[list[str]]
    image_ids: list[str]
    split: Split = "test"
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.captions) == len(set(self.image_ids))
        if self.split not in SPLITS:
            raise UserError(f"split={self.split!r} of the pairs must be one of {', '.join(SPLITS)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str], str]:
        """RGB image, captions, image id.

        Raises:
            UserError: the file is no readable image. A measurement on fewer images is another measurement.
        """
        try:
            image = read_rgb(self.images[index])
        except UNREADABLE as error:
            raise UserError(
                f"cannot read {self.images[index]} ({error}); images to measure on are never left out silently: "
                "repair it, or take it out of the set"
            ) from error
        return image, self.captions[index], self.image_ids[index]

    def content(self) -> list[str]:
        """Lines that differ where the pairs do: a file's name, size and time, its captions and its id."""
        lines = []
        for image, captions, image_id in zip(self.images, self.captions, self.image_ids, strict=True):
            status = image.stat()
            lines.append(repr((str(image), status.st_size, status.st_mtime_ns, captions, image_id)))
        return lines

    def describe(self) -> dict[str, Any]:
        """What a reader of a result has to know of the pairs; JSON types only."""
        lines = map(repr, zip(self.image_ids, self.captions, strict=True))
        return {**self.origin, "images": len(self), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def table_pairs(
    table: str | Path,
    images: str | Path,
    *,
    image_column: str = "image_path",
    caption_column: str = "caption",
    id_column: str | None = None,
    split: Split = "test",
) -> FilePairs:
    """A table with a pair a row: csv, tsv or parquet, by its ending. Rows of one image become one, with their captions.

    These are the columns of QuiltNet's table of ARCH, too (``ArchCsvDataset``); its ``ids`` number the rows.

    Args:
        table: with a header, UTF-8.
        images: folder that the image column's paths start from.
        id_column: what tells images apart; their paths where it is not given.
        split: what the pairs may be used for.

    Raises:
        UserError: no such file or column, no row, an empty cell, a missing image, one id for two images.
    """
    id_column = id_column or image_column
    cells = read_columns(table, list(dict.fromkeys([image_column, caption_column, id_column])))
    names = relative_names(cells[image_column], table)
    # Without ids an image is its path, in one spelling.
    image_ids = names if id_column == image_column else cells[id_column]
    paths = existing_images(images, names, table)
    pairs = list(zip(paths, cells[caption_column], image_ids, strict=True))
    return _merged(pairs, split, {"table": str(table), "rows": len(pairs)})


def arch_pairs(
    root: str | Path,
    parts: Iterable[ArchPart] = get_args(ArchPart),
    split: Split = "test",
    max_missing_fraction: float = 0.01,
) -> FilePairs:
    """ARCH (Gamper & Rajpoot 2021, arXiv:2103.05121) as Warwick's two archives unpack it.

    ``books_set`` and ``pubmed_set`` each hold ``captions.json``, number -> {caption, uuid, ...}, and ``images``,
    files uuid.png or uuid.jpg. 35 of 4,305 captions of the books come without an image; they are left out and counted
    in ``describe``. Images of one figure share its caption. Papers measure different parts of ARCH: say which.

    Args:
        root: the folder of the two.
        parts: ``books``, ``pubmed`` or both.
        max_missing_fraction: of all captions; more without an image are an error.

    Raises:
        UserError: a part that is not there, or too many captions without an image.
    """
    parts = [parts] if isinstance(parts, str) else list(parts)
    if not parts or set(parts) - set(get_args(ArchPart)):
        raise UserError(f"parts={parts}: give one or both of {', '.join(get_args(ArchPart))}")
    pairs, imageless = [], []
    for part in parts:
        for image, caption, image_id in _arch_captions(Path(root), part):
            if image is None:
                imageless.append(image_id)
            else:
                pairs.append((image, caption, image_id))
    total = len(pairs) + len(imageless)
    if len(imageless) > max_missing_fraction * total:
        raise UserError(
            f"{len(imageless)} of {total} captions of {root} have no image (first: {imageless[0]}), more than "
            f"max_missing_fraction={max_missing_fraction}; unpack the archives again"
        )
    origin = {"root": str(root), "parts": parts, "captions": total, "captions_without_image": len(imageless)}
    return _merged(pairs, split, origin)


def _arch_captions(root: Path, part: str) -> Iterator[tuple[Path | None, str, str]]:
    """(image, caption, id) of all captions."""
    folder = root / f"{part}_set"
    if not (folder / "captions.json").is_file() or not (folder / "images").is_dir():
        raise UserError(
            f"{folder} does not hold captions.json and images; unpack {part}_set.zip "
            f"(warwick.ac.uk/fac/cross_fac/tia/data/arch) in {root}"
        )
    image_of = {path.stem: path for path in sorted((folder / "images").iterdir()) if is_image(path.name)}
    for entry in json.loads((folder / "captions.json").read_text(encoding="utf-8")).values():
        yield image_of.get(entry["uuid"]), entry["caption"], f"{part}/{entry['uuid']}"


def _merged(pairs: list[tuple[Path, str, str]], split: Split, origin: dict[str, Any]) -> FilePairs:
    """Of (image, caption, id) rows, each image once with its different captions, in their order."""
    image_of: dict[str, Path] = {}
    captions_of: dict[str, dict[str, None]] = {}
    for image, caption, image_id in pairs:
        if image_of.setdefault(image_id, image) != image:
            raise UserError(
                f"id {image_id!r} is given to {image_of[image_id]} and to {image}; give each image its own, or leave "
                "id_column out"
            )
        captions_of.setdefault(image_id, {})[caption] = None
    return FilePairs(list(image_of.values()), [list(of) for of in captions_of.values()], list(image_of), split, origin)
