from __future__ import annotations

import numpy as np
import pytest
import torch

from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.labelled_set import LabelledSet


def all_counts(resamples: Resamples, chunk: int | None = None) -> np.ndarray:
    """(R, N) int64."""
    counts = torch.cat(list(resamples.counts(chunk))).numpy()
    assert (counts == counts.astype(np.int64)).all()
    return counts.astype(np.int64)


def test_every_resample_keeps_the_size_of_every_stratum():
    strata = torch.tensor([4, 0, 0, 2, 0, 4, 4, 0])
    counts = all_counts(Resamples(8, strata=strata, count=200))
    assert counts.shape == (200, 8)
    for stratum in (0, 2, 4):
        is_in = (strata == stratum).numpy()
        assert (counts[:, is_in].sum(axis=1) == is_in.sum()).all()
    assert (counts[:, 3] == 1).all()  # alone in its stratum
    assert len(np.unique(counts, axis=0)) > 100


def test_draws_are_independent_and_equally_likely():
    # Of two items: both once in half of the resamples, one of them twice in a quarter each.
    twice, once, never = (np.mean(all_counts(Resamples(2, count=20_000))[:, 0] == times) for times in (2, 1, 0))
    assert (twice, once, never) == pytest.approx((0.25, 0.5, 0.25), abs=0.015)
    # Of 50: an item is missed with (49 / 50)^50, and all are drawn alike.
    counts = all_counts(Resamples(50, count=20_000))
    assert (counts == 0).mean(axis=0) == pytest.approx(np.full(50, (49 / 50) ** 50), abs=0.015)
    assert counts.mean(axis=0) == pytest.approx(np.ones(50), abs=0.04)


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_chunks_change_nothing(chunk):
    arguments = {"strata": torch.arange(40) % 3, "groups": [f"g{index // 4}" for index in range(40)], "count": 30}
    expected = all_counts(Resamples(40, **arguments))
    resamples = Resamples(40, **arguments)
    np.testing.assert_array_equal(all_counts(resamples, chunk), expected)
    np.testing.assert_array_equal(all_counts(resamples, chunk), expected)  # each call begins anew
    assert len(resamples) == 30
    assert not np.array_equal(all_counts(Resamples(40, **arguments, seed=1)), expected)


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    all_counts(Resamples(10, count=5))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_groups_are_drawn_whole_and_as_often_as_their_stratum_has_them():
    groups = ["c", "a", "a", "b", "a", "b", "d", "e", "e", "e", "e", "e"]
    strata = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 1])  # a: mostly 0, b: 1, c: 0, d: 1, e: 0 and 2 alike, so 0
    resamples = Resamples(12, strata=strata, groups=groups, count=300)
    counts = all_counts(resamples)
    first = {name: counts[:, groups.index(name)] for name in "abcde"}
    for index, name in enumerate(groups):
        np.testing.assert_array_equal(counts[:, index], first[name])
    assert (first["a"] + first["c"] + first["e"] == 3).all()
    assert (first["b"] + first["d"] == 2).all()
    assert len(set(counts.sum(axis=1).tolist())) > 3  # groups differ in size, and so do resamples
    assert (resamples.units, resamples.fewest_units) == (5, 2)


def test_groups_of_one_are_items():
    strata = torch.arange(30) % 4
    names = [f"{index:02d}" for index in range(30)]
    items, groups = (Resamples(30, strata=strata, groups=of, count=20) for of in (None, names))
    np.testing.assert_array_equal(all_counts(items), all_counts(groups))


@pytest.mark.parametrize("groups", [None, [f"g{index % 11}" for index in range(60)]])
def test_means_are_those_of_the_items_one_by_one(groups):
    values = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    resamples = Resamples(60, strata=torch.arange(60) % 2, groups=groups, count=40)
    expected = [np.repeat(values.double().numpy(), counts, axis=0).mean(axis=0) for counts in all_counts(resamples)]
    means = resamples.means(values)
    assert means.dtype == torch.float64
    np.testing.assert_allclose(means.numpy(), np.stack(expected), rtol=0, atol=1e-12)


def test_unit_of_a_set_is_its_group_then_its_slide_then_its_image():
    names = [f"tile-{index}" for index in range(8)]
    by_slide, by_group = [f"s{index // 2}" for index in range(8)], [f"p{index // 4}" for index in range(8)]

    def units(**columns: list[str]) -> int:
        labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        return Resamples.of_set(LabelledSet([b""] * 8, labels, ["benign", "malign"], names=names, **columns)).units

    assert [units(), units(slides=by_slide), units(slides=by_slide, groups=by_group)] == [8, 4, 2]


def test_a_hash_tells_resamples_apart():
    strata, groups = torch.arange(12) // 6, [f"g{index // 2}" for index in range(12)]
    different = [
        Resamples(12),
        Resamples(11),
        Resamples(12, count=999),
        Resamples(12, seed=1),
        Resamples(12, strata=strata),
        Resamples(12, groups=groups),
        Resamples(12, strata=strata, groups=groups),
    ]
    assert len({resamples.sha256() for resamples in different}) == len(different)
    assert Resamples(12, strata=strata).sha256() == Resamples(12, strata=strata).sha256()
