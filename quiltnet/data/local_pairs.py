"""The training stream over local shards, by random access."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from quiltnet.data.mixing import Mixture
from quiltnet.data.shard_files import ShardFile, ShardSpec, resolve_shards
from quiltnet.data.stored_pairs import StoredPair, StoredPairs


class WeightedShards(Protocol):
    shards: ShardSpec
    weight: float | None


class LocalPairs:
    """Samples of one source or several, at every position of the stream.

    Attributes:
        samples_per_epoch: samples of all sources.
        missing: number of samples, by shard, that were promised and are not there.
    """

    def __init__(self, pairs: StoredPairs, mixture: Mixture) -> None:
        self.samples_per_epoch = len(pairs)
        self.missing = pairs.missing
        self._pairs = pairs
        self._mixture = mixture

    def supply(self, positions: Sequence[int], tell: Callable[[str], None]) -> LocalSupply:
        """What a BatchMaker takes the pairs at ``positions`` from. tell: is called with what is being read."""
        return LocalSupply(self._pairs, self._mixture, self._mixture.numbers(positions), tell)

    def describe(self) -> dict[str, int | str]:
        """Counts, and a checksum of names, of what a manifest says, and of what is there: sizes and ends of tars."""
        shards = self._pairs.shards
        digest = hashlib.sha256()
        for shard, identity in zip(shards, self._pairs.identities, strict=True):
            digest.update(f"{shard.path.name} {shard.sha256} {identity}\n".encode())
        return {"samples": self.samples_per_epoch, "tars": len(shards), "sha256": digest.hexdigest()}

    def source_counts(self, position: int) -> dict[str, int]:
        """Samples of each source before ``position``; empty where there is one source."""
        return self._mixture.counts(position) if len(self._mixture.names) > 1 else {}

    def seen(self, position: int) -> np.ndarray:
        """(N,) bool: the samples that occur before ``position``."""
        return self._mixture.seen(position)


class LocalSupply:
    """The pairs of one batch. numbers: (B,) int64"""

    def __init__(self, pairs: StoredPairs, mixture: Mixture, numbers: np.ndarray, tell: Callable[[str], None]) -> None:
        self.rejected: list[tuple[str, str]] = []
        self._pairs = pairs
        self._mixture = mixture
        self._numbers = numbers.tolist()
        self._tell = tell

    def first(self, row: int) -> tuple[StoredPair, int]:
        return self._read(self._numbers[row])

    def another(self, row: int, rng: np.random.Generator) -> tuple[StoredPair, int]:
        """One of the same source."""
        return self._read(int(rng.integers(*self._mixture.span(self._numbers[row]))))

    def _read(self, number: int) -> tuple[StoredPair, int]:
        self._tell(f"reading or decoding sample {number}, in {self._pairs.shard_of(number)}")
        return self._pairs[number], number


def open_local(
    sources: Mapping[str, WeightedShards], *, seed: int, report: Callable[[int, int], None] | None = None
) -> LocalPairs:
    """Open the shards of all sources; they must be on this machine.

    Raises:
        UserError: see ``resolve_shards``, ``StoredPairs`` and ``Mixture``.
    """
    shards: list[ShardFile] = []
    bounds = [0]
    for source in sources.values():
        shards += resolve_shards(source.shards)
        bounds.append(len(shards))
    pairs = StoredPairs(shards, report)
    sizes = {name: sum(pairs.counts[first:end]) for name, (first, end) in zip(sources, pairwise(bounds), strict=True)}
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    return LocalPairs(pairs, Mixture(sizes, weights or None, seed=seed))
