"""The training stream over remote shards, read from front to back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from quiltnet.data.mixing import Mixture
from quiltnet.data.remote_shards import RemoteShard, resolve_remote
from quiltnet.data.remote_sources import without_secrets
from quiltnet.data.shard_cache import ShardCache
from quiltnet.data.stored_pairs import StoredPair
from quiltnet.data.streaming import PairStream, UnitStream
from quiltnet.errors import UserError

NO_NUMBER = -1


class WeightedShards(Protocol):
    shards: Any
    weight: float | None


class StreamedPairs:
    """Samples of one source or several, for this rank's batches.

    Global batch k is made by unit ``rank * workers + k % workers``, each of which reads a part of every source. So
    what a batch holds depends on ranks, workers and batch size, but on nothing else; and after a stop the same layout
    goes on with the samples that would have come.

    Attributes:
        samples_per_epoch: samples of all sources.
        missing: empty; what turns out to be missing is reported as it is met.
    """

    def __init__(
        self,
        streams: list[list[RemoteShard]],
        mixture: Mixture,
        *,
        rank: int,
        world_size: int,
        workers: int,
        global_batch_size: int,
        options: Mapping[str, Any],
    ) -> None:
        self.samples_per_epoch = mixture.samples_per_epoch
        self.missing: dict[str, int] = {}
        self._streams = streams
        self._mixture = mixture
        self._rank = rank
        self._loaders = max(workers, 1)
        self._units = world_size * self._loaders
        self._global_batch_size = global_batch_size
        self._batch_size = global_batch_size // world_size
        self._options = dict(options)
        self._open: list[PairStream] = []
        self._expected: tuple[int, int] | None = None
        self._make(unit=rank * self._loaders, tell=None)  # refuses what cannot be served before anything starts

    def supply(self, positions: range, tell: Callable[[str], None]) -> StreamedSupply:
        """What a BatchMaker takes the pairs at ``positions`` from. tell: is called with what is being read."""
        batch, apart = divmod(positions.start - self._rank * self._batch_size, self._global_batch_size)
        if apart or len(positions) != self._batch_size:
            raise UserError(
                f"streamed shards go on at whole batches, not after {positions.start} samples; keep global_batch_size"
            )
        unit, nth = self._rank * self._loaders + batch % self._loaders, batch // self._loaders
        if self._expected != (unit, nth):
            self._start(unit, batch, tell)
        self._expected = (unit, nth + 1)
        which, _ = self._mixture.split(np.asarray(positions))
        return StreamedSupply([self._open[stream] for stream in which])

    def describe(self) -> dict[str, int | str]:
        digest = hashlib.sha256()
        tars = 0
        for shard in (shard for stream in self._streams for shard in stream):
            digest.update(f"{without_secrets(shard.url)} {shard.sha256 or shard.samples}\n".encode())
            tars += 1
        facts = {"samples": self.samples_per_epoch, "tars": tars, "sha256": digest.hexdigest()}
        return {**facts, "loaders": self._units}

    def source_counts(self, position: int) -> dict[str, int]:
        """Samples of each source before ``position``; empty where there is one source, or no weights."""
        return self._mixture.counts(position) if len(self._streams) > 1 else {}

    def seen(self, position: int) -> None:
        """What a streamed run has had is not known by number."""

    def _make(self, unit: int, tell: Callable[[str], None] | None) -> list[UnitStream]:
        report = None if tell is None else lambda stage, shard: tell(f"{stage} {shard}".strip())
        seeded = {"seed": self._mixture.seed, "unit": unit, "units": self._units, "report": report, **self._options}
        return [UnitStream(shards, **seeded) for shards in self._streams]

    def _start(self, unit: int, batch: int, tell: Callable[[str], None]) -> None:
        for stream in self._open:
            stream.close()
        taken = self._taken(batch)
        self._open = [stream.start(count) for stream, count in zip(self._make(unit, tell), taken, strict=True)]

    def _taken(self, batch: int) -> list[int]:
        """Samples that the unit of a batch has taken of each stream before that batch."""
        before = range(batch % self._loaders, batch, self._loaders)
        if len(self._streams) == 1:
            return [len(before) * self._batch_size]
        taken = np.zeros(len(self._streams), np.int64)
        for earlier in before:
            first = earlier * self._global_batch_size + self._rank * self._batch_size
            which, _ = self._mixture.split(np.arange(first, first + self._batch_size))
            taken += np.bincount(which, minlength=len(taken))
        return taken.tolist()


class StreamedSupply:
    """The pairs of one batch. streams: B, what each row is taken from."""

    def __init__(self, streams: list[PairStream]) -> None:
        self.rejected: list[tuple[str, str]] = []
        self._streams = streams

    def first(self, row: int) -> tuple[StoredPair, int]:
        streamed = next(self._streams[row])
        self.rejected += streamed.rejected
        return streamed.pair, NO_NUMBER

    def another(self, row: int, rng: np.random.Generator) -> tuple[StoredPair, int]:
        return self._streams[row].substitute(rng), NO_NUMBER


def open_remote(
    sources: Mapping[str, WeightedShards],
    *,
    seed: int,
    rank: int,
    world_size: int,
    workers: int,
    global_batch_size: int,
    samples_per_epoch: int | None = None,
    allow_pipe: bool = False,
    cache: ShardCache | None = None,
    **options: Any,
) -> StreamedPairs:
    """Look up the shards of all sources.

    Args:
        samples_per_epoch: N, for shards that no manifest counts.
        options: ``shuffle_buffer``, ``shards_at_once``, ``patience`` of ``UnitStream``.

    Raises:
        UserError: see ``resolve_remote``, ``UnitStream`` and ``Mixture``; or N is not known.
    """
    resolved = {
        name: resolve_remote(source.shards, allow_pipe=allow_pipe, patience=options.get("patience"))
        for name, source in sources.items()
    }
    counts = [shard.samples for shards in resolved.values() for shard in shards]
    if samples_per_epoch is None and None in counts:
        raise UserError(
            "no manifest counts these remote shards; say data.stream.samples_per_epoch=…, which turns epochs into "
            "samples, or pack them again with `quiltnet shard --format webdataset`"
        )
    sizes = {name: sum(shard.samples or 0 for shard in shards) or 1 for name, shards in resolved.items()}
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    mixture = Mixture(sizes, weights or None, seed=seed)
    mixture.samples_per_epoch = samples_per_epoch or mixture.samples_per_epoch
    streams = list(resolved.values()) if weights else [[shard for shards in resolved.values() for shard in shards]]
    return StreamedPairs(
        streams,
        mixture,
        rank=rank,
        world_size=world_size,
        workers=workers,
        global_batch_size=global_batch_size,
        options={"allow_pipe": allow_pipe, "cache": cache, **options},
    )
