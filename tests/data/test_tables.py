from __future__ import annotations

import csv
import math

import pandas as pd
import pytest

from quiltnet.data import tables
from quiltnet.data.pairs import PairRow
from quiltnet.data.row_table import RowTable, write_rows
from quiltnet.data.selection import OneOf
from quiltnet.data.tables import TableSource
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


@pytest.fixture
def rows_of(tmp_path):
    """The rows of a table, by way of the disk."""

    def read(table, split=None, filters=(), **options) -> list[PairRow]:
        filters = [*filters, *([OneOf("filtered_split", "split", [split], "part")] if split else [])]
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        write_rows(TableSource(table, **options), folder, filters)
        return list(RowTable(folder))

    return read


@pytest.fixture(params=["csv", "tsv", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"pairs.{request.param}"
    if request.param == "parquet":
        FRAME.to_parquet(path)
    else:
        FRAME.to_csv(path, sep="\t" if request.param == "tsv" else ",", index=False)
    return path


def test_rows_of_any_kind_of_table(table, rows_of):
    assert rows_of(table, **COLUMNS) == EXPECTED


def test_split_chooses_or_names(table, rows_of):
    assert rows_of(table, **COLUMNS, split="val") == EXPECTED[:1]
    with pytest.raises(UserError, match="has no part test; it has train, val"):
        rows_of(table, **COLUMNS, split="test")
    plain = {"image_column": "file", "caption_column": "text"}
    assert {row.split for row in rows_of(table, **plain)} == {"train"}
    source = TableSource(table, **plain, split="val")
    assert {split for batch in source.batches(None) for split in batch.column("split").to_pylist()} == {"val"}


PLAIN = {"image_column": "image", "caption_column": "caption"}


def test_a_table_of_two_columns_has_no_metadata(tmp_path, rows_of):
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x\n")
    assert rows_of(tmp_path / "t.csv", **PLAIN) == [PairRow(0, "a.jpg", "x", "train", "a.jpg", {})]


def test_numbers_are_no_captions(tmp_path, rows_of):
    (tmp_path / "t.csv").write_text("image,caption\n1,3.5\n2,4.5\n")
    with pytest.raises(UserError, match="column caption holds no text; name the column of captions"):
        rows_of(tmp_path / "t.csv", **PLAIN)
    (tmp_path / "t.csv").write_text("image,caption\n1,3.5\n2,a gland\n")
    assert [(row.image_path, row.caption) for row in rows_of(tmp_path / "t.csv", **PLAIN)] == [
        ("1", "3.5"),
        ("2", "a gland"),
    ]


AWKWARD = [
    'Line one,\nline "two",\r\nand three.',
    " spaced ",
    "\u7d44\u7e54 \U0001f52c e\u0301",
    "a\tb; c|d",
    "\u2028 separators \x85",
    "x" * 100_000,
    '"',
    "'",
]


@pytest.mark.parametrize("block_bytes", [1 << 18, 1 << 24])
def test_captions_of_any_text(tmp_path, rows_of, monkeypatch, block_bytes):
    monkeypatch.setattr(tables, "BLOCK_BYTES", block_bytes)
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "n"])
        writer.writerows((f"{n}.jpg", text, n) for n, text in enumerate(AWKWARD * 5))
    rows = rows_of(tmp_path / "t.csv", **PLAIN)
    assert [(row.number, row.caption, row.metadata) for row in rows] == [
        (n, text, {"n": n}) for n, text in enumerate(AWKWARD * 5)
    ]


