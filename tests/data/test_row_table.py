from __future__ import annotations

import numpy as np
import pytest

from quiltnet.data import row_table
from quiltnet.data.pairs import PairRow
from quiltnet.data.row_table import ListedRows, RowTable, map_distinct, text_array, write_rows
from quiltnet.data.selection import CaptionWords, OneOf
from quiltnet.errors import UserError

ROWS = [
    PairRow(
        n,
        f"{n}.jpg",
        None if n % 5 == 4 else "word " * (n % 4 + 1),
        "train",
        f"s{n % 3}",
        {"n": n, "deep": [{"x": None}]},
    )
    for n in range(50)
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(row_table, "LISTED_AT_ONCE", 8)  # several batches
    write_rows(ListedRows(ROWS), tmp_path, [])
    return RowTable(tmp_path)


def test_rows_come_back(table):
    assert len(table) == 50
    assert list(table) == ROWS


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_any_order(table, seed):
    positions = np.random.default_rng(seed).integers(0, 50, 30)  # some twice
    assert table.take(positions) == [ROWS[position] for position in positions]
    assert sorted(table.image_paths(positions)) == sorted(ROWS[position].image_path for position in positions)


def test_filters_choose_and_count(tmp_path):
    filters = [CaptionWords(least=2), OneOf("filtered_source", "source_id", ["s0", "s2"])]
    advanced = []
    write_rows(ListedRows(ROWS), tmp_path, filters, advanced.append)
    table = RowTable(tmp_path)
    expected = [r for r in ROWS if (r.caption is None or len(r.caption.split()) >= 2) and r.source_id != "s1"]
    assert list(table) == expected
    short = sum(r.caption is not None and len(r.caption.split()) < 2 for r in ROWS)
    assert table.summary.dropped == {"filtered_words": short, "filtered_source": 50 - short - len(expected)}
    assert (table.summary.rows, sum(advanced)) == (50, 50)


def test_nothing_passes(tmp_path):
    filters = [OneOf("filtered_source", "source_id", ["s0"]), CaptionWords(least=1, most=1)]
    rows = [PairRow(0, "a.jpg", "one", "train", "s1"), PairRow(1, "b.jpg", "one two", "train", "s0")]
    filters[1]._shortest, filters[1]._longest = 1, 1  # it has met a caption of one word, elsewhere
    with pytest.raises(UserError, match=r"has no row to pack \(filtered_source 1, filtered_words 1\)"):
        write_rows(ListedRows(rows), tmp_path, filters)


def test_half_a_surrogate_pair_is_replaced():
    assert text_array(["a\ud800b", None]).to_pylist() == ["a?b", None]


def test_a_function_is_called_once_for_each_text():
    seen = []
    column = map_distinct(text_array(["a", "b", "a", None]), lambda text: seen.append(text) or text.upper())
    assert column.to_pylist() == ["A", "B", "A", None]
    assert seen == ["a", "b"]
