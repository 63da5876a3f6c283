"""Which samples of remote shards a unit reads, and in which order: functions of seed, epoch and counts alone.

A unit is one loader worker of one rank. The sequence of an epoch is the shards in an order drawn from (seed, epoch),
their samples one shard after another: N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# First word of each seed, so that these are drawn independently, of each other and of the orders of local shards.
SHARD_STREAM, WINDOW_STREAM, STAND_IN_STREAM = 20, 21, 22


@dataclass(frozen=True)
class Span:
    """Samples ``[first, end)`` of a shard, by its number in the list; to its end where ``end`` is None."""

    shard: int
    first: int
    end: int | None


@dataclass(frozen=True)
class Share:
    """Which part of the stream a unit has. unit: in [0, units)."""

    seed: int
    unit: int
    units: int

    def slots(self, samples: int) -> tuple[int, int]:
        """First slot and end of the unit's part of an epoch of ``samples``."""
        return self.unit * samples // self.units, (self.unit + 1) * samples // self.units

    def spans(self, counts: Sequence[int | None], epoch: int) -> list[Span]:
        """What the unit reads in an epoch, of shards with so many samples each.

        Where all counts are known, a contiguous part of the epoch's slots: any number of units shares any number of
        shards. Otherwise every U-th shard, whole.
        """
        order = np.random.default_rng([SHARD_STREAM, self.seed, epoch]).permutation(len(counts)).tolist()
        if any(count is None for count in counts):
            return [Span(shard, 0, None) for shard in order[self.unit :: self.units]]
        low, high = self.slots(sum(counts))
        spans, start = [], 0
        for shard in order:
            first, end = max(low - start, 0), min(high - start, counts[shard])
            if first < end:
                spans.append(Span(shard, first, end))
            start += counts[shard]
        return spans


def taken_in_turn(lengths: Sequence[int], count: int) -> tuple[list[int], int]:
    """Where ``count`` samples have been read of several spans, one of each in turn.

    Returns:
        How many of each span, and the number of the span that is next.
    """
    rounds, left = 0, count
    alive = [length for length in lengths if length]
    while alive and left >= len(alive):  # whole rounds, up to where the next span ends
        step = min(min(alive) - rounds, left // len(alive))
        rounds += step
        left -= step * len(alive)
        alive = [length for length in alive if length > rounds]
    taken, following = [], None
    for number, length in enumerate(lengths):
        extra = int(length > rounds and left > 0)
        left -= extra
        taken.append(min(length, rounds) + extra)
        if following is None and length > rounds and not extra:
            following = number
    return taken, following or 0


def draw(stream: int, *key: int) -> np.random.Generator:
    """A generator of its own for a window or a slot. key: four numbers."""
    return np.random.default_rng([stream, *key])
