from __future__ import annotations

import datetime
import math

import numpy as np
import pandas as pd
import pytest

from quiltnet.data.pairs import PairRow
from quiltnet.data.tables import plain_value, table_rows
from quiltnet.errors import UserError

FRAME = pd.DataFrame(
    {
        "file": ["001", "b.jpg", None],
        "text": ["One,\ntwo", None, "Three"],
        "case": ["007", None, "8"],
        "part": ["val", "train", "train"],
        "grade": [3, 4, 5],
        "score": [0.5, math.nan, math.inf],
    }
)
EXPECTED = [
    PairRow(0, "001", "One,\ntwo", "val", "007", {"grade": 3, "score": 0.5}),
    PairRow(1, "b.jpg", None, "train", "b.jpg", {"grade": 4, "score": None}),
    PairRow(2, None, "Three", "train", "8", {"grade": 5, "score": None}),
]
COLUMNS = {"image_column": "file", "caption_column": "text", "split_column": "part", "source_column": "case"}


@pytest.fixture(params=["csv", "tsv", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"pairs.{request.param}"
    if request.param == "parquet":
        FRAME.to_parquet(path)
    else:
        FRAME.to_csv(path, sep="\t" if request.param == "tsv" else ",", index=False)
    return path


def test_rows_of_any_kind_of_table(table):
    assert list(table_rows(table, **COLUMNS)) == EXPECTED


def test_split_chooses_or_names(table):
    assert list(table_rows(table, **COLUMNS, split="val")) == EXPECTED[:1]
    with pytest.raises(UserError, match="has no part test; it has train, val"):
        table_rows(table, **COLUMNS, split="test")
    plain = {"image_column": "file", "caption_column": "text"}
    assert {row.split for row in table_rows(table, **plain)} == {"train"}
    assert {row.split for row in table_rows(table, **plain, split="val")} == {"val"}


def test_a_table_of_two_columns_has_no_metadata(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x\n")
    rows = table_rows(tmp_path / "t.csv", image_column="image", caption_column="caption")
    assert list(rows) == [PairRow(0, "a.jpg", "x", "train", "a.jpg", {})]


def test_numbers_are_no_captions(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\n1,3.5\n2,4.5\n")
    rows = list(table_rows(tmp_path / "t.csv", image_column="image", caption_column="caption"))
    assert [(row.image_path, row.caption) for row in rows] == [("1", None), ("2", None)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.xlsx", b"", "read by their ending"),
        ("t.csv", b"", "cannot be read"),
        ("t.csv", b"image,caption\n\xff\xfe,x\n", "cannot be read"),
        ("t.csv", b"image,caption\n1,2,3\n1,2,3,4,5\n", "cannot be read"),
        ("t.parquet", b"not parquet", "cannot be read"),
        ("t.csv", b"image,text\na,b\n", "no column caption; its columns are image, text"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        table_rows(tmp_path / name, image_column="image", caption_column="caption")


def test_no_table_and_no_split(tmp_path):
    with pytest.raises(UserError, match="no such table"):
        table_rows(tmp_path / "t.csv", image_column="image", caption_column="caption")
    (tmp_path / "t.csv").write_text("image,caption,part\na,b,train\nc,d,\n")
    with pytest.raises(UserError, match="row 1 has no part"):
        table_rows(tmp_path / "t.csv", image_column="image", caption_column="caption", split_column="part")


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
