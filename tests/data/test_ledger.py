from __future__ import annotations

import numpy as np
import pytest

from quiltnet.data.ledger import QUANTILES, ShardReport, Totals, quantiles, read_report


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 1000])
def test_quantiles_are_numpys(count):
    values = np.random.default_rng(count).integers(0, 40, count)
    counts = dict(zip(*(array.tolist() for array in np.unique(values, return_counts=True)), strict=True))
    expected = {name: np.quantile(values, share, method="inverted_cdf") for name, share in QUANTILES.items()}
    assert quantiles(counts) == expected
    assert quantiles({}) == {}


def test_a_report_is_read_back(tmp_path):
    report = ShardReport({"path": "train/x.tar"}, left_out=[2])
    report.accept(["one two", "one"], (30, 200), duplicates=1)
    report.rejected["missing_image"] += 2
    report.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_overlap_counts_what_was_packed():
    totals = Totals()

    def add(split, images, left_out=()):
        codes = np.array(images, np.uint64)
        totals.add(ShardReport(samples=len(images), left_out=list(left_out)), split, codes, codes // np.uint64(10))

    add("train", [1, 2, 13])
    add("train", [24, 35], left_out=[1])
    add("val", [2, 35])
    add("test", [2, 14])
    counts = totals.as_dict()
    assert counts["images"] == len({1, 2, 13, 24, 35, 14})
    assert counts["sources"] == len({0, 1, 2, 3})
    # image 2 is in three splits; 35 was left out of train. Sources 0 and 1 are in two or more.
    assert counts["in_several_splits"] == {"images": 1, "sources": 2}


def test_nothing_packed():
    assert Totals().as_dict()["images"] == 0
