"""A unit's samples as they are read: window after window, several shards in turn, every slot accounted for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, Protocol

import numpy as np

from quiltnet.data.decoding import BrokenSample
from quiltnet.data.remote_files import Report, Unreachable
from quiltnet.data.remote_shards import RemoteShard, place_of
from quiltnet.data.remote_sources import without_secrets
from quiltnet.data.stored_pairs import WANTED_EXTENSIONS, StoredPair, pair_from_members
from quiltnet.data.stream_order import WINDOW_STREAM, Share, Span, draw, taken_in_turn
from quiltnet.data.tar_stream import BrokenTar, TarSample, read_samples
from quiltnet.errors import UserError

# Of so many shards in a row without one usable sample, or of all if they are fewer, it is said that something is wrong.
BARREN_SHARDS = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenSlot:
    """A slot whose sample cannot be used. name: its key, or its shard's URL where not even that is known."""

    name: str
    reason: str


@dataclass(frozen=True)
class Window:
    """Samples that are shuffled together.

    Attributes:
        key: what its draws are seeded by: seed, epoch, and two numbers for the place of its first slot.
        items: in the order of reading.
        order: (len(items),) int64, in which they are given out.
        readable: those that are samples.
    """

    key: tuple[int, int, int, int]
    items: list[StoredPair | BrokenSlot]
    order: np.ndarray = field(init=False)
    readable: list[StoredPair] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", draw(WINDOW_STREAM, *self.key).permutation(len(self.items)))
        object.__setattr__(self, "readable", [item for item in self.items if isinstance(item, StoredPair)])


class OpensShards(Protocol):
    def open(self, shard: RemoteShard) -> BinaryIO:
        """At the first byte, buffered. Raises Unreachable, here or from ``read``."""

    def discard(self, shard: RemoteShard) -> None:
        """Its bytes turned out to be damaged."""


