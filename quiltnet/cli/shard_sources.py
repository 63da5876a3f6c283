"""The options of ``quiltnet shard`` -> rows, images and filters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quiltnet.errors import UserError

if TYPE_CHECKING:
    from quiltnet.data.image_files import Images
    from quiltnet.data.pairs import PairRow
    from quiltnet.data.row_table import Filter, RowSource


class Format(str, Enum):
    """What is packed."""

    quilt1m = "quilt1m"
    csv = "csv"
    folder = "folder"
    webdataset = "webdataset"
    synthetic = "synthetic"


class Layout(str, Enum):
    """What a sample is."""

    images = "images"
    rows = "rows"


STORED = ("quilt1m", "csv", "folder", "webdataset")

# Options that only some formats have; the others must leave them out.
FORMATS_OF = {
    "table": ("quilt1m", "csv"),
    "subset": ("quilt1m",),
    "magnification": ("quilt1m",),
    "drop_not_histology": ("quilt1m",),
    "image_column": ("csv",),
    "caption_column": ("csv",),
    "split_column": ("csv",),
    "source_column": ("csv",),
    "source_pattern": STORED,
    "images": STORED,
    "split": STORED,
    "samples": ("synthetic",),
    "size": ("synthetic",),
}
IMAGE_COLUMN, CAPTION_COLUMN, SPLIT_COLUMN = "image_path", "caption", "split"
SAMPLES, SIZE = 1000, 224  # drawn, where nothing is said


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; None where nothing was."""

    format: Format
    table: Path | None
    images: list[str] | None
    encoding: str
    subset: str | None
    split: str | None
    magnification: str | None
    drop_not_histology: bool
    min_words: int | None
    max_words: int | None
    keep_list: Path | None
    keep_column: str | None
    keep_min: float | None
    keep_max: float | None
    image_column: str | None
    caption_column: str | None
    split_column: str | None
    source_column: str | None
    source_pattern: str | None
    samples: int | None
    size: int | None
    seed: int

    @property
    def tiles(self) -> int:
        return SAMPLES if self.samples is None else self.samples

    @property
    def side(self) -> int:
        return SIZE if self.size is None else self.size

    def describe(self) -> dict[str, Any]:
        """For the manifest: what the pairs are, and what they were chosen by; names, not places."""
        if self.format is Format.synthetic:
            return {"format": "synthetic", "samples": self.tiles, "size": self.side, **self._choices()}
        images = [Path(name).name for name in self.images or ()]
        table = {"table": self.table.name} if self.table else {}
        return {"format": self.format.value, **table, "images": images, **self._choices()}

    def _choices(self) -> dict[str, Any]:
        names = (
            *("image_column", "caption_column", "split_column", "source_column", "source_pattern"),
            *("subset", "split", "magnification", "drop_not_histology", "min_words", "max_words"),
            *("keep_column", "keep_min", "keep_max"),
        )
        chosen = {name: getattr(self, name) for name in names if _is_given(getattr(self, name))}
        return {**chosen, **({"keep_list": self.keep_list.name} if self.keep_list else {})}


def check_request(request: Request, out: Path) -> None:
    """Raises UserError for an option that the format does not have, or lacks, and for a target among what is read."""
    kind = request.format.value
    for name, formats in FORMATS_OF.items():
        option, is_given = f"--{name.replace('_', '-')}", _is_given(getattr(request, name))
        if name == "image_column" and request.keep_list:
            continue
        if is_given and kind not in formats:
            raise UserError(f"{option} is for --format {' or '.join(formats)}; leave it out with --format {kind}")
        if name in ("table", "images") and not is_given and kind in formats:
            raise UserError(f"{option} is not given; --format {kind} needs it")
    for name in request.images or ():
        # What is written there would be found by the same command when it continues.
        if kind in ("folder", "webdataset") and Path(name).expanduser().resolve() in out.resolve().parents:
            raise UserError(f"--out {out} lies in --images {name}; give a folder elsewhere")


