"""What is wrong, or worth knowing, with a shard set before anyone trains on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from quiltnet.data.copies import CopyFinder
from quiltnet.data.evaluation_sets import evaluation_portions
from quiltnet.data.examining import (
    CAPTION,
    CAPTION_FLAGS,
    IMAGE_FLAGS,
    SAMPLE,
    Portion,
    StoredImage,
    Truncated,
    examine,
    read_stored,
)
from quiltnet.data.near_duplicates import FLAT_CONTRAST, MAX_DISTANCE, NEAR_DISTANCE
from quiltnet.data.shard_sets import find_shard_set
from quiltnet.data.worker_pool import map_tasks
from quiltnet.errors import UserError

TRAIN_SPLIT = "train"

# Findings of the files themselves: any of them fails the check.
SHARD_DEFECTS = ("missing_shards", "unreadable_shards", "miscounted_shards", "changed_shards", "unlisted_shards")


@dataclass(frozen=True)
class Limits:
    """What may be found before the check fails. A share lies in 0..1; None lets any number pass.

    Attributes:
        broken: share of samples that cannot be used.
        leaks: images of a held-out split, or of an evaluation set, that another split has too.
        duplicates: share of images that are exact or near copies of another one of their split.
        duplicate_captions: share of captions that repeat another one of their split.
        truncated: share of captions that the tokeniser cuts.
    """

    broken: float | None = 0.01
    leaks: int | None = 0
    duplicates: float | None = None
    duplicate_captions: float | None = None
    truncated: float | None = None


@dataclass(frozen=True)
class Bounds:
    """Where the ordinary ends. near_distance: bits of 64; sides in pixels; aspect: longer by shorter side. turned:
    whether an image that was turned by right angles or mirrored is a near copy."""

    near_distance: int = NEAR_DISTANCE
    turned: bool = True
    tiny_side: int = 64
    giant_pixels: int = 16_777_216
    aspect: float = 4.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was found; ``leaks`` and copies name their sets behind a space.
        count: how often, among ``of`` (both in units).
        limit: as in ``Limits``, and what it is compared with: a share of ``of``, or the count.
        numbers: (count,) samples, or (count, 2) with the one that each is a copy of.
        details: what a count is made of, by reason.
        notes: (tar, what is wrong with it) for findings of shards.
    """

    name: str
    count: int
    of: int
    unit: str
    limit: float | None = None
    is_share: bool = True
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    details: dict[str, int] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0

    @property
    def is_above(self) -> bool:
        return self.limit is not None and (self.share if self.is_share else self.count) > self.limit


@dataclass(frozen=True)
class Facts:
    """All that was read: rows of samples and captions, and where each sample lies.

    Attributes:
        groups: names of splits, then of evaluation sets; ``splits`` says how many are splits.
        group: (N,) int, of each sample.
    """

    portions: list[Portion]
    starts: np.ndarray
    samples: np.ndarray
    captions: np.ndarray
    defects: list[tuple[str, str, str]]  # name, tar, detail
    groups: list[str]
    splits: int
    group: np.ndarray

    @property
    def is_own(self) -> np.ndarray:
        """(N,) bool: of the set that is checked, not of one it is compared with."""
        return self.group < self.splits

    def locate(self, number: int) -> tuple[Portion, int]:
        at = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.portions[at], number - int(self.starts[at])

    def read(self, number: int) -> StoredImage:
        return read_stored(*self.locate(number))

    def reason(self, number: int) -> str:
        return self.samples["reason"][number].decode()


@dataclass(frozen=True)
class Check:
    """Everything that was found; ``limits`` and ``bounds`` are those it was judged by."""

    facts: Facts
    findings: list[Finding]
    limits: Limits
    bounds: Bounds

    @property
    def passed(self) -> bool:
        return not any(finding.is_above for finding in self.findings)


