from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from quiltnet.data.mixing import BLOCK, Mixture
from quiltnet.data.permutation import permuted
from quiltnet.errors import UserError


def test_one_source_is_one_permutation_after_another():
    mixture = Mixture({"a": 20}, None, seed=5)
    expected = [n for epoch in range(3) for n in permuted(np.arange(20), 20, 0, 5, epoch, 0).tolist()]
    assert mixture.numbers(range(60)).tolist() == expected
    assert mixture.numbers(range(17, 43)).tolist() == expected[17:43]
    assert all(sorted(expected[start : start + 20]) == list(range(20)) for start in (0, 20, 40))


def test_without_weights_every_sample_of_every_source_once_an_epoch():
    mixture = Mixture({"a": 7, "b": 1, "c": 12}, None, seed=0)
    assert mixture.samples_per_epoch == 20
    for epoch in range(4):
        assert sorted(mixture.numbers(range(20 * epoch, 20 * epoch + 20))) == list(range(20))
    assert mixture.counts(50) == {
        name: int(count)
        for name, count in zip("abc", np.bincount(mixture.sources(mixture.numbers(range(50)))), strict=True)
    }


def test_weights_hold_in_every_block():
    mixture = Mixture({"a": 1000, "b": 10, "c": 300}, {"a": 5, "b": 2, "c": 1}, seed=1)
    for block in range(3):
        numbers = mixture.numbers(range(block * BLOCK, (block + 1) * BLOCK))
        counts = np.bincount(mixture.sources(numbers))
        assert counts.tolist() == [40_960, 16_384, 8_192]
    # and nearly so in short stretches
    short = Counter(mixture.sources(mixture.numbers(range(1000, 3000))).tolist())
    assert abs(short[0] - 1250) < 150 and abs(short[1] - 500) < 120


def test_weighted_sources_are_gone_through_evenly():
    mixture = Mixture({"a": 1000, "b": 10}, {"a": 1, "b": 3}, seed=1)
    numbers = mixture.numbers(range(BLOCK * 2))
    of_a, of_b = numbers[numbers < 1000], numbers[numbers >= 1000]
    # A source's samples are all used before one is used again, whatever order a block puts them in.
    assert set(np.bincount(of_a, minlength=1000)) <= {32, 33}
    assert set(np.bincount(of_b - 1000)) <= {9830, 9831}


def test_counts_are_those_of_the_stream():
    mixture = Mixture({"a": 50, "b": 70}, {"a": 0.1, "b": 0.9}, seed=4)
    sources = mixture.sources(mixture.numbers(range(BLOCK + 500)))
    for position in (0, 1, 777, BLOCK, BLOCK + 499, BLOCK + 500, 3, BLOCK - 1, BLOCK + 2):  # as a log asks, and not
        counted = np.bincount(sources[:position], minlength=2).tolist()
        assert mixture.counts(position) == {"a": counted[0], "b": counted[1]}


def test_counting_goes_on_from_where_it_was(monkeypatch):
    """A line of the log must not work out the whole epoch so far."""
    mixture = Mixture({"a": 300_000, "b": 100_000}, None, seed=4)
    mixture.counts(250_000)
    asked = []
    numbers = mixture.numbers
    monkeypatch.setattr(mixture, "numbers", lambda positions: asked.append(len(positions)) or numbers(positions))
    counts = mixture.counts(250_100)
    assert asked == [100]
    expected = np.bincount(mixture.sources(numbers(range(250_100)))).tolist()
    assert list(counts.values()) == expected


def test_what_was_seen_of_a_large_set_needs_little_memory():
    mixture = Mixture({"a": 2_000_000}, {"a": 1}, seed=2)  # 16 MB as positions, and several times that on the way
    tracemalloc.start()
    try:
        seen = mixture.seen(1_500_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen.sum() == 1_500_000 and peak < 12e6


@pytest.mark.parametrize("weights", [None, {"a": 1, "b": 3}])
def test_what_was_seen(weights):
    mixture = Mixture({"a": 30_000, "b": 10}, weights, seed=2)
    for position in (0, 1, 777, BLOCK + 5, 3 * BLOCK):
        expected = np.zeros(30_010, bool)
        expected[mixture.numbers(range(position))] = True
        assert (mixture.seen(position) == expected).all()


def test_span_is_the_source_of_a_sample():
    mixture = Mixture({"a": 5, "b": 3}, None, seed=0)
    assert [mixture.span(number) for number in (0, 4, 5, 7)] == [(0, 5), (0, 5), (5, 8), (5, 8)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, r"weights are given for \['a'\], sources are \['a', 'b'\]"),
        ({"a": 1, "b": 0}, "must be numbers above 0"),
        ({"a": 1, "b": float("nan")}, "must be numbers above 0"),
        ({"a": 1, "b": float("inf")}, "must be numbers above 0"),
        ({"a": 1, "b": "three"}, "must be numbers above 0"),
        ({"a": 1, "b": 1e-6}, "less than 1 in 65536"),
    ],
)
def test_doors(weights, message):
    with pytest.raises(UserError, match=message):
        Mixture({"a": 5, "b": 5}, weights, seed=0)
