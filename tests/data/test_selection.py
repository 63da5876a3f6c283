from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from quiltnet.data.row_table import row_batch
from quiltnet.data.selection import CaptionWords, KeepList, NotFlagged, OneOf
from quiltnet.errors import UserError


def batch(captions=("a", "b", "c", "d"), paths=("a.jpg", "./b.jpg", "c.jpg", None), **facts):
    count = len(captions)
    columns = {
        "number": list(range(count)),
        "image_path": list(paths),
        "caption": list(captions),
        "split": ["train"] * count,
        "source_id": [""] * count,
        "defect": [""] * count,
    }
    return row_batch(columns, {f"fact:{name}": pa.array(values) for name, values in facts.items()})


@pytest.mark.parametrize("cells", [["0.0", "1", None, "2.0"], [0.0, 1.0, None, 2.0], [0, 1, None, 2]])
def test_numbers_are_compared_as_numbers(cells):
    chooser = OneOf("filtered_magnification", "magnification", ["1", "2"])
    assert chooser.keep(batch(magnification=cells)).tolist() == [False, True, False, True]
    chooser.check("t.csv")


def test_a_value_that_no_row_has():
    chooser = OneOf("filtered_magnification", "magnification", ["1", "3"])
    chooser.keep(batch(magnification=["1.0", "2.0", None, "0"]))
    with pytest.raises(UserError, match=r"t\.csv has no magnification 3; it has 0, 1, 2"):
        chooser.check("t.csv")


@pytest.mark.parametrize(
    "cells",
    [
        ["1", "0", None, "1.0"],
        [1, 0, None, 1],
        [1.0, 0.0, None, 1.0],
        ["True", "False", None, "true"],
        [True, False, None, True],
    ],
)
def test_flags(cells):
    assert NotFlagged("f", "not_histology").keep(batch(not_histology=cells)).tolist() == [False, True, True, False]


def test_a_column_that_is_not_there():
    with pytest.raises(UserError, match=r"no column not_histology to choose rows by; there are number, .*, stain"):
        NotFlagged("f", "not_histology").keep(batch(stain=["a"] * 4))


@pytest.mark.parametrize(
    ("least", "most", "kept"),
    [(2, None, [False, True, True, True]), (None, 2, [True, True, False, True]), (2, 2, [False, True, False, True])],
)
def test_words(least, most, kept):
    chooser = CaptionWords(least, most)
    assert chooser.keep(batch(captions=["one", "one  two\n", "one two three", None])).tolist() == kept
    chooser.check("t.csv")


def test_words_that_no_caption_has():
    chooser = CaptionWords(4, 9)
    chooser.keep(batch(captions=["one", "one two"], paths=["a", "b"]))
    with pytest.raises(UserError, match=r"no caption of 4 to 9 words; its captions have 1 to 2"):
        chooser.check("t.csv")
    with pytest.raises(UserError, match="--min-words 3 is more than --max-words 2"):
        CaptionWords(3, 2)


def test_a_plain_list(tmp_path):
    (tmp_path / "keep.txt").write_text("b.jpg\r\n\n  c.jpg \nelsewhere.jpg\n")
    chooser = KeepList(tmp_path / "keep.txt")
    assert chooser.keep(batch()).tolist() == [False, True, True, False]
    chooser.check("t.csv")


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    ("least", "most", "kept"),
    [
        (None, 0.5, [True, False, False, False]),
        (0.5, None, [False, True, True, False]),
        (None, None, [True, True, True, False]),
    ],
)
def test_a_list_with_scores(tmp_path, ending, least, most, kept):
    scores = {"a.jpg": 0.49, "b.jpg": 0.5, "c.jpg": 0.9, "d.jpg": math.nan}
    frame = pd.DataFrame({"image": scores.keys(), "Any impairment": scores.values()})
    path = tmp_path / f"scores.{ending}"
    if ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    # A threshold of 0.5 cuts into two parts; without one a score is needed all the same.
    chooser = KeepList(path, image_column="image", score_column="Any impairment", least=least, most=most)
    assert chooser.keep(batch()).tolist() == kept
    assert KeepList(path, image_column="image").keep(batch(paths=["d.jpg"] * 4)).all()


def test_lists_that_cannot_be_used(tmp_path):
    (tmp_path / "keep.csv").write_text("image,score\nx.jpg,0.1\n")
    (tmp_path / "keep.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.jpg\n")
    for options, message in [
        ({"path": "gone.txt"}, "no such list"),
        (
            {"path": "keep.csv", "score_column": "quality", "image_column": "image"},
            "no column quality; its columns are image",
        ),
        ({"path": "keep.csv"}, "no column image_path"),
        ({"path": "keep.csv", "image_column": "image", "most": 0.5}, "say which column holds it"),
        ({"path": "keep.csv", "image_column": "image", "score_column": "score", "most": 0.1}, "lists no image to keep"),
        ({"path": "keep.txt"}, "lists no image to keep"),
        ({"path": "keep.txt", "score_column": "score"}, "is a plain list"),
        ({"path": "latin.txt"}, "cannot be read as utf-8"),
    ]:
        with pytest.raises(UserError, match=message):
            KeepList(tmp_path / options.pop("path"), **options)
    unmet = KeepList(tmp_path / "keep.csv", image_column="image")
    unmet.keep(batch())
    with pytest.raises(UserError, match=r"keep\.csv lists no image of t\.csv"):
        unmet.check("t.csv")


def test_an_empty_batch():
    nothing = batch(captions=[], paths=[])
    for chooser in (OneOf("f", "split", ["train"]), CaptionWords(1)):
        assert chooser.keep(nothing).shape == (0,)
    assert np.array_equal(NotFlagged("f", "split").keep(nothing), [])


def test_long_numbers_are_compared_to_the_last_digit():
    chooser = OneOf("f", "day", ["20230101", " inf"])
    assert chooser.keep(batch(day=["20230101", "20230102", "20230101.0", "Inf"])).tolist() == [True, False, True, True]
    chooser.check("t.csv")


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "keep.txt").write_bytes("\ufeffa.jpg\r\nc.jpg\r\n".encode())
    assert KeepList(tmp_path / "keep.txt").keep(batch()).tolist() == [True, False, True, False]