def check_data(
    place: str | Path,
    *,
    against: Sequence[str] = (),
    limits: Limits | None = None,
    bounds: Bounds | None = None,
    checksums: bool = False,
    truncated: Truncated | None = None,
    workers: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> Check:
    """Read and decode everything once, then compare.

    Args:
        place: a shard set, one split of it, or a folder of any tars.
        against: evaluation sets, as ``evaluation_portions`` takes them.
        checksums: read every tar whole, too, and compare it with the manifest.
        truncated: captions -> whether the tokeniser cuts each; must pickle where there are several workers.
        workers: processes.
        progress: called with (portions done, all portions, samples seen).

    Raises:
        UserError: nothing to check, or a bound or limit that cannot be.
    """
    limits, bounds = limits or Limits(), bounds or Bounds()
    _check_request(limits, bounds)
    facts = _gather(place, against, checksums, truncated, workers, progress)
    findings = list(_findings(facts, limits, bounds, has_tokenizer=truncated is not None))
    return Check(facts, findings, limits, bounds)


def _gather(
    place: str | Path,
    against: Sequence[str],
    checksums: bool,
    truncated: Truncated | None,
    workers: int,
    progress: Callable[[int, int, int], None] | None,
) -> Facts:
    found = find_shard_set(place)
    portions = [
        Portion(split, shard.path, shard.entry, checksum=checksums)
        for split, shards in found.splits.items()
        for shard in shards
    ]
    defects = []
    if found.manifest is not None:
        unlisted = [shard for shard in found.shards if shard.entry is None]
        defects = [("unlisted_shards", str(shard.path), "the manifest does not list it") for shard in unlisted]
    groups = list(found.splits)
    for place, named in {os.path.abspath(Path(named).expanduser()): named for named in against}.items():
        name = Path(place).name
        groups.append(place if name in groups else name)
        portions += evaluation_portions(named, groups[-1])
    starts, samples, captions, of_group = [0], [np.zeros(0, SAMPLE)], [np.zeros(0, CAPTION)], [np.zeros(0, np.int64)]
    examined = map_tasks(partial(examine, truncated=truncated), portions, workers)
    for done, (portion, part) in enumerate(zip(portions, examined, strict=True), start=1):
        part.captions["sample"] += starts[-1]
        starts.append(starts[-1] + len(part.samples))
        samples.append(part.samples)
        captions.append(part.captions)
        of_group.append(np.full(len(part.samples), groups.index(portion.group)))
        defects += [(name, str(portion.tar), detail) for name, detail in part.defects]
        if progress is not None:
            progress(done, len(portions), starts[-1])
    joined = (np.array(starts), np.concatenate(samples), np.concatenate(captions), defects)
    return Facts(portions, *joined, groups, len(found.splits), np.concatenate(of_group))


def _findings(facts: Facts, limits: Limits, bounds: Bounds, *, has_tokenizer: bool) -> Iterator[Finding]:
    yield from _shard_findings(facts)
    yield from _broken_findings(facts, limits)
    yield from _copy_findings(facts, limits, bounds)
    yield from _caption_findings(facts, limits, has_tokenizer=has_tokenizer)
    yield from _image_findings(facts, bounds)


def _shard_findings(facts: Facts) -> Iterator[Finding]:
    tars = sum(portion.tar is not None for portion in facts.portions)
    for name in SHARD_DEFECTS:
        notes = [(tar, detail) for found, tar, detail in facts.defects if found == name]
        yield Finding(name, len(notes), tars, "shards", limit=0, is_share=False, notes=notes)


def _broken_findings(facts: Facts, limits: Limits) -> Iterator[Finding]:
    is_broken, own = facts.samples["reason"] != b"", facts.is_own
    for name, chosen, limit in (("broken", own, limits.broken), ("broken_evaluation_images", ~own, None)):
        numbers = np.flatnonzero(is_broken & chosen)
        reasons, times = np.unique(facts.samples["reason"][numbers], return_counts=True)
        details = {reason.decode(): int(count) for reason, count in zip(reasons, times, strict=True)}
        if name == "broken" or len(facts.groups) > facts.splits:
            total = int(chosen.sum())
            yield Finding(name, len(numbers), total, "samples", limit, numbers=numbers, details=details)
    yield _flagged(facts, "repeated_keys", facts.samples["repeated_key"], "samples")


def _copy_findings(facts: Facts, limits: Limits, bounds: Bounds) -> Iterator[Finding]:
    finder = CopyFinder(facts.samples, facts.group, bounds.near_distance, turned=bounds.turned)
    for split in range(facts.splits):
        copies = finder.within(split)
        images = int((facts.samples["decoded"] & (facts.group == split)).sum())
        parts = {"exact": len(copies.exact), "near": len(copies.near)}
        pairs = np.concatenate([copies.near, copies.exact])
        name = f"duplicates {facts.groups[split]}"
        yield Finding(name, len(copies), images, "images", limits.duplicates, numbers=pairs, details=parts)
    for one, other in combinations(range(len(facts.groups)), 2):
        if one >= facts.splits:  # two evaluation sets
            continue
        if other < facts.splits and facts.groups[other] == TRAIN_SPLIT:
            one, other = other, one
        copies = finder.between(one, other)
        images = int((facts.samples["decoded"] & (facts.group == other)).sum())
        parts = {"exact": len(copies.exact), "near": len(copies.near)}
        name = f"leaks {facts.groups[other]} in {facts.groups[one]}"
        pairs = np.concatenate([copies.near, copies.exact])
        yield Finding(name, len(copies), images, "images", limits.leaks, False, pairs, parts)


def _caption_findings(facts: Facts, limits: Limits, *, has_tokenizer: bool) -> Iterator[Finding]:
    captions = facts.captions[facts.is_own[facts.captions["sample"]]]
    repeats = []
    for split in range(facts.splits):
        mine = captions[facts.group[captions["sample"]] == split]
        _, first = np.unique(mine["id"], return_index=True)
        repeats.append(np.delete(mine["sample"], first))
    repeated = np.concatenate(repeats)
    share = limits.duplicate_captions
    yield Finding("duplicate_captions", len(repeated), len(captions), "captions", share, numbers=np.unique(repeated))
    if has_tokenizer:
        cut = captions["sample"][captions["truncated"]]
        numbers = np.unique(cut)
        yield Finding("truncated_captions", len(cut), len(captions), "captions", limits.truncated, numbers=numbers)
    for flag in CAPTION_FLAGS:
        yield _flagged(facts, flag, facts.samples[flag], "samples")


def _image_findings(facts: Facts, bounds: Bounds) -> Iterator[Finding]:
    samples = facts.samples
    for flag in IMAGE_FLAGS:
        yield _flagged(facts, flag, samples[flag], "samples")
    sides = np.stack([samples["height"], samples["width"]]).astype(np.int64)
    short, long = sides.min(axis=0), sides.max(axis=0)
    yield _flagged(facts, "tiny", (short > 0) & (short < bounds.tiny_side), "samples")
    is_giant = (short * long > bounds.giant_pixels) | (samples["reason"] == b"too_many_pixels")
    yield _flagged(facts, "giant", is_giant, "samples")
    yield _flagged(facts, "elongated", (short > 0) & (long > bounds.aspect * short), "samples")
    yield _flagged(facts, "flat", samples["decoded"] & (samples["contrast"] < FLAT_CONTRAST), "samples")


def _flagged(facts: Facts, name: str, flags: np.ndarray, unit: str) -> Finding:
    numbers = np.flatnonzero(flags & facts.is_own)
    return Finding(name, len(numbers), int(facts.is_own.sum()), unit, numbers=numbers)


def _check_request(limits: Limits, bounds: Bounds) -> None:
    for name, value in asdict(limits).items():
        if value is not None and not (value >= 0 and (value <= 1 or name == "leaks")):
            what = "a number of images, 0 or more" if name == "leaks" else "a share, between 0 and 1"
            raise UserError(f"--max-{name.replace('_', '-')} {value} is not {what}")
    if not 0 <= bounds.near_distance <= MAX_DISTANCE:
        raise UserError(
            f"--near-distance {bounds.near_distance} is not between 0 and {MAX_DISTANCE} bits (of 64); "
            f"{NEAR_DISTANCE} finds what was re-encoded or resized"
        )
    for name in ("tiny_side", "giant_pixels"):
        if getattr(bounds, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(bounds, name)}: pixels are counted from 0")
    if not bounds.aspect >= 1:
        raise UserError(f"--aspect {bounds.aspect}: the longer side by the shorter is 1 at least")
