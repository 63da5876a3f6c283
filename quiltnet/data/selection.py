"""Which rows are packed: by what a column says, by the length of captions, by a list of images to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quiltnet.data.pairs import hash_code, plain_path
from quiltnet.data.row_table import FACT
from quiltnet.data.tables import TABLE_ENDINGS, as_text, file_identity, open_table, require_columns
from quiltnet.errors import UserError


@dataclass
class OneOf:
    """Keeps rows whose ``column`` is one of ``wanted``; numbers are compared as numbers (1 is 1.0).

    label: what messages call the column.
    """

    reason: str
    column: str
    wanted: Sequence[str]
    label: str = ""
    _seen: set[str] = field(default_factory=set)

    def keep(self, batch: pa.RecordBatch) -> np.ndarray:
        cells = _column(batch, self.column).dictionary_encode()
        values = [_plain_number(cell) for cell in cells.dictionary.to_pylist()]
        self._seen.update(values)
        allowed = {_plain_number(value.strip()) for value in self.wanted}
        return _spread(np.array([value in allowed for value in values], bool), cells)

    def check(self, where: str) -> None:
        unknown = [value for value in self.wanted if _plain_number(value.strip()) not in self._seen]
        if unknown:
            there = ", ".join(sorted(self._seen)) or "none"
            raise UserError(f"{where} has no {self.label or self.column} {', '.join(unknown)}; it has {there}")

    def identity(self) -> Any:
        return [self.reason, self.column, list(self.wanted)]


@dataclass
class NotFlagged:
    """Drops rows whose ``column`` is 1 or true."""

    reason: str
    column: str

    def keep(self, batch: pa.RecordBatch) -> np.ndarray:
        cells = _column(batch, self.column).dictionary_encode()
        flagged = [_plain_number(cell).lower() in ("1", "true") for cell in cells.dictionary.to_pylist()]
        return ~_spread(np.array(flagged, bool), cells)

    def check(self, where: str) -> None:
        """A table in which no row is flagged is as it should be."""

    def identity(self) -> Any:
        return [self.reason, self.column]


@dataclass
class CaptionWords:
    """Keeps captions of ``least`` to ``most`` words; rows without one are left to be rejected as such."""

    least: int | None = None
    most: int | None = None
    reason: str = "filtered_words"
    _longest: int = 0
    _shortest: int | None = None

    def __post_init__(self) -> None:
        if self.least is not None and self.most is not None and self.least > self.most:
            raise UserError(f"--min-words {self.least} is more than --max-words {self.most}; no caption is both")

    def keep(self, batch: pa.RecordBatch) -> np.ndarray:
        captions = batch.column("caption").to_pylist()
        words = np.array([len(caption.split()) if caption else 0 for caption in captions], np.int64)
        is_given = words > 0
        if is_given.any():
            shortest = int(words[is_given].min())
            self._shortest = shortest if self._shortest is None else min(self._shortest, shortest)
            self._longest = max(self._longest, int(words.max()))
        too_short = words < (self.least or 0)
        too_long = words > (self.most if self.most is not None else np.iinfo(np.int64).max)
        return ~is_given | ~(too_short | too_long)

    def check(self, where: str) -> None:
        shortest = self._shortest or 0
        if (self.least or 0) > self._longest or (self.most is not None and self.most < shortest):
            raise UserError(
                f"{where} has no caption of {self.least or 0} to {self.most or 'any number of'} words; "
                f"its captions have {shortest} to {self._longest}"
            )

    def identity(self) -> Any:
        return [self.reason, self.least, self.most]


class KeepList:
    """Keeps images that a file lists.

    Args:
        path: one image path a line; or a csv, tsv or parquet file with a column of image paths and, if ``score_column``
            is given, only those whose score is at least ``least`` and below ``most``: a threshold cuts a list into two
            parts that share nothing.

    Raises:
        UserError: it cannot be read, lacks a column, or lists nothing.
    """

    reason = "filtered_keep_list"

    def __init__(
        self,
        path: str | Path,
        *,
        image_column: str = "image_path",
        score_column: str | None = None,
        least: float | None = None,
        most: float | None = None,
        encoding: str = "utf-8",
    ) -> None:
        self._path = Path(path).expanduser()
        if not self._path.is_file():
            raise UserError(f"{path}: there is no such list; give a file of one image path a line, or a csv")
        if score_column is None and (least is not None or most is not None):
            raise UserError("--keep-min and --keep-max compare a score; say which column holds it with --keep-column")
        self._rule = (image_column, score_column, least, most)
        is_table = self._path.suffix.lower() in TABLE_ENDINGS
        if score_column is not None and not is_table:
            raise UserError(f"{path} is a plain list; --keep-column needs a csv, tsv or parquet file")
        listed = self._scored(encoding) if is_table else self._lines(encoding)
        self._codes = np.unique(np.fromiter((hash_code(plain_path(path)) for path in listed if path), np.uint64))
        self._is_met = False
        if not len(self._codes):
            raise UserError(f"{path} lists no image to keep; check its column of images and the threshold")

    def keep(self, batch: pa.RecordBatch) -> np.ndarray:
        paths = batch.column("image_path").dictionary_encode()
        codes = np.fromiter((hash_code(plain_path(path)) for path in paths.dictionary.to_pylist()), np.uint64)
        kept = _spread(np.isin(codes, self._codes), paths)
        self._is_met |= bool(kept.any())
        return kept

    def check(self, where: str) -> None:
        if not self._is_met:
            raise UserError(f"{self._path} lists no image of {where}; its paths must be those that the rows have")

    def identity(self) -> Any:
        return [self.reason, *self._rule, *file_identity(self._path)]

    def _lines(self, encoding: str) -> Iterator[str]:
        try:
            # Notepad writes a byte-order mark, which would be part of the first name.
            with open(self._path, encoding="utf-8-sig" if encoding == "utf-8" else encoding) as file:
                yield from (line.strip() for line in file)
        except (UnicodeError, LookupError) as error:
            raise UserError(f"{self._path} cannot be read as {encoding} text ({error}); see --encoding") from error

    def _scored(self, encoding: str) -> Iterator[str | None]:
        image_column, score_column, least, most = self._rule
        names, batches = open_table(self._path, encoding)
        require_columns(names, self._path, [image_column, *([score_column] if score_column else [])])
        for batch in batches:
            paths = as_text(batch.column(image_column)).to_pylist()
            if score_column is None:
                yield from paths
                continue
            scores = np.array([_number(cell) for cell in as_text(batch.column(score_column)).to_pylist()])
            passed = ~np.isnan(scores)
            passed &= scores >= least if least is not None else True
            passed &= scores < most if most is not None else True
            yield from (path for path, passes in zip(paths, passed, strict=True) if passes)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    # The split of a row may come from another column than the one that a table calls so.
    found = next((column for column in (name, f"{FACT}{name}") if column in batch.schema.names), None)
    if found is None:
        there = ", ".join(column.removeprefix(FACT) for column in batch.schema.names if column != "defect")
        raise UserError(f"there is no column {name} to choose rows by; there are {there}")
    return as_text(batch.column(found))


def _spread(of_values: np.ndarray, cells: pa.DictionaryArray) -> np.ndarray:
    """What holds of the distinct values of a column, for each of its rows; null is False."""
    places = cells.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.append(of_values, False)[places]


def _number(cell: str | None) -> float:
    try:
        return float(cell) if cell is not None else np.nan
    except ValueError:
        return np.nan


def _plain_number(cell: str) -> str:
    number = _number(cell)
    return cell if np.isnan(number) else str(int(number) if number.is_integer() else number)
