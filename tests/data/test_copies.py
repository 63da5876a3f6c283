from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from quiltnet.data.copies import CopyFinder
from quiltnet.data.examining import SAMPLE
from quiltnet.data.near_duplicates import FLAT_CONTRAST, LEAST_CORRELATION


def drawn_samples(seed: int, count: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Samples of three sets with few different pixels and looks, so that everything happens."""
    rng = np.random.default_rng(seed)
    samples = np.zeros(count, SAMPLE)
    origin = rng.integers(0, 40, count)
    looks = rng.integers(0, 1 << 63, 40, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 4), replace=False)) for _ in range(count)]
    samples["look"] = looks[origin] ^ np.array(flips, np.uint64)
    samples["turned"] = samples["look"][:, None] ^ rng.integers(1, 1 << 63, (count, 7), dtype=np.uint64)
    turned = rng.random(count) < 0.2  # of these, one turned look is near that of another sample
    target = rng.permutation(count)[: turned.sum()]
    samples["turned"][turned, 3] = samples["look"][target] ^ np.uint64(1)
    grids = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    grids[::2] = [np.rot90(grids[0], k) for k in range(20)]  # alike when turned; the others are like nothing else
    samples["grid"] = grids[origin]
    samples["contrast"] = np.where(origin % 7 == 0, 1.0, 30.0)
    samples["pixels"] = samples["look"] ^ np.array(rng.integers(0, 3, count), np.uint64)
    samples["decoded"] = rng.random(count) < 0.9
    return samples, rng.integers(0, 3, count)


def is_near(samples: np.ndarray, one: int, other: int, distance: int) -> bool:
    """By hash and by grid, upright or turned. A look is turned as that of the first sample that has it."""
    looks, grids = samples["look"], samples["grid"]

    def is_alike(grid: np.ndarray) -> bool:
        return np.corrcoef(grids[one].ravel(), grid.ravel())[0, 1] >= LEAST_CORRELATION

    def is_turned_to(number: int, upright: int) -> bool:
        same = (looks == looks[number]) & samples["decoded"] & (samples["contrast"] >= FLAT_CONTRAST)
        turned = samples["turned"][np.flatnonzero(same)[0]].tolist()
        return any(bin(int(looks[upright]) ^ value).count("1") <= distance for value in turned)

    if looks[one] == looks[other] or (bits(samples, one, other) <= distance and is_alike(grids[other])):
        return True
    square = [np.rot90(grid, k) for grid in (grids[other], np.fliplr(grids[other])) for k in range(4)]
    return (is_turned_to(one, other) or is_turned_to(other, one)) and any(map(is_alike, square[1:]))


def bits(samples: np.ndarray, one: int, other: int) -> int:
    return bin(int(samples["look"][one]) ^ int(samples["look"][other])).count("1")


def has_look(samples: np.ndarray, number: int) -> bool:
    return samples["contrast"][number] >= FLAT_CONTRAST


def slow_within(samples: np.ndarray, members: list[int], distance: int) -> tuple[list[list[int]], int]:
    """Exact copies with the first of their kind; how many images fewer there were without near copies."""
    first: dict[int, int] = {}
    exact = []
    for number in members:
        if first.setdefault(int(samples["pixels"][number]), number) != number:
            exact.append([number, first[int(samples["pixels"][number])]])
    group = {number: number for number in first.values() if has_look(samples, number)}
    for one, other in combinations(sorted(group), 2):
        if is_near(samples, one, other, distance):
            joined, kept = group[one], group[other]
            group = {number: kept if of == joined else of for number, of in group.items()}
    return exact, len(group) - len(set(group.values()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distance", [0, 2, 4])
def test_copies_are_those_of_comparing_all(seed, distance):
    samples, groups = drawn_samples(seed)
    finder = CopyFinder(samples, groups, distance)
    members = [[n for n in np.flatnonzero(groups == g).tolist() if samples["decoded"][n]] for g in range(3)]
    for group in range(3):
        copies = finder.within(group)
        exact, near = slow_within(samples, members[group], distance)
        assert copies.exact.tolist() == exact and len(copies.near) == near
        assert len({number for number, _ in copies.near.tolist()}) == near and len(copies) == len(exact) + near
        for number, other in copies.near.tolist():
            assert {number, other} <= set(members[group]) and is_near(samples, number, other, distance)
        assert finder.distances(copies.near).tolist() == [bits(samples, *pair) for pair in copies.near.tolist()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distance", [0, 4])
def test_leaks_are_those_of_comparing_all(seed, distance):
    samples, groups = drawn_samples(seed)
    finder = CopyFinder(samples, groups, distance)
    members = [[n for n in np.flatnonzero(groups == g).tolist() if samples["decoded"][n]] for g in range(3)]
    for group, other in ((0, 1), (1, 0), (2, 0)):
        copies = finder.between(group, other)
        exact, near = set(), set()
        for number in members[other]:
            if any(samples["pixels"][number] == samples["pixels"][known] for known in members[group]):
                exact.add(number)
            elif has_look(samples, number) and any(
                has_look(samples, known) and is_near(samples, number, known, distance) for known in members[group]
            ):
                near.add(number)
        assert (set(copies.exact[:, 0].tolist()), set(copies.near[:, 0].tolist())) == (exact, near)
        assert len(copies) == len(exact) + len(near)
        assert (samples["pixels"][copies.exact[:, 0]] == samples["pixels"][copies.exact[:, 1]]).all()
        assert all(is_near(samples, *pair, distance) for pair in copies.near.tolist())
        assert set(copies.exact[:, 1].tolist()) | set(copies.near[:, 1].tolist()) <= set(members[group])


def test_empty_sets():
    samples, groups = drawn_samples(0)
    finder = CopyFinder(samples, groups, 4)
    assert len(finder.within(7)) == len(finder.between(7, 0)) == len(finder.between(0, 7)) == 0
    none = CopyFinder(np.zeros(0, SAMPLE), np.zeros(0, np.int64), 4)
    assert len(none.within(0)) == len(none.between(0, 1)) == 0
