"""Which sample stands at which place of the training stream, of one source or of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from quiltnet.data.permutation import permuted
from quiltnet.errors import UserError

BLOCK = 65_536  # positions within which weights hold exactly

# First word of the key of a permutation, so that independent orders are drawn independently.
ORDER_STREAM, BLOCK_STREAM = 0, 2


class _Stream(NamedTuple):
    """The samples [first, first + size), in an endless order; so many places of a block are theirs."""

    first: int
    size: int
    places: int
    key: int


class Mixture:
    """The endless stream as a pure function: position -> number of a sample.

    Samples of all sources are numbered through, source after source. Without weights the stream is one permutation of
    all numbers after another, so each sample occurs exactly once an epoch. With weights, each source has an endless
    stream of that kind for itself; of every 65,536 consecutive positions a source has its share, rounded to whole
    positions, in an order of their own.

    Args:
        sizes: number of samples by source.
        weights: of each source, positive; their sum does not matter. None: no weights.
        seed: of all orders.

    Attributes:
        samples_per_epoch: samples of all sources together; where there are weights, a nominal number.

    Raises:
        UserError: weights that do not fit the sources, are not positive, or too small to be kept.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float] | None, *, seed: int) -> None:
        self.names = list(sizes)
        self.samples_per_epoch = sum(sizes.values())
        self.seed = seed
        self._firsts = np.cumsum([0, *sizes.values()])  # (S + 1)
        if weights is None:
            self._streams = [_Stream(0, self.samples_per_epoch, self.samples_per_epoch, 0)]
        else:
            places = _places(sizes, weights)
            columns = zip(self._firsts.tolist(), sizes.values(), places, strict=False)
            self._streams = [_Stream(*column, 1 + source) for source, column in enumerate(columns)]
        self._ends = np.cumsum([0, *(stream.places for stream in self._streams)])  # within a block
        self._counted = (0, np.zeros(len(self.names), np.int64))  # a position, and the samples of sources before it

    def numbers(self, positions: np.ndarray | range) -> np.ndarray:
        """(B,) int64: the samples at ``positions`` (each of at least 0)."""
        which, places = self.split(np.asarray(positions, np.int64))
        numbers = np.empty_like(places)
        for stream in np.unique(which):
            of_stream = which == stream
            numbers[of_stream] = self._shuffled(self._streams[stream], places[of_stream])
        return numbers

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((B,) stream, (B,) place in it) of each position; a weighted source is a stream of its own."""
        if len(self._streams) == 1:
            return np.zeros_like(positions), positions
        blocks, rests = np.divmod(positions, BLOCK)
        places = np.empty_like(positions)
        for block in np.unique(blocks):
            of_block = blocks == block
            places[of_block] = permuted(rests[of_block], BLOCK, BLOCK_STREAM, self.seed, int(block))
        which = np.searchsorted(self._ends, places, side="right") - 1
        return which, blocks * np.diff(self._ends)[which] + places - self._ends[which]

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64: which source each sample is of."""
        return np.searchsorted(self._firsts, numbers, side="right") - 1

    def span(self, number: int) -> tuple[int, int]:
        """First number of the source that a sample is of, and the one after its last."""
        source = int(self.sources(np.array([number]))[0])
        return int(self._firsts[source]), int(self._firsts[source + 1])

    def counts(self, position: int) -> dict[str, int]:
        """Samples of each source before ``position``; quick where a position not far before was asked for last."""
        whole, rest = divmod(position, int(self._ends[-1]))
        is_weighted = len(self._streams) > 1
        counted_to, counts = self._counted
        if not position - rest <= counted_to <= position:
            counted_to, counts = position - rest, whole * np.diff(self._ends if is_weighted else self._firsts)
        for positions in _pieces(counted_to, position):
            sources = self.split(positions)[0] if is_weighted else self.sources(self.numbers(positions))
            counts = counts + np.bincount(sources, minlength=len(self.names))
        self._counted = position, counts
        return dict(zip(self.names, counts.tolist(), strict=True))

    def seen(self, position: int) -> np.ndarray:
        """(N,) bool: the samples that occur before ``position``."""
        seen = np.zeros(self.samples_per_epoch, bool)
        whole, rest = divmod(position, int(self._ends[-1]))
        for positions in _pieces(position - rest, position):
            seen[self.numbers(positions)] = True
        for stream in self._streams:
            if whole * stream.places >= stream.size:
                seen[stream.first : stream.first + stream.size] = True
                continue
            for places in _pieces(0, whole * stream.places):
                seen[self._shuffled(stream, places)] = True
        return seen

    def _shuffled(self, stream: _Stream, places: np.ndarray) -> np.ndarray:
        """Numbers at ``places`` of an endless stream: one permutation of its samples after another."""
        epochs, rests = np.divmod(places, stream.size)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            key = (ORDER_STREAM, self.seed, int(epoch), stream.key)
            numbers[of_epoch] = permuted(rests[of_epoch], stream.size, *key)
        return numbers + stream.first


def _pieces(start: int, end: int) -> Iterator[np.ndarray]:
    """``range(start, end)``, a block at a time: what is computed of 50 million places at once takes gigabytes."""
    for first in range(start, end, BLOCK):
        yield np.arange(first, min(first + BLOCK, end))


def _places(sizes: Mapping[str, int], weights: Mapping[str, float]) -> list[int]:
    """Places of each source in a block: its share, by largest remainder."""
    if set(sizes) != set(weights):
        raise UserError(f"weights are given for {sorted(weights)}, sources are {sorted(sizes)}; weigh all or none")
    wrong = {n: w for n, w in weights.items() if not isinstance(w, int | float) or not 0 < w < math.inf}
    if wrong:
        raise UserError(
            f"weights of sources must be numbers above 0, not {wrong}; leave out a source that is not wanted"
        )
    shares = np.array([weights[name] for name in sizes]) / sum(weights.values()) * BLOCK
    places = np.floor(shares).astype(int)
    places[np.argsort(places - shares, kind="stable")[: BLOCK - places.sum()]] += 1
    if not places.all():
        lost = [name for name, count in zip(sizes, places, strict=True) if not count]
        raise UserError(f"weight of {lost} is less than 1 in {BLOCK} of all; raise it, or leave the source out")
    return places.tolist()