class WindowReader:
    """Reads the windows of one unit, without end.

    Where counts are known, a shard yields as many items as it should: those that it lacks are broken slots, so that no
    place behind it moves. Where they are not, what breaks off a shard is one broken slot.
    """

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        share: Share,
        *,
        shuffle_buffer: int,
        shards_at_once: int,
        opener: OpensShards,
        report: Report,
    ) -> None:
        self._shards = shards
        self._counts = [shard.samples for shard in shards]
        self._are_known = None not in self._counts
        self._share = share
        self._shuffle_buffer = shuffle_buffer
        self._shards_at_once = shards_at_once
        self._opener = opener
        self._report = report
        self._counted: dict[int, int] = {}
        self._barren: dict[int, str] = {}  # shards that gave nothing since the last usable sample, and why
        self._noted: set[int] = set()

    def locate(self, slot: int) -> tuple[int, int]:
        """(epoch, place in it) of the sample that the unit gives out after ``slot`` others.

        Where counts are not known, all that lies before is read through.
        """
        if self._are_known:
            low, high = self._share.slots(sum(self._counts))
            return divmod(slot, high - low)
        epoch = 0
        while True:
            place = slot
            for span in self._spans(epoch):
                slot -= self._length(span)
                if slot < 0:
                    return epoch, place
            if slot == place:
                raise UserError("the shards of this unit are all empty; leave them out, or use fewer workers")
            epoch += 1

    def windows(self, epoch: int, place: int) -> Iterator[Window]:
        """From the window that holds ``place`` on."""
        place -= place % self._shuffle_buffer
        while True:
            with closing(self._items(epoch, place)) as items:
                while batch := self._fill(items):
                    yield Window(self._key(epoch, place), batch)
                    place += len(batch)
            if place == 0:
                raise UserError("the shards of this unit are all empty; leave them out, or use fewer workers")
            epoch, place = epoch + 1, 0

    def _key(self, epoch: int, place: int) -> tuple[int, int, int, int]:
        if self._are_known:
            return self._share.seed, epoch, 0, self._share.slots(sum(self._counts))[0] + place
        return self._share.seed, epoch, 1 + self._share.unit, place

    def _fill(self, items: Iterator[StoredPair | BrokenSlot]) -> list[StoredPair | BrokenSlot]:
        window, said = [], 0.0
        for item in islice(items, self._shuffle_buffer):
            window.append(item)
            if time.monotonic() - said > 1:
                said = time.monotonic()
                self._report(f"filling shuffle buffer {len(window)}/{self._shuffle_buffer}", "")
        return window

    def _spans(self, epoch: int) -> list[Span]:
        return self._share.spans(self._counts, epoch)

    def _items(self, epoch: int, place: int) -> Iterator[StoredPair | BrokenSlot]:
        """What is read in an epoch from ``place`` on: groups of spans, one sample of each in turn."""
        spans = self._spans(epoch)
        for start in range(0, len(spans), self._shards_at_once):
            group = spans[start : start + self._shards_at_once]
            lengths = [self._length(span) for span in group] if place else []
            if place and place >= sum(lengths):
                place -= sum(lengths)
                continue
            taken, following = taken_in_turn(lengths, place) if place else ([0] * len(group), 0)
            place = 0
            parts = list(zip(group, taken, strict=True))
            yield from _in_turn([self._read(*part) for part in parts[following:] + parts[:following]])

    def _length(self, span: Span) -> int:
        if span.end is not None:
            return span.end - span.first
        if span.shard not in self._counted:
            self._counted[span.shard] = self._count(self._shards[span.shard])
        return self._counted[span.shard]

    def _count(self, shard: RemoteShard) -> int:
        """As many items as ``_read`` yields of a whole shard, found by reading it through."""
        self._report("counting", without_secrets(shard.url))
        count = 0
        try:
            with self._opener.open(shard) as file:
                for _ in read_samples(file, ()):
                    count += 1
        except (BrokenTar, Unreachable):
            count += 1
        return count

    def _read(self, span: Span, skipped: int) -> Iterator[StoredPair | BrokenSlot]:
        shard = self._shards[span.shard]
        place = without_secrets(shard.url)
        number, lost, reason = span.first + skipped, 0, "missing_sample"
        if number == span.end:
            return
        defect = "no samples"  # the last thing that was wrong
        self._report("reading", place)
        try:
            with self._opener.open(shard) as file:
                for sample in read_samples(file, WANTED_EXTENSIONS, number):
                    if number == span.end:
                        self._note(span.shard, f"{place} holds more samples than the {span.end} that are promised")
                        break
                    item = _judged(sample, place_of(shard.url))
                    if isinstance(item, StoredPair):
                        defect = ""
                        self._barren.clear()
                    elif defect:
                        defect = item.reason
                    yield item
                    number += 1
                    if number == span.end and span.end != shard.samples:
                        break
        except (BrokenTar, Unreachable) as error:
            lost, reason = 1, error.reason
            defect = defect and reason
            self._note(span.shard, f"{place}: {reason}" if isinstance(error, BrokenTar) else f"{reason}: {error}")
        lost = lost if span.end is None else span.end - number
        if lost:
            self._opener.discard(shard)
        for _ in range(lost):
            yield BrokenSlot(place, reason)
        if defect:
            self._barren[span.shard] = f"{place}: {defect}"
            self._check_barren()

    def _check_barren(self) -> None:
        if len(self._barren) >= min(BARREN_SHARDS, len(self._shards)):
            raise UserError(
                f"{len(self._barren)} shards in a row gave not one usable sample; the last is "
                f"{list(self._barren.values())[-1]}; check the URL, the network, and the shards"
            )

    def _note(self, shard: int, what: str) -> None:
        """Said once of a shard, whatever else happens to it."""
        if shard not in self._noted:
            self._noted.add(shard)
            log.warning("%s", what)


def _judged(sample: TarSample, place: str) -> StoredPair | BrokenSlot:
    try:
        if sample.defect:
            raise BrokenSample(sample.defect)
        return pair_from_members(sample.key, sample.members, place)
    except BrokenSample as error:
        # The cut may have fallen between the members of a sample.
        return BrokenSlot(sample.key, "truncated_tar" if sample.is_last_before_cut else error.reason)


def _in_turn(readers: list[Iterator[StoredPair | BrokenSlot]]) -> Iterator[StoredPair | BrokenSlot]:
    while readers:
        for reader in list(readers):
            item = next(reader, None)
            if item is None:
                readers.remove(reader)
            else:
                yield item
