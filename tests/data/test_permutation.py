from __future__ import annotations

import numpy as np
import pytest

from quiltnet.data.permutation import permuted


@pytest.mark.parametrize("length", [*range(1, 40), 63, 64, 65, 1000, 12_345])
def test_is_a_permutation(length):
    assert sorted(permuted(np.arange(length), length, 5, 0)) == list(range(length))


def test_places_are_looked_up_alone_or_together():
    whole = permuted(np.arange(1000), 1000, 7)
    places = np.array([999, 0, 5, 5])
    assert permuted(places, 1000, 7).tolist() == whole[places].tolist()
    assert [int(permuted(np.array([place]), 1000, 7)[0]) for place in places] == whole[places].tolist()


def test_key_and_length_matter():
    orders = {tuple(permuted(np.arange(100), 100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("length", [2, 3, 5, 10, 33])
def test_every_entry_is_as_likely_at_every_place(length):
    """Against numpy's own shuffle: chi-square of entry by place, and of which entry follows which."""
    epochs = 1500
    orders = np.stack([permuted(np.arange(length), length, 3, epoch) for epoch in range(epochs)])
    at_place = np.stack([np.bincount(orders[:, place], minlength=length) for place in range(length)])
    chi_square = ((at_place - epochs / length) ** 2 / (epochs / length)).sum()
    freedom = (length - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    pairs = orders[:, :-1] * length + orders[:, 1:]
    seen = np.bincount(pairs.ravel(), minlength=length**2).reshape(length, length)
    expected = epochs * (length - 1) / (length * (length - 1))
    off = ~np.eye(length, dtype=bool)
    assert abs(seen[off] - expected).max() < 6 * np.sqrt(expected)
    assert not seen[~off].any()


def test_fifty_million_places_cost_no_memory():
    places = np.arange(0, 50_000_000, 12_345)
    entries = permuted(places, 50_000_000, 1, 2)
    assert len(set(entries.tolist())) == len(places)
    assert 0.48 < (entries / 50_000_000).mean() < 0.52
    assert abs(np.corrcoef(places, entries)[0, 1]) < 0.05
