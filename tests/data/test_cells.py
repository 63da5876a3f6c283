from __future__ import annotations

import datetime
import io
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from quiltnet.data.cells import KindOfColumn, converted, parse_list, plain_value


def judged(cells: list[str | None], at_once: int = 2) -> list:
    kind = KindOfColumn()
    for start in range(0, len(cells), at_once):
        kind.see(pa.array(cells[start : start + at_once], pa.string()))
    return converted(cells, kind.kind)


@pytest.mark.parametrize(
    "cells",
    [
        ["1", "2", "-3"],
        ["1", None, "3"],
        ["1", "2.5", "1e3"],
        [" 1", "2 ", "3"],
        ["0.5", "inf", "-.5"],
        ["True", "False", "true"],
        ["True", "1", "x"],
        ["a", "1", "2"],
        [None, None],
        ["1", "2", "3", "4", "5", "x"],
        ["9" * 18, "1"],
    ],
)
def test_columns_are_what_pandas_takes_them_for(cells):
    text = "x,y\n" + "".join(f"{cell or ''},0\n" for cell in cells)
    frame = pd.read_csv(io.StringIO(text), low_memory=False)
    assert judged(cells) == [plain_value(value) for value in frame["x"]]


def test_identifiers_stay_text():
    assert judged(["007", "12"]) == ["007", "12"]
    assert judged(["1" * 19, "12"]) == ["1" * 19, "12"]


@pytest.mark.parametrize(
    ("cell", "value"),
    [("['a']", ["a"]), ("{'a': 1}", "{'a': 1}"), ("[nan]", "[nan]"), ("[" * 500, "[" * 500), (3.0, 3.0)],
)
def test_lists_are_parsed_and_nothing_is_run(cell, value):
    assert parse_list(cell) == value


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.float32("nan"), None),
        (np.array(["a", None], dtype=object), ["a", None]),
        ({"a": np.float64(1.5), "b": (1, math.inf)}, {"a": 1.5, "b": [1, None]}),
        (pd.NaT, None),
        (pd.NA, None),
        (datetime.date(2026, 1, 2), "2026-01-02"),
    ],
)
def test_cells_become_json(cell, value):
    assert plain_value(cell) == value
