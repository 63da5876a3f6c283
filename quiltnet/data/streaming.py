"""Remote shards as streams of pairs, one for each unit: a loader worker of a rank.

What a unit gives out is a function of seed, unit, number of units and counts: a place in it is one number, and there is
no state to save. To that end it shuffles within windows instead of a running buffer: it reads ``shuffle_buffer``
samples, gives them out in an order drawn for this window, and reads the next window meanwhile.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from quiltnet.data.remote_files import RemoteFile, Report
from quiltnet.data.remote_shards import RemoteShard
from quiltnet.data.remote_sources import Patience, open_source, without_secrets
from quiltnet.data.shard_cache import ShardCache
from quiltnet.data.stored_pairs import StoredPair
from quiltnet.data.stream_order import STAND_IN_STREAM, Share, draw
from quiltnet.data.stream_windows import Window, WindowReader
from quiltnet.errors import UserError

# Of fewer samples no stand-in is drawn: the window that is next helps out.
ENOUGH_STAND_INS = 16


@dataclass(frozen=True)
class StreamedPair:
    """A sample, and (key or URL, reason) of those that it stands in for."""

    pair: StoredPair
    rejected: list[tuple[str, str]] = field(default_factory=list)


class UnitStream:
    """What one unit reads of remote shards. It holds nothing open, and pickles; ``start`` reads.

    Args:
        shards: as ``resolve_remote`` gives them.
        seed: of all orders.
        unit: number of this unit.
        units: ranks x workers of a rank (or x 1 without workers).
        shuffle_buffer: samples of a window; encoded images of two windows are in memory.
        shards_at_once: shards that are read in turn, to mix more of them in a window.
        cache: keeps whole shards on a local disk.
        allow_pipe: the user said that commands may run.
        patience: with bad connections.
        report: told (stage, shard) now and then, from the thread that reads.

    Raises:
        UserError: numbers that cannot be, more units than can be served, or a command that was not allowed.
    """

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        *,
        seed: int,
        unit: int,
        units: int,
        shuffle_buffer: int = 2000,
        shards_at_once: int = 4,
        cache: ShardCache | None = None,
        allow_pipe: bool = False,
        patience: Patience | None = None,
        report: Report | None = None,
    ) -> None:
        _check(shards, seed, unit, units, shuffle_buffer, shards_at_once)
        self.shards = list(shards)
        self._share = Share(seed, unit, units)
        self._shuffle_buffer = shuffle_buffer
        self._shards_at_once = shards_at_once
        self._cache = cache
        self._allow_pipe = allow_pipe
        self._patience = patience or Patience()
        self._report = report
        open_source(self.shards[0].url, self._patience, allow_pipe=allow_pipe).close()

    def start(self, slot: int = 0) -> PairStream:
        """The unit's samples without end, after ``slot`` of them (counted from the begin of the run, over all epochs)
        have been given out."""
        stop = threading.Event()
        report = self._report or _say_nothing
        opener = _Opener(self._cache, self._allow_pipe, self._patience, report, stop)
        reader = WindowReader(
            self.shards,
            self._share,
            shuffle_buffer=self._shuffle_buffer,
            shards_at_once=self._shards_at_once,
            opener=opener,
            report=report,
        )
        return PairStream(reader, slot, self._shuffle_buffer, stop)


class PairStream:
    """An endless iterator; ``close`` ends its thread, as does dropping it."""

    def __init__(self, reader: WindowReader, slot: int, shuffle_buffer: int, stop: threading.Event) -> None:
        epoch, place = reader.locate(slot)
        self._windows = _Ahead(reader.windows(epoch, place), stop)
        self._end = weakref.finalize(self, self._windows.close)  # at the latest when the process ends
        self._coming: deque[Window] = deque()  # taken early, for the sake of their samples
        self._window: Window | None = None
        self._next = place % shuffle_buffer

    def __iter__(self) -> Iterator[StreamedPair]:
        return self

    def __next__(self) -> StreamedPair:
        """Raises UserError where nothing can be read."""
        if self._window is None:
            self._window = self._windows.take()
        while self._next >= len(self._window.items):
            self._next -= len(self._window.items)
            self._window = self._coming.popleft() if self._coming else self._windows.take()
        window, place = self._window, self._next
        self._next += 1
        item = window.items[window.order[place]]
        if isinstance(item, StoredPair):
            return StreamedPair(item)
        seed, epoch, unit, start = window.key
        stand_in = self.substitute(draw(STAND_IN_STREAM, seed, epoch, unit, start + place))
        return StreamedPair(stand_in, [(item.name, item.reason)])

    def substitute(self, rng: np.random.Generator) -> StoredPair:
        """Another sample of the window that the last one came from; where that has less than 16, of the next ones as
        well. Raises UserError where nothing can be read."""
        pairs = list(self._window.readable)
        ahead = 0
        while len(pairs) < ENOUGH_STAND_INS:
            if ahead == len(self._coming):
                self._coming.append(self._windows.take())
            window = self._coming[ahead]
            if pairs and window.key[1] > self._window.key[1] + 1:  # a whole epoch has no more
                break
            pairs += window.readable
            ahead += 1
        return pairs[int(rng.integers(len(pairs)))]

    def close(self) -> None:
        self._end()


@dataclass(frozen=True)
class _Opener:
    """Opens shards for one ``PairStream``."""

    cache: ShardCache | None
    allow_pipe: bool
    patience: Patience
    report: Report
    stop: threading.Event

    def open(self, shard: RemoteShard) -> BinaryIO:
        if self.cache is not None:
            self.report("looking in the cache for", without_secrets(shard.url))
            cached = self.cache.open(shard, lambda: self._connect(shard))
            if cached is not None:
                return cached
        return self._connect(shard)

    def discard(self, shard: RemoteShard) -> None:
        if self.cache is not None:
            self.cache.discard(shard)

    def _connect(self, shard: RemoteShard) -> RemoteFile:
        return RemoteFile(shard.url, self.patience, allow_pipe=self.allow_pipe, report=self.report, stop=self.stop)


class _Ahead:
    """Runs an iterator of windows in a thread of its own, one window ahead of who takes them."""

    def __init__(self, windows: Iterator[Window], stop: threading.Event) -> None:
        self._windows = windows
        self._stop = stop
        self._may_read = threading.Semaphore(1)
        self._read: queue.SimpleQueue[Window | BaseException] = queue.SimpleQueue()
        self._error: BaseException | None = None
        # A daemon: a process that ends does not wait for what a server is slow to send.
        threading.Thread(target=self._run, name="read ahead", daemon=True).start()

    def take(self) -> Window:
        """The next window; from here on, the one behind it is read."""
        if self._error is None:
            window = self._read.get()
            if isinstance(window, Window):
                self._may_read.release()
                return window
            self._error = window
        raise self._error

    def close(self) -> None:
        self._stop.set()
        self._may_read.release()

    def _run(self) -> None:
        try:
            while True:
                self._may_read.acquire()
                if self._stop.is_set():
                    raise ValueError("the stream is closed")
                self._read.put(next(self._windows))
        except BaseException as error:  # raised where the window is waited for
            self._read.put(error)
        finally:
            self._windows.close()


def _say_nothing(stage: str, shard: str) -> None:
    """What a unit reports to nobody."""


def _check(
    shards: Sequence[RemoteShard], seed: int, unit: int, units: int, shuffle_buffer: int, shards_at_once: int
) -> None:
    if not shards:
        raise UserError("no shards are named; give a folder of shards, a tar, or a list of them")
    if seed < 0:
        raise UserError(f"seed={seed}; seeds count from 0: give a number of 0 or more")
    if shuffle_buffer < 1 or shards_at_once < 1:
        raise UserError(f"shuffle_buffer={shuffle_buffer}, shards_at_once={shards_at_once}: both are at least 1")
    if not 0 <= unit < units:
        raise UserError(f"unit {unit} of {units}; units are numbered from 0 to {units - 1}")
    counts = [shard.samples for shard in shards]
    if None in counts and len(shards) < units:
        raise UserError(
            f"{len(shards)} remote shards whose numbers of samples are not known cannot serve {units} loaders (ranks x "
            f"workers); use at most {len(shards)}, or give the shards a manifest: `quiltnet shard --format webdataset` "
            "packs them again, and any number of loaders can share them"
        )
    if None not in counts and sum(counts) < units:
        raise UserError(
            f"{sum(counts)} samples cannot serve {units} loaders (ranks x workers); use at most {sum(counts)}"
        )