def with_split_column(request: Request) -> Request:
    """With a csv's column ``split`` where none was named: to leave it aside would train on what it holds out."""
    from quiltnet.data.tables import open_table

    if request.format is not Format.csv or request.split_column is not None:
        return request
    columns, _ = open_table(request.table, request.encoding)
    return replace(request, split_column=SPLIT_COLUMN) if SPLIT_COLUMN in columns else request


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def open_source(request: Request, drawn: Path) -> tuple[RowSource, Images, list[Filter]]:
    """Rows, their images, and what chooses among the rows. drawn: an empty folder for tiles."""
    from quiltnet.data.source_pattern import SourcePattern

    pattern = SourcePattern(request.source_pattern) if request.source_pattern is not None else None
    rows, images = _open(request, drawn, pattern)
    return rows, images, [*_filters(request), *([pattern] if pattern else [])]


def _open(request: Request, drawn: Path, source_of: Callable[[str], str] | None) -> tuple[RowSource, Images]:
    from quiltnet.data.folders import folder_source
    from quiltnet.data.image_files import ImageFolder, find_images
    from quiltnet.data.quilt1m import quilt1m_source
    from quiltnet.data.repacking import WebDatasetSource
    from quiltnet.data.row_table import ListedRows
    from quiltnet.data.tables import TableSource

    if request.format is Format.synthetic:
        return ListedRows(_draw_rows(request, drawn), where="the drawn tiles"), ImageFolder(drawn)
    if request.format is Format.folder:
        if len(request.images) > 1:
            raise UserError(f"--format folder takes one --images, not {len(request.images)}: the folder above all")
        rows = folder_source(request.images[0], split=request.split, source_of=source_of)
        return rows, ImageFolder(Path(request.images[0]).expanduser())
    if request.format is Format.webdataset:
        shards = WebDatasetSource(request.images, split=request.split, source_of=source_of)
        return shards, shards.images
    images = find_images(request.images)
    if request.format is Format.quilt1m:
        return quilt1m_source(request.table, source_of=source_of, encoding=request.encoding), images
    rows = TableSource(
        request.table,
        image_column=request.image_column or IMAGE_COLUMN,
        caption_column=request.caption_column or CAPTION_COLUMN,
        split_column=request.split_column,
        source_column=request.source_column,
        split="train" if request.split is None else request.split,
        source_of=source_of,
        encoding=request.encoding,
    )
    return rows, images


def _filters(request: Request) -> list[Filter]:
    """In the order in which they choose."""
    from quiltnet.data.selection import CaptionWords, KeepList, NotFlagged, OneOf

    filters: list[Filter] = []
    if request.subset is not None:
        filters.append(OneOf("filtered_subset", "subset", request.subset.split(",")))
    if request.split is not None and (request.format is Format.quilt1m or request.split_column):
        label = request.split_column or "split"
        filters.append(OneOf("filtered_split", "split", request.split.split(","), label))
    if request.magnification is not None:
        filters.append(OneOf("filtered_magnification", "magnification", request.magnification.split(",")))
    if request.drop_not_histology:
        filters.append(NotFlagged("filtered_not_histology", "not_histology"))
    if request.min_words is not None or request.max_words is not None:
        filters.append(CaptionWords(request.min_words, request.max_words))
    if request.keep_list:
        filters.append(
            KeepList(
                request.keep_list,
                image_column=request.image_column or IMAGE_COLUMN,
                score_column=request.keep_column,
                least=request.keep_min,
                most=request.keep_max,
                encoding=request.encoding,
            )
        )
    elif request.keep_column or request.keep_min is not None or request.keep_max is not None:
        raise UserError("--keep-column, --keep-min and --keep-max are about --keep-list, which is not given")
    return filters


def _draw_rows(request: Request, folder: Path) -> Iterator[PairRow]:
    """Draw tiles into ``folder``; the last tenth is the val split."""
    from quiltnet.data.pairs import PairRow
    from quiltnet.data.synthetic import draw_pairs

    numbers = count()
    for number, pair in enumerate(draw_pairs(request.tiles, request.side, request.seed)):
        path = f"{pair.name}.jpg"
        (folder / path).write_bytes(pair.jpeg())
        facts = {"synthetic": True, "pattern": pair.pattern, **asdict(pair.attributes)}
        split = "val" if number >= request.tiles - request.tiles // 10 else "train"
        for caption in pair.captions:
            yield PairRow(next(numbers), path, caption, split, pair.name, facts)
