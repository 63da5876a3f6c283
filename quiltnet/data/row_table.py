"""The rows of any source, kept on disk as an Arrow file that is mapped: a million of them take no memory.

A source yields Arrow batches of the columns below, and one column for each further fact of its rows; how the cells of
those become JSON values is known once all have been seen (``kinds``).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from quiltnet.data.cells import converted
from quiltnet.data.pairs import PairRow
from quiltnet.errors import UserError
from quiltnet.whole_files import write_whole

FIXED = {
    "number": pa.int64(),
    "image_path": pa.string(),
    "caption": pa.string(),
    "split": pa.string(),
    "source_id": pa.string(),
    "defect": pa.string(),
}
FACT = "fact:"  # before the name of every other column
RECORD = "facts"  # a column of JSON objects, whose fields are the facts

ROWS_NAME, SUMMARY_NAME = "rows.arrow", "rows.json"
LISTED_AT_ONCE = 10_000


class RowSource(Protocol):
    """Where rows come from.

    Attributes:
        where: its name in messages.
        split_column: what it calls the column of splits.
        kinds: of its facts, as ``cells.converter`` takes them; whole after the last batch.
        findings: what it met on the way and passed over, for the manifest.
    """

    where: str
    split_column: str
    kinds: dict[str, str]
    findings: Counter[str]

    def batches(self, work: Path) -> Iterator[pa.RecordBatch]:
        """The rows, in order. ``work``: a folder for what the images need to be found again."""

    def identity(self) -> Any:
        """JSON that differs for another source; None if that cannot be told, and work cannot be continued."""


class Filter(Protocol):
    """Chooses rows, and counts as ``reason`` those that it drops."""

    reason: str

    def keep(self, batch: pa.RecordBatch) -> np.ndarray:
        """(rows of the batch) bool."""

    def check(self, where: str) -> None:
        """After the last batch: UserError if it asks for what no row had."""

    def identity(self) -> Any:
        """JSON that differs for another choice."""


class ListedRows:
    """Rows that are given one by one, as a source."""

    def __init__(
        self, rows: Iterable[PairRow], *, where: str = "the rows", identity: Any = None, findings: Counter | None = None
    ) -> None:
        self.where, self.split_column = where, "split"
        self.kinds: dict[str, str] = {}
        self.findings = Counter() if findings is None else findings
        self._rows, self._identity = rows, identity

    def batches(self, work: Path) -> Iterator[pa.RecordBatch]:
        rows = iter(self._rows)
        while chunk := list(islice(rows, LISTED_AT_ONCE)):
            columns = {name: [getattr(row, name) for row in chunk] for name in FIXED}
            facts = [json.dumps(row.metadata, ensure_ascii=False) for row in chunk]
            yield row_batch(columns, {RECORD: text_array(facts)})

    def identity(self) -> Any:
        return self._identity


def row_batch(columns: Mapping[str, Any], facts: Mapping[str, pa.Array]) -> pa.RecordBatch:
    """columns: by the names of ``FIXED``, arrays or lists; facts: by names that begin with ``FACT``."""
    fixed = {}
    for name, kind in FIXED.items():
        column = columns[name]
        is_array = isinstance(column, pa.Array)
        fixed[name] = column if is_array else text_array(column) if kind == pa.string() else pa.array(column, kind)
    return pa.RecordBatch.from_pydict({**fixed, **facts})


def text_array(texts: Sequence[str | None]) -> pa.Array:
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON and file names may have it
        return pa.array([text and text.encode("utf-8", "replace").decode("utf-8") for text in texts], pa.string())


def map_distinct(column: pa.Array, function: Callable[[str], str | None]) -> pa.Array:
    """``function`` of every text in a column, called once for each different one; null stays null."""
    encoded = column.dictionary_encode()
    return text_array([function(text) for text in encoded.dictionary.to_pylist()]).take(encoded.indices)


def write_rows(
    source: RowSource, folder: Path, filters: Sequence[Filter], advance: Callable[[int], None] = lambda rows: None
) -> None:
    """Keep the rows that pass all ``filters`` in ``folder``, and beside them what was counted on the way.

    Raises:
        UserError: no row passes, a row that does has no split, or whatever the source or a filter finds wrong.
    """
    dropped: Counter[str] = Counter()
    rows = kept = 0
    unfinished = folder / f"{ROWS_NAME}.partial"
    writer = None
    with pa.OSFile(str(unfinished), "wb") as file:
        for batch in source.batches(folder):
            rows += len(batch)
            advance(len(batch))
            writer = writer or pa.ipc.new_file(file, batch.schema)
            for chooser in filters:
                chosen = chooser.keep(batch)
                dropped[chooser.reason] += len(batch) - int(chosen.sum())
                batch = batch if chosen.all() else batch.filter(pa.array(chosen))
            _require_splits(batch, source)
            kept += len(batch)
            if len(batch):
                writer.write_batch(batch)
        if writer is not None:
            writer.close()
    for chooser in filters:
        chooser.check(source.where)
    if not kept:
        counts = ", ".join(f"{reason} {number}" for reason, number in dropped.items() if number) or "nothing in it"
        raise UserError(f"{source.where} has no row to pack ({counts}); check it, and the filters asked for")
    summary = {"rows": rows, "dropped": dropped, "findings": source.findings, "kinds": source.kinds}
    os.replace(unfinished, folder / ROWS_NAME)
    # The summary comes last: with it the rows are whole.
    write_whole(folder / SUMMARY_NAME, json.dumps(summary))


def _require_splits(batch: pa.RecordBatch, source: RowSource) -> None:
    splits = batch.column("split")
    if splits.null_count:
        number = batch.column("number").filter(splits.is_null())[0].as_py()
        raise UserError(f"{source.where}: row {number} has no {source.split_column}; fill it in, every row needs one")


@dataclass(frozen=True)
class RowSummary:
    """rows: of the source; dropped: by the reason of a filter; findings: of the source."""

    rows: int
    dropped: dict[str, int]
    findings: dict[str, int]
    kinds: dict[str, str]


class RowTable:
    """The rows that ``write_rows`` kept in ``folder``, by position."""

    def __init__(self, folder: Path) -> None:
        self.summary = RowSummary(**json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8")))
        self.bytes = (folder / ROWS_NAME).stat().st_size
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS_NAME)))
        sizes = [len(batch) for batch in self.batches()]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batches(self) -> Iterator[pa.RecordBatch]:
        return map(self._reader.get_batch, range(self._reader.num_record_batches))

    def __iter__(self) -> Iterator[PairRow]:
        return (row for batch in self.batches() for row in self._rows(batch))

    def take(self, positions: np.ndarray) -> list[PairRow]:
        """Rows in the order of ``positions``, read from where they lie."""
        rows: list[PairRow | None] = [None] * len(positions)
        numbers = np.searchsorted(self._ends, positions, side="right")
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            batch = self._reader.get_batch(int(number))
            taken = batch.take(pa.array(positions[places] - (self._ends[number] - len(batch))))
            for place, row in zip(places, self._rows(taken), strict=True):
                rows[place] = row
        return rows

    def image_paths(self, positions: np.ndarray) -> list[str]:
        """Image paths of rows, in any order."""
        numbers = np.searchsorted(self._ends, positions, side="right")
        paths: list[str] = []
        for number in np.unique(numbers):
            batch = self._reader.get_batch(int(number))
            within = positions[numbers == number] - (self._ends[number] - len(batch))
            paths += batch.column("image_path").take(pa.array(within)).to_pylist()
        return paths

    def _rows(self, batch: pa.RecordBatch) -> Iterator[PairRow]:
        fixed = {name: batch.column(name).to_pylist() for name in FIXED}
        metadata = _facts(batch, self.summary.kinds)
        columns = (fixed[name] for name in ("number", "image_path", "caption", "split", "source_id"))
        return map(PairRow, *columns, metadata, fixed["defect"])


def _facts(batch: pa.RecordBatch, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    if RECORD in batch.schema.names:
        return [json.loads(record) for record in batch.column(RECORD).to_pylist()]
    names = [name for name in batch.schema.names if name.startswith(FACT)]
    if not names:
        return [{} for _ in range(len(batch))]
    columns = [converted(batch.column(name).to_pylist(), kinds[name.removeprefix(FACT)]) for name in names]
    plain = [name.removeprefix(FACT) for name in names]
    return [dict(zip(plain, values, strict=True)) for values in zip(*columns, strict=True)]
