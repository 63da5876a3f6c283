"""What became of every row: the report of each finished tar, and the totals of a manifest made from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from quiltnet.whole_files import write_whole

SMALL_SIDE = 64  # pixels: an image with a shorter side than this shows next to nothing at a model's input size
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


@dataclass
class ShardReport:
    """One planned tar, carried out. It is written down when the tar is on the disk: the two are what a stopped run
    finds again.

    Attributes:
        entry: of the manifest; None where not one of its samples could be used, and there is no tar.
        left_out: places, within the tar's plan, of samples that were rejected.
        rejected: rows by reason.
        words: captions by number of words.
        widths, heights: images by size in pixels; small: images with a side below ``SMALL_SIDE``.
    """

    entry: dict[str, Any] | None = None
    samples: int = 0
    captions: int = 0
    duplicate_captions: int = 0
    small: int = 0
    left_out: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)

    def accept(self, captions: Sequence[str], size: tuple[int, int], *, duplicates: int) -> None:
        """Count a sample. size: (width, height) of its image."""
        self.samples += 1
        self.captions += len(captions)
        self.duplicate_captions += duplicates
        self.words.update(len(caption.split()) for caption in captions)
        self.widths[size[0]] += 1
        self.heights[size[1]] += 1
        self.small += min(size) < SMALL_SIDE

    def save(self, path: Path) -> None:
        """Whole or absent."""
        write_whole(path, json.dumps(vars(self)))


def read_report(path: Path) -> ShardReport:
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name in ("words", "widths", "heights"):  # JSON's names are text
        saved[name] = Counter({int(number): count for number, count in saved[name].items()})
    return ShardReport(**{**saved, "rejected": Counter(saved["rejected"])})


class Totals:
    """Adds up reports, one at a time.

    Attributes:
        splits: of a manifest, with the tars that there are; those named at first are in it in any case.
    """

    def __init__(self, splits: Iterable[str] = ()) -> None:
        self.splits = {split: _no_shards() for split in splits}
        self._counts = Counter(samples=0, captions=0, duplicate_captions=0)
        self._small = 0
        self.rejected: Counter[str] = Counter()
        self._words: Counter[int] = Counter()
        self._widths: Counter[int] = Counter()
        self._heights: Counter[int] = Counter()
        self._images: dict[str, list[np.ndarray]] = {}
        self._sources: dict[str, list[np.ndarray]] = {}

    def add(self, report: ShardReport, split: str, images: np.ndarray, sources: np.ndarray) -> None:
        """images, sources: codes of the samples that were planned for the tar."""
        of_split = self.splits.setdefault(split, _no_shards())
        if report.entry is not None:
            of_split["samples"] += report.samples
            of_split["captions"] += report.captions
            of_split["shards"].append(report.entry)
        self._counts.update(
            samples=report.samples, captions=report.captions, duplicate_captions=report.duplicate_captions
        )
        self._small += report.small
        self.rejected.update(report.rejected)
        self._words.update(report.words)
        self._widths.update(report.widths)
        self._heights.update(report.heights)
        self._images.setdefault(split, []).append(np.unique(np.delete(images, report.left_out)))
        self._sources.setdefault(split, []).append(np.unique(np.delete(sources, report.left_out)))

    def as_dict(self) -> dict[str, Any]:
        """``totals`` of a manifest; see ``read_manifest``."""
        images, sources = _distinct(self._images), _distinct(self._sources)
        rejected = {reason: rows for reason, rows in sorted(self.rejected.items()) if rows}
        rows = self._counts["captions"] + self._counts["duplicate_captions"] + sum(rejected.values())
        return {
            "rows": rows,
            **self._counts,
            "images": _count(images),
            "sources": _count(sources),
            "rejected": rejected,
            "in_several_splits": {"images": _count_shared(images), "sources": _count_shared(sources)},
            "caption_words": quantiles(self._words),
            "image_sizes": {
                "width": quantiles(self._widths),
                "height": quantiles(self._heights),
                f"below_{SMALL_SIDE}": self._small,
            },
        }


def quantiles(counts: Mapping[int, int]) -> dict[str, int]:
    """Quantiles of whole numbers that are given by how often each occurs: always one of the numbers."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values.tolist()])
    # The smallest value that at least this share of all is not above (numpy's method "inverted_cdf").
    wanted = np.maximum(np.ceil(np.array(list(QUANTILES.values())) * ends[-1]), 1)
    return dict(zip(QUANTILES, values[np.searchsorted(ends, wanted)].tolist(), strict=True))


def write_rejection(file: TextIO, number: int, image_path: str | None, reason: str, detail: str = "") -> None:
    """One line of rejected.jsonl."""
    line = {"row": number, "image_path": image_path, "reason": reason, "detail": detail}
    file.write(json.dumps(line) + "\n")


def _no_shards() -> dict[str, Any]:
    return {"samples": 0, "captions": 0, "shards": []}


def _distinct(by_split: Mapping[str, list[np.ndarray]]) -> list[np.ndarray]:
    return [np.unique(np.concatenate(parts)) for parts in by_split.values()]


def _count(of_splits: list[np.ndarray]) -> int:
    return len(np.unique(np.concatenate(of_splits))) if of_splits else 0


def _count_shared(of_splits: list[np.ndarray]) -> int:
    shared = [np.intersect1d(one, other, assume_unique=True) for one, other in combinations(of_splits, 2)]
    return len(np.unique(np.concatenate(shared))) if shared else 0