@pytest.mark.parametrize("text", ["", "NA", "nan", "None", "null", "N/A"])
def test_what_means_nothing_is_null(tmp_path, rows_of, text):
    (tmp_path / "t.csv").write_text(f'image,caption,x\na.jpg,"{text}",1\nb.jpg,y,{text}\n')
    assert [(row.caption, row.metadata) for row in rows_of(tmp_path / "t.csv", **PLAIN)] == [
        (None, {"x": 1}),
        ("y", {"x": None}),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_encodings(tmp_path, rows_of, encoding):
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,caf\u00e9\n", encoding=encoding)
    rows = rows_of(tmp_path / "t.csv", **PLAIN, encoding="utf-8" if encoding == "utf-8-sig" else encoding)
    assert [row.caption for row in rows] == ["caf\u00e9"]


def test_an_encoding_is_named(tmp_path, rows_of):
    (tmp_path / "t.csv").write_bytes("image,caption\na.jpg,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot be read as utf-8 text .*--encoding latin-1"):
        rows_of(tmp_path / "t.csv", **PLAIN)
    with pytest.raises(UserError, match="utf-9 is no encoding"):
        rows_of(tmp_path / "t.csv", **PLAIN, encoding="utf-9")


def test_columns_without_a_name_or_with_the_same(tmp_path, rows_of):
    (tmp_path / "t.csv").write_text(",image,caption,x,x\n0,a.jpg,text,1,2\n")
    assert rows_of(tmp_path / "t.csv", **PLAIN)[0].metadata == {"x": 1, "x.1": 2}


def test_parquet_keeps_its_types(tmp_path, rows_of):
    frame = pd.DataFrame(
        {"image": [1, 2], "caption": ["a", "b"], "list": [["x"], None], "when": pd.to_datetime(["2026-01-02"] * 2)}
    )
    frame["kind"] = frame["caption"].astype("category")
    frame.to_parquet(tmp_path / "t.parquet")
    rows = rows_of(tmp_path / "t.parquet", **PLAIN)
    assert [(row.image_path, row.caption) for row in rows] == [("1", "a"), ("2", "b")]
    assert rows[0].metadata == {"list": ["x"], "when": "2026-01-02 00:00:00", "kind": "a"}


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
def test_tables_that_cannot_be_used(tmp_path, rows_of, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / name, **PLAIN)


def test_no_table_and_no_split(tmp_path, rows_of):
    with pytest.raises(UserError, match="no such table"):
        rows_of(tmp_path / "t.csv", **PLAIN)
    (tmp_path / "t.csv").write_text("image,caption,part\na,b,train\nc,d,\n")
    with pytest.raises(UserError, match="row 1 has no part"):
        rows_of(tmp_path / "t.csv", **PLAIN, split_column="part")
    (tmp_path / "t.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="has no row to pack"):
        rows_of(tmp_path / "t.csv", **PLAIN)


def test_another_reading_is_another_source(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("image,caption,other\na.jpg,x,y\n")
    known = [TableSource(path, **PLAIN).identity()]
    for options in ({"caption_column": "other"}, {"split_column": "other"}, {"split": "val"}, {"encoding": "latin-1"}):
        known.append(TableSource(path, **{**PLAIN, **options}).identity())
    path.write_text("image,caption,other\na.jpg,z,y\n")
    known.append(TableSource(path, **PLAIN).identity())
    assert all(known[one] != known[other] for one in range(6) for other in range(one))


@pytest.mark.parametrize(("ending", "encoding"), [("", "utf-8"), ("\n", "utf-8"), ("\r\n", "utf-16")])
def test_a_quote_that_is_not_closed(tmp_path, rows_of, ending, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes(f'image,caption\n0.jpg,x\n1.jpg,"two\n2.jpg,three{ending}'.encode(encoding))
    with pytest.raises(UserError, match=r"a quote is not closed, .* begins with 'two\\n2.jpg,three"):
        rows_of(path, **PLAIN, encoding=encoding)
    path.write_bytes(f'image,caption\n0.jpg,x\n1.jpg,"two\nlines"{ending}'.encode(encoding))
    assert [row.caption for row in rows_of(path, **PLAIN, encoding=encoding)] == ["x", "two\nlines"]


def test_columns_that_are_told_apart_by_something_else(tmp_path):
    (tmp_path / "t.csv").write_text("image;caption\n0.jpg;x\n")
    with pytest.raises(UserError, match=r"its columns are image;caption; columns are told apart by commas in a \.csv"):
        TableSource(tmp_path / "t.csv", **PLAIN)


def test_a_column_may_have_any_name(tmp_path, rows_of):
    (tmp_path / "t.csv").write_text("image,caption,*,facts,number\n0.jpg,x,7,y,z\n")
    assert rows_of(tmp_path / "t.csv", **PLAIN)[0].metadata == {"*": 7, "facts": "y", "number": "z"}


def test_the_split_is_that_of_the_column_named(tmp_path, rows_of):
    (tmp_path / "t.csv").write_text("image,caption,fold,split\n0.jpg,x,train,val\n1.jpg,y,val,train\n")
    rows = rows_of(tmp_path / "t.csv", **PLAIN, split_column="fold", split="train")
    assert [(row.image_path, row.split, row.metadata) for row in rows] == [("0.jpg", "train", {"split": "val"})]
