"""Any table with a column of images and one of captions -> rows for the shard writer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from quiltnet.data.pairs import PairRow
from quiltnet.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def table_rows(
    table: str | Path,
    *,
    image_column: str,
    caption_column: str,
    split_column: str | None = None,
    source_column: str | None = None,
    split: str | None = None,
) -> Iterator[PairRow]:
    """Rows of a csv, tsv or parquet file; every other column becomes metadata.

    Args:
        image_column: paths of images, relative to one folder.
        split_column: where rows say their split.
        split: with ``split_column``, choose its rows; without, all rows are of this split (``train``).
        source_column: what images were taken from (slide, case, article), None where each is its own.

    Raises:
        UserError: the file cannot be read, a column is not there, or a row has no split.
    """
    named = [image_column, caption_column, split_column, source_column]
    required = [column for column in named if column is not None]
    frame = read_table(table, text_columns=[c for c in required if c != caption_column])
    require_columns(frame, table, required)
    if split_column:
        frame = select_rows(frame, table, split_column, split)
    splits = require_text(frame, table, split_column) if split_column else [split or "train"] * len(frame)
    paths = text_column(frame, image_column)
    sources = text_column(frame, source_column) if source_column else paths
    captions = text_column(frame, caption_column)
    metadata = plain_records(frame.drop(columns=list(dict.fromkeys(required))))
    columns = zip(frame.index, paths, captions, splits, sources, metadata, strict=True)
    return (
        PairRow(int(number), path, caption, of_split, source or path or "", facts)
        for number, path, caption, of_split, source, facts in columns
    )


def read_table(table: str | Path, *, text_columns: Sequence[str]) -> pd.DataFrame:
    """A csv, tsv or parquet file as pandas reads it; ``text_columns`` stay text (007 is not 7)."""
    path = Path(table).expanduser()
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: there is no such table; give the path of a csv, tsv or parquet file")
    if kind not in (*SEPARATORS, ".parquet"):
        raise UserError(f"{path}: tables are read by their ending, one of .csv, .tsv and .parquet; rename it")
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        # low_memory=False: types are judged on whole columns, not on a chunk of rows at a time.
        types = dict.fromkeys(text_columns, str)
        return pd.read_csv(path, sep=SEPARATORS[kind], dtype=types, low_memory=False)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parsing errors are ValueErrors
        raise UserError(f"{path} cannot be read as a table: {error}") from error


def require_columns(frame: pd.DataFrame, table: str | Path, required: Sequence[str]) -> None:
    missing = [column for column in required if column not in frame.columns]
    if missing:
        raise UserError(f"{table} has no column {', '.join(missing)}; its columns are {', '.join(frame.columns)}")


def text_column(frame: pd.DataFrame, column: str) -> list[str | None]:
    """Values of a column; None for what is null or not text."""
    return [value if isinstance(value, str) else None for value in frame[column]]


def select_rows(
    frame: pd.DataFrame, table: str | Path, column: str, wanted: str | Sequence[str] | None
) -> pd.DataFrame:
    """Rows whose ``column`` is one of ``wanted`` (all for None); UserError for one that no row has."""
    if wanted is None:
        return frame
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    present = frame[column].dropna().unique()
    unknown = [name for name in names if name not in present]
    if unknown:
        raise UserError(f"{table} has no {column} {', '.join(unknown)}; it has {', '.join(sorted(present))}")
    return frame[frame[column].isin(names)]


def require_text(frame: pd.DataFrame, table: str | Path, column: str) -> list[str]:
    values = text_column(frame, column)
    if None in values:
        number = frame.index[values.index(None)]
        raise UserError(f"{table}: row {number} has no {column}; fill it in, every row needs one")
    return values


def plain_records(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows as dicts of JSON values."""
    if frame.columns.empty:
        return ({} for _ in range(len(frame)))
    names = [str(column) for column in frame.columns]
    columns = (map(plain_value, frame[column]) for column in frame.columns)
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def plain_value(value: Any) -> Any:
    """A table's cell as JSON has it; null, not-a-number and infinity become None."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain_value(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if pd.isna(value) else str(value)
