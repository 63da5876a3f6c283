"""Tables of labels: csv, tsv or parquet files, each cell as text."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from quiltnet.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*SEPARATORS, ".parquet")


def read_columns(table: str | Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """column -> its cells in the order of rows, as text without spaces around it, none of them empty.

    Args:
        table: csv or tsv (UTF-8, with or without a byte-order mark, any line ends) with a header; parquet.

    Raises:
        UserError: no such file, or one that cannot be read as a table; a column that is not there, or there twice; no
            row; an empty cell.
    """
    path = Path(table)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"{table}: tables are read by their ending, one of {', '.join(TABLE_SUFFIXES)}; rename it")
    if not path.is_file():
        raise UserError(f"{table} is not a file; give the table of labels")
    cells = _parquet_columns(path, columns) if path.suffix.lower() == ".parquet" else _csv_columns(path, columns)
    for column, values in cells.items():
        if not values:
            raise UserError(f"{table} has no row; give a table with a row for each image")
        empty = [number for number, value in enumerate(values, start=1) if not value]
        if empty:
            raise UserError(f"{len(empty)} rows of {table} have no {column} (first: row {empty[0]}); fill them in")
    return cells


def _csv_columns(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    try:
        # -sig: Excel writes a byte-order mark. strict: a quote left open would swallow all rows behind it.
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=SEPARATORS[path.suffix.lower()], strict=True)
            header = [name.strip() for name in next(reader, [])]
            places = _places(path, columns, header)
            rows = []
            for row in filter(None, reader):  # a blank line is no row
                if len(row) != len(header):
                    raise UserError(
                        f"line {reader.line_num} of {path} has {len(row)} cells, its header {len(header)}; put text "
                        "that holds the separator in quotes"
                    )
                rows.append([row[place].strip() for place in places])
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}); save it as UTF-8, each quote closed") from error
    return {column: [row[place] for row in rows] for place, column in enumerate(columns)}


def _parquet_columns(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _places(path, columns, file.schema_arrow.names)
            read = file.read(columns=list(dict.fromkeys(columns)))
        texts = {column: read.column(column).cast(pa.string()).fill_null("") for column in columns}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}); columns are text or numbers") from error
    return {column: [cell.strip() for cell in cells.to_pylist()] for column, cells in texts.items()}


def _places(path: Path, columns: Sequence[str], header: Sequence[str]) -> list[int]:
    for column in columns:
        if header.count(column) != 1:
            is_one_cell = len(header) == 1 and path.suffix.lower() in SEPARATORS
            hint = "; columns are told apart by commas in a .csv, by tabs in a .tsv" if is_one_cell else ""
            fault = "several columns" if column in header else "no column"
            raise UserError(f"{path} has {fault} {column!r}; its columns are {', '.join(header)}{hint}")
    return [header.index(column) for column in columns]
