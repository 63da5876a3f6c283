"""Streams of small shards, and what comes out of them."""

from __future__ import annotations

from itertools import islice

import fsspec

from quiltnet.data.remote_shards import RemoteShard
from quiltnet.data.streaming import StreamedPair, UnitStream
from tests.data.http_server import QUICK, pack_samples

COUNTS = [3, 1, 6, 2, 5, 1, 4]


def in_memory(counts: list[int], *, known: bool = True) -> list[RemoteShard]:
    for shard, count in enumerate(counts):
        fsspec.filesystem("memory").pipe(f"/{len(counts)}-{sum(counts)}/{shard}.tar", pack_samples(shard, count))
    folder = f"memory://{len(counts)}-{sum(counts)}"
    return [RemoteShard(f"{folder}/{n}.tar", count if known else None) for n, count in enumerate(counts)]


def stream(shards: list[RemoteShard], *, seed: int = 0, unit: int = 0, units: int = 1, **options: object) -> UnitStream:
    options = {"shuffle_buffer": 5, "shards_at_once": 2, "patience": QUICK, **options}
    return UnitStream(shards, seed=seed, unit=unit, units=units, **options)


def take(unit: UnitStream, count: int, slot: int = 0) -> list[StreamedPair]:
    started = unit.start(slot)
    try:
        return list(islice(started, count))
    finally:
        started.close()


def keys(unit: UnitStream, count: int, slot: int = 0) -> list[str]:
    return [streamed.pair.key for streamed in take(unit, count, slot)]


def rejected(streamed: list[StreamedPair]) -> list[tuple[str, str]]:
    return [rejection for one in streamed for rejection in one.rejected]
