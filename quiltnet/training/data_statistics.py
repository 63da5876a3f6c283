"""What a run says of the pairs it is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quiltnet.distributed import all_gather_object

TRACKED_SAMPLES = 1_000_000  # of larger sets every n-th sample is followed


class DrawnPairs(Protocol):
    image_id: Tensor  # (B,) int64
    number: Tensor  # (B,) int64, -1 where it is not known
    truncated: Tensor  # (B,) bool


class DataStatistics:
    """Repeats, cuts and coverage of the training stream, over all ranks.

    Args:
        samples_per_epoch: N.
        seen: (N,) bool, the samples that an earlier part of this run has had.
        source_counts: position -> samples of each source before it; empty for a single source.
    """

    def __init__(
        self,
        samples_per_epoch: int,
        seen: np.ndarray | None = None,
        source_counts: Callable[[int], Mapping[str, int]] = lambda position: {},
    ) -> None:
        self._stride = -(-samples_per_epoch // TRACKED_SAMPLES)
        tracked = len(range(0, samples_per_epoch, self._stride))
        self._seen = np.zeros(tracked, bool) if seen is None else seen[:: self._stride].copy()
        self._source_counts = source_counts
        self._truncated = self._pairs = 0
        self._image_ids: Tensor = torch.zeros(0, dtype=torch.int64)
        self._is_numbered = True

    def add(self, batch: DrawnPairs) -> None:
        self._pairs += len(batch.truncated)
        self._truncated += int(batch.truncated.sum())
        self._image_ids = batch.image_id
        numbers = batch.number.numpy()
        self._is_numbered = self._is_numbered and bool((numbers >= 0).all())
        self._seen[numbers[numbers % self._stride == 0] // self._stride] = True

    def collect(self, samples_seen: int) -> dict[str, float]:  # all ranks
        """Metrics since the last call.

        ``data/truncated_captions``: share of captions that the model's context cut. ``data/duplicate_images_in_batch``:
        share of pairs in the newest global batch that share their image with another one. ``data/unique_coverage``:
        share of the data set's samples that the run has had. ``data/samples_of_…``: by source, since the run began.
        """
        mine = (self._truncated, self._pairs, self._image_ids.numpy(), np.packbits(self._seen), self._is_numbered)
        truncated, pairs, image_ids, seen, is_numbered = zip(*all_gather_object(mine), strict=True)
        self._truncated = self._pairs = 0
        _, times = np.unique(np.concatenate(image_ids), return_counts=True)
        metrics = {
            "data/truncated_captions": sum(truncated) / sum(pairs),
            "data/duplicate_images_in_batch": float(times[times > 1].sum() / times.sum()),
        }
        if all(is_numbered):
            bits = np.unpackbits(np.bitwise_or.reduce(seen), count=len(self._seen))
            metrics["data/unique_coverage"] = float(bits.mean())
        counts = self._source_counts(samples_seen)
        return metrics | {f"data/samples_of_{name}": float(count) for name, count in counts.items()}
