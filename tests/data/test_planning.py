"""The plan, against a definition that groups and sorts one row at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quiltnet.data import row_table
from quiltnet.data.pairs import PairRow, hash_code, plain_path, short_hash
from quiltnet.data.planning import make_plan, open_plan
from quiltnet.data.row_table import ListedRows, RowTable, write_rows


def defined_plan(rows: list[PairRow], seed: int, samples_per_shard: int) -> dict[tuple[str, int], list[list[int]]]:
    """(split, number of the tar) -> for each of its samples, the numbers of its rows."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.caption and row.caption.strip() and row.image_path:
            groups.setdefault((row.split, plain_path(row.image_path)), []).append(row.number)
    ordered = sorted(groups, key=lambda group: (group[0], short_hash(f"{seed} {group[1]}")))
    tars: dict[tuple[str, int], list[list[int]]] = {}
    counts: dict[str, int] = {}
    for group in ordered:
        place = counts.get(group[0], 0)
        counts[group[0]] = place + 1
        tars.setdefault((group[0], place // samples_per_shard), []).append(groups[group])
    return tars


def planned(rows, folder, layout="images", seed=3, samples_per_shard=10):
    folder.mkdir()
    write_rows(ListedRows(rows), folder, [])
    table = RowTable(folder)
    make_plan(table, folder, seed=seed, layout=layout, samples_per_shard=samples_per_shard)
    return open_plan(folder), list(table)


def tars_of(plan, rows):
    tars = {}
    for shard in plan.shards:
        spans = zip(plan.starts[shard.first : shard.end], plan.starts[shard.first + 1 : shard.end + 1], strict=True)
        tars[shard.split, shard.number] = [[rows[p].number for p in plan.rows[begin:end]] for begin, end in spans]
    return tars


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    captions = ["one", "two", None, "", " \u2003", "\x1c", "\u00e9"]
    paths = [*(f"{n}.jpg" for n in range(60)), "./3.jpg", "a//4.jpg", "a/4.jpg", None, ""]
    return [
        PairRow(
            number,
            paths[rng.integers(len(paths))],
            captions[rng.integers(len(captions))],
            ["val", "train", "test-1"][rng.integers(3)],
            f"s{rng.integers(5)}",
        )
        for number in range(400)
    ]


@pytest.mark.parametrize("at_once", [7, 10_000])
def test_plan_is_as_defined(rows, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(row_table, "LISTED_AT_ONCE", at_once)
    plan, table = planned(rows, tmp_path / "work")
    assert tars_of(plan, table) == defined_plan(rows, 3, 10)
    firsts = [table[plan.rows[start]] for start in plan.starts[:-1]]
    assert plan.images.tolist() == [hash_code(plain_path(row.image_path)) for row in firsts]
    assert plan.sources.tolist() == [hash_code(row.source_id) for row in firsts]
    assert plan.splits == ["test-1", "train", "val"]


def test_rows_without_a_chance_are_written_down(rows, tmp_path):
    rows += [PairRow(400, "../x.jpg", "a", "val", ""), PairRow(401, "x.jpg", "a", "val", "", {}, "truncated_tar")]
    plan, _ = planned(rows, tmp_path / "work")
    lines = [json.loads(line) for line in (tmp_path / "work" / "rejected-rows.jsonl").read_text().splitlines()]
    expected = {}
    for row in rows:
        if row.defect:
            expected[row.number] = row.defect
        elif not row.caption or not row.caption.strip():
            expected[row.number] = "null_caption"
        elif not row.image_path:
            expected[row.number] = "missing_image"
        elif ".." in row.image_path:
            expected[row.number] = "unsafe_path"
    assert {line["row"]: line["reason"] for line in lines} == expected
    assert plan.rejected == {reason: list(expected.values()).count(reason) for reason in set(expected.values())}


def test_every_row_is_a_sample(rows, tmp_path):
    plan, table = planned(rows, tmp_path / "work", layout="rows")
    samples = [sample for tar in tars_of(plan, table).values() for sample in tar]
    usable = [row.number for row in rows if row.caption and row.caption.strip() and row.image_path]
    assert sorted(number for sample in samples for number in sample) == usable
    assert all(len(sample) == 1 for sample in samples)


def test_rows_of_an_image_are_spread(tmp_path):
    rows = [PairRow(n, f"{n // 20}.jpg", f"caption {n}", "train", "") for n in range(200)]
    plan, table = planned(rows, tmp_path / "work", layout="rows", samples_per_shard=1000)
    places = [number // 20 for sample in tars_of(plan, table)["train", 0] for number in sample]
    neighbours = sum(one == other for one, other in zip(places[1:], places[:-1], strict=True))
    assert neighbours < 45  # 19 of 199 by chance, 190 in the order of the table
