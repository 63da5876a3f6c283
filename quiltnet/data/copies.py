"""Which images of a set are copies of another one, and which of them are in two sets at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quiltnet.data.near_duplicates import (
    FLAT_CONTRAST,
    bits_set,
    confirm_pairs,
    group_pairs,
    near_pairs,
    near_when_turned,
)

NOWHERE = -1


@dataclass(frozen=True)
class Copies:
    """(E, 2) and (K, 2) sample numbers: the copy, and what it is a copy of."""

    exact: np.ndarray
    near: np.ndarray

    def __len__(self) -> int:
        return len(self.exact) + len(self.near)


class CopyFinder:
    """Compares all images once; then answers for each set, and for each two sets.

    Exact copies have the same pixels. Near ones have hashes within ``distance`` bits, and grids of grey levels that
    correlate; background, whose hash says nothing, is only ever an exact copy.

    Args:
        samples: (N,) SAMPLE of all sets.
        groups: (N,) int, the set of each.
        distance: in bits, of 64.
        turned: whether images that were turned by right angles or mirrored are near copies too.
    """

    def __init__(self, samples: np.ndarray, groups: np.ndarray, distance: int, *, turned: bool = True) -> None:
        self._samples = samples
        self._groups = groups
        has_look = samples["decoded"] & (samples["contrast"] >= FLAT_CONTRAST)
        self._looks, first, inverse = np.unique(samples["look"][has_look], return_index=True, return_inverse=True)
        self._look = np.full(len(samples), NOWHERE)  # of each sample: the number of its look
        self._look[has_look] = inverse
        grids = samples["grid"][has_look][first]
        edges = [confirm_pairs(near_pairs(self._looks, distance), grids, turned=False)]
        if turned:
            others = near_when_turned(self._looks, samples["turned"][has_look][first], distance)
            edges.append(confirm_pairs(others, grids, turned=True))
        self._edges = np.concatenate(edges)

    def within(self, group: int) -> Copies:
        """All but the first of each lot of copies in one set. Near copies are chained: a like b like c is one lot."""
        numbers, first_number = self._by_pixels(group)
        exact = np.stack([numbers, first_number], axis=1)[numbers != first_number]
        distinct = numbers[(numbers == first_number) & (self._look[numbers] != NOWHERE)]
        first = self._first_by_look(distinct)
        first_alike = first[self._look[distinct]]
        alike = np.stack([distinct, first_alike], axis=1)[distinct != first_alike]
        return Copies(exact, np.concatenate([alike, self._chained(first)]))

    def between(self, group: int, other: int) -> Copies:
        """Images of ``other`` that are in ``group`` too; the second of each two is the one in ``group``."""
        numbers, _ = self._by_pixels(other)
        known, first_number = np.unique(self._samples["pixels"][self._members(group)], return_index=True)
        wanted = self._samples["pixels"][numbers]
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        same = known[place] == wanted if len(known) else np.zeros(len(numbers), bool)
        exact = np.stack([numbers[same], self._members(group)[first_number[place[same]]]], axis=1)
        rest = numbers[~same & (self._look[numbers] != NOWHERE)]
        partner = self._partners(self._first_by_look(self._members(group)))[self._look[rest]]
        near = np.stack([rest, partner], axis=1)[partner != NOWHERE]
        return Copies(exact, near)

    def distances(self, pairs: np.ndarray) -> np.ndarray:
        """(P,) bits between the looks of each two samples."""
        return bits_set(self._samples["look"][pairs[:, 0]] ^ self._samples["look"][pairs[:, 1]])

    def _members(self, group: int) -> np.ndarray:
        return np.flatnonzero(self._samples["decoded"] & (self._groups == group))

    def _by_pixels(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) decodable samples of a set, and (n,) the first of it with the same pixels."""
        numbers = self._members(group)
        _, first, inverse = np.unique(self._samples["pixels"][numbers], return_index=True, return_inverse=True)
        return numbers, numbers[first][inverse]

    def _first_by_look(self, numbers: np.ndarray) -> np.ndarray:
        """The first of ``numbers`` with each look, or NOWHERE. numbers: ascending."""
        first = np.full(len(self._looks), NOWHERE)
        looks = self._look[numbers]
        backwards = numbers[looks != NOWHERE][::-1]
        first[self._look[backwards]] = backwards  # of several, the last assignment stays: the first in order
        return first

    def _chained(self, first: np.ndarray) -> np.ndarray:
        """(K, 2): of each group of looks that are near along a chain, all but the first, with a direct neighbour."""
        edges = self._edges[(first[self._edges] != NOWHERE).all(axis=1)]
        neighbour = np.full(len(first), NOWHERE)
        neighbour[edges[:, 0]], neighbour[edges[:, 1]] = edges[:, 1], edges[:, 0]
        chained = np.flatnonzero(neighbour != NOWHERE)
        chained = chained[np.argsort(first[chained])]
        _, roots = np.unique(group_pairs(len(first), edges)[chained], return_index=True)
        later = np.delete(chained, roots)
        return np.stack([first[later], first[neighbour[later]]], axis=1)

    def _partners(self, first: np.ndarray) -> np.ndarray:
        """For each look, the sample of ``first`` that has it or is near it; NOWHERE where there is none."""
        partner = np.full(len(first), NOWHERE)
        for one, other in (self._edges.T, self._edges.T[::-1]):
            there = first[other] != NOWHERE
            partner[one[there]] = first[other[there]]
        return np.where(first != NOWHERE, first, partner)
