"""Any table with a column of images and one of captions -> rows for the shard writer, a block at a time."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from quiltnet.data.cells import KindOfColumn
from quiltnet.data.row_table import FACT, map_distinct, row_batch
from quiltnet.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLE_ENDINGS = (*SEPARATORS, ".parquet")

# Texts that mean "nothing here", as pandas reads them.
NULLS = [*pa.csv.ConvertOptions().null_values, "None", "<NA>"]

# A row must fit into a block; at this size lists of medical terms do, and a dozen blocks are no burden.
BLOCK_BYTES = 16 << 20
PARQUET_ROWS = 10_000

IDENTIFYING_BYTES = 1 << 20
TAIL_BYTES = 1 << 10


class TableSource:
    """Rows of a csv, tsv or parquet file; columns that are not named become metadata.

    Args:
        image_column: paths of images, relative to one folder or within zips.
        split_column: where rows say their split; without, all rows are of ``split``.
        source_column: what images were taken from (slide, case, article).
        source_of: image path -> source, for rows to which no ``source_column`` gives one; None where each image is its
            own source.
        list_columns: written out as Python lists.
        required: further columns that must be there.
        encoding: of a csv or tsv.

    Raises:
        UserError: the file cannot be read, or a column is not there; while it is read: a row is not whole, text is in
            another encoding, or captions are numbers.
    """

    def __init__(
        self,
        table: str | Path,
        *,
        image_column: str,
        caption_column: str,
        split_column: str | None = None,
        source_column: str | None = None,
        split: str = "train",
        source_of: Callable[[str], str] | None = None,
        list_columns: Sequence[str] = (),
        required: Sequence[str] = (),
        encoding: str = "utf-8",
    ) -> None:
        self._path, self._encoding = Path(table).expanduser(), encoding
        self.where, self.split_column = str(table), split_column or "split"
        self._image, self._caption, self._split_name, self._source = (
            image_column, caption_column, split_column, source_column,
        )  # fmt: skip
        self._split, self._source_of, self._lists = split, source_of or (lambda path: path), set(list_columns)
        self.kinds: dict[str, str] = {}
        self.findings: Counter[str] = Counter()
        self.columns, _ = open_table(self._path, encoding)
        named = [*required, image_column, caption_column, split_column, source_column]
        require_columns(self.columns, table, [column for column in named if column is not None])

    def identity(self) -> Any:
        columns = [self._image, self._caption, self._split_name, self._source, sorted(self._lists)]
        return [*file_identity(self._path), self._encoding, self._split, *columns]

    def batches(self, work: Path) -> Iterator[pa.RecordBatch]:
        _, raw = open_table(self._path, self._encoding)
        named = {self._image, self._caption, self._split_name, self._source}
        facts = [name for name in self.columns if name not in named and not name.startswith("Unnamed")]
        judges = {name: KindOfColumn() for name in (self._caption, *facts)}
        number = 0
        for batch in raw:
            for name, judge in judges.items():
                if pa.types.is_string(batch.schema.field(name).type):
                    judge.see(batch.column(name))
            yield self._batch(batch, facts, number)
            number += len(batch)
            self.kinds = {name: self._kind(batch, name, judges[name]) for name in facts}
            is_text = self._kind(batch, self._caption, judges[self._caption]) == "text"
        if number and not is_text:
            raise UserError(f"{self.where}: column {self._caption} holds no text; name the column of captions")

    def _kind(self, batch: pa.RecordBatch, name: str, judge: KindOfColumn) -> str:
        if not pa.types.is_string(batch.schema.field(name).type):
            return "native"
        return "list" if name in self._lists else judge.kind

    def _batch(self, batch: pa.RecordBatch, facts: Sequence[str], number: int) -> pa.RecordBatch:
        paths = as_text(batch.column(self._image))
        sources = map_distinct(paths, self._source_of)
        if self._source:
            sources = pc.coalesce(as_text(batch.column(self._source)), sources)
        split = pa.scalar(self._split)
        return row_batch(
            {
                "number": np.arange(number, number + len(batch)),
                "image_path": paths,
                "caption": as_text(batch.column(self._caption)),
                "split": as_text(batch.column(self._split_name)) if self._split_name else pa.repeat(split, len(batch)),
                "source_id": pc.fill_null(sources, ""),
                "defect": pa.repeat(pa.scalar(""), len(batch)),
            },
            {f"{FACT}{name}": batch.column(name) for name in facts},
        )


def open_table(table: str | Path, encoding: str = "utf-8") -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """Column names and batches of a csv or tsv, whose cells are all text or null, or of a parquet file.

    Raises:
        UserError: it cannot be read; also while iterating.
    """
    path = Path(table).expanduser()
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: there is no such table; give the path of a csv, tsv or parquet file")
    if kind not in TABLE_ENDINGS:
        raise UserError(f"{path}: tables are read by their ending, one of {', '.join(TABLE_ENDINGS)}; rename it")
    try:
        opened = pa.parquet.ParquetFile(path) if kind == ".parquet" else _open_csv(path, SEPARATORS[kind], encoding)
    except (ValueError, OSError, LookupError) as error:
        raise _unreadable(path, encoding, error) from error
    schema = opened.schema_arrow if kind == ".parquet" else opened.schema
    names = _distinct(schema.names)
    batches = _named(opened.iter_batches(PARQUET_ROWS) if kind == ".parquet" else opened, names, path, encoding)
    return names, batches if kind == ".parquet" else _closed(batches, path)


def require_columns(names: Sequence[str], table: str | Path, required: Sequence[str]) -> None:
    missing = [column for column in dict.fromkeys(required) if column not in names]
    if missing:
        hint = "; columns are told apart by commas in a .csv, by tabs in a .tsv" if len(names) == 1 else ""
        if len(names) == 1 and ";" in names[0]:
            hint += "; this one has semicolons, as Excel writes where a comma is the decimal sign: save it with commas"
        raise UserError(f"{table} has no column {', '.join(missing)}; its columns are {', '.join(names)}{hint}")


def file_identity(path: Path) -> list[Any]:
    """What tells a file from another, or from itself before a change: name, size, time, and its two ends."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        ends = hashlib.blake2b(file.read(IDENTIFYING_BYTES), digest_size=16)
        file.seek(max(status.st_size - IDENTIFYING_BYTES, 0))
        ends.update(file.read(IDENTIFYING_BYTES))
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, ends.hexdigest()]


