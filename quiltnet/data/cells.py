"""A table's cells -> JSON values: which columns are numbers, and what a cell then says."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

# What a column of text may really be, told by all of its cells. A number with a leading zero is a name: 007 is not
# 7. Whole numbers of more than 18 digits do not fit 64 bits, and stay the text that they are.
PATTERNS = {
    "bool": r"^(True|TRUE|true|False|FALSE|false)$",
    "int": r"^\s*[+-]?(0|[1-9]\d{0,17})\s*$",
    "float": r"^\s*[+-]?((0|[1-9]\d{0,17})(\.\d*)?|\.\d+|[iI]nf(inity)?)([eE][+-]?\d+)?\s*$",
}


class KindOfColumn:
    """Judges a column of text over all its batches: ``bool``, ``int``, ``float``, or else ``text``."""

    def __init__(self) -> None:
        self._possible = list(PATTERNS)
        self._has_cells = False

    def see(self, cells: pa.Array) -> None:
        if self._possible and cells.null_count < len(cells):
            self._has_cells = True
            self._possible = [
                kind for kind in self._possible if pc.all(pc.match_substring_regex(cells, PATTERNS[kind])).as_py()
            ]

    @property
    def kind(self) -> str:
        return self._possible[0] if self._has_cells and self._possible else "text"


def converter(kind: str) -> Callable[[Any], Any]:
    """What turns a cell that is not null into its JSON value."""
    return {
        "text": str,
        "bool": lambda cell: cell.lower() == "true",
        "int": int,
        "float": lambda cell: plain_value(float(cell)),
        "list": parse_list,
        "native": plain_value,
    }[kind]


def converted(cells: Iterable[Any], kind: str) -> list[Any]:
    convert = converter(kind)
    return [None if cell is None else convert(cell) for cell in cells]


def parse_list(cell: Any) -> Any:
    """The list that a cell spells out in Python; a cell that spells none stays as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval documents
        return cell
    return value if isinstance(value, list) else cell


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