def as_text(column: pa.Array) -> pa.Array:
    """A column as text; numbers are written out, and what has no such form is null."""
    if pa.types.is_string(column.type):
        return column
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(column), pa.string())


def _open_csv(path: Path, separator: str, encoding: str) -> pa.csv.CSVStreamingReader:
    def opened(**options: Any) -> pa.csv.CSVStreamingReader:
        return pa.csv.open_csv(
            path,
            # One thread: read ahead on 64 cores would hold 64 blocks.
            read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES, encoding=encoding, use_threads=False),
            parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(null_values=NULLS, strings_can_be_null=True, **options),
        )

    names = opened().schema.names
    return opened(column_types=dict.fromkeys(names, pa.string()))


def _named(batches: Iterator[pa.RecordBatch], names: list[str], path: Path, encoding: str) -> Iterator[pa.RecordBatch]:
    try:
        for batch in batches:
            yield _plain_text(batch.rename_columns(names))
    except (pa.ArrowException, UnicodeError, OSError) as error:
        raise _unreadable(path, encoding, error) from error


def _closed(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[pa.RecordBatch]:
    """Arrow closes a quote that is open at the end of the file: all rows behind it would be the text of one cell."""
    cell = None
    for batch in batches:
        cell = batch.column(batch.num_columns - 1)[-1].as_py() if len(batch) else cell
        yield batch
    if cell is None or "\n" not in cell:
        return
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        end = file.read().replace(b"\0", b"").rstrip()  # the zeros are those of UTF-16
    if not end.endswith(b'"'):
        raise UserError(
            f"{path}: a quote is not closed, and the rows behind it were read as its text, which begins with "
            f"{cell[:40]!r}; close it, and write a quote within a text twice"
        )


def _plain_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Text in parquet files has several types; one is enough."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        is_text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_string(kind)
        columns[name] = column.cast(pa.string()) if is_text else column
    return pa.RecordBatch.from_pydict(columns)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names as pandas makes them: a column without one, as an index is written, and a repeated one get a number."""
    seen: Counter[str] = Counter()
    distinct = []
    for place, given in enumerate(names):
        name = given or f"Unnamed: {place}"
        distinct.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return distinct


def _unreadable(path: Path, encoding: str, error: Exception) -> UserError:
    if isinstance(error, LookupError):
        return UserError(f"{encoding} is no encoding; --encoding takes a name that Python knows, as utf-8 or latin-1")
    if isinstance(error, UnicodeError) or "invalid UTF8" in str(error):
        return UserError(
            f"{path} cannot be read as {encoding} text ({error}); "
            "say which encoding it has, as --encoding latin-1 or --encoding utf-16"
        )
    return UserError(f"{path} cannot be read as a table: {error}")
