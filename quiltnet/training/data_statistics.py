"""What a run says of the pairs it is fed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quiltnet.distributed import all_gather_object, is_main

log = logging.getLogger(__name__)

TRACKED_SAMPLES = 1_000_000  # of larger sets every n-th sample is followed
# Of a batch's pairs. Up to 30 % no mode of loss.duplicates differed from another by more than seeds do; where nearly
# all pairs share, mask lost 2.6 points of recall (benchmarks/RESULTS.md).
HARMLESS_SHARE, MASKABLE_SHARE = 0.3, 0.5


class DrawnPairs(Protocol):
    image_id: Tensor  # (B,) int64
    caption_id: Tensor  # (B,) int64
    number: Tensor  # (B,) int64, -1 where it is not known
    truncated: Tensor  # (B,) bool


class DataStatistics:
    """Repeats, cuts and coverage of the training stream, over all ranks.

    Args:
        samples_per_epoch: N.
        seen: (N,) bool, the samples that an earlier part of this run has had.
        source_counts: position -> samples of each source before it; empty for a single source.
        duplicates: what the loss does with pairs that share an image or a caption (ignore, mask or positive); advice
            that follows from their share is said once. None: nothing is said.
    """

    def __init__(
        self,
        samples_per_epoch: int,
        seen: np.ndarray | None = None,
        source_counts: Callable[[int], Mapping[str, int]] = lambda position: {},
        duplicates: str | None = None,
    ) -> None:
        self._stride = -(-samples_per_epoch // TRACKED_SAMPLES)
        tracked = len(range(0, samples_per_epoch, self._stride))
        self._seen = np.zeros(tracked, bool) if seen is None else seen[:: self._stride].copy()
        self._source_counts = source_counts
        self._truncated = self._pairs = 0
        self._image_ids = self._caption_ids = torch.zeros(0, dtype=torch.int64)
        self._duplicates = duplicates
        self._is_numbered = True

    def add(self, batch: DrawnPairs) -> None:
        self._pairs += len(batch.truncated)
        self._truncated += int(batch.truncated.sum())
        self._image_ids, self._caption_ids = batch.image_id, batch.caption_id
        numbers = batch.number.numpy()
        self._is_numbered = self._is_numbered and bool((numbers >= 0).all())
        self._seen[numbers[numbers % self._stride == 0] // self._stride] = True

    def collect(self, samples_seen: int) -> dict[str, float]:  # all ranks
        """Metrics since the last call.

        ``data/truncated_captions``: share of captions that the model's context cut. ``data/duplicate_images_in_batch``,
        ``data/duplicate_captions_in_batch``: share of pairs in the newest global batch that share their image (caption)
        with another one. ``data/unique_coverage``: share of the data set's samples that the run has had.
        ``data/samples_of_…``: by source, since the run began.
        """
        ids = np.stack([self._image_ids.numpy(), self._caption_ids.numpy()])  # (2, B)
        mine = (self._truncated, self._pairs, ids, np.packbits(self._seen), self._is_numbered)
        truncated, pairs, all_ids, seen, is_numbered = zip(*all_gather_object(mine), strict=True)
        self._truncated = self._pairs = 0
        images, captions = np.concatenate(all_ids, axis=1)  # (W*B,) each
        metrics = {
            "data/truncated_captions": sum(truncated) / sum(pairs),
            "data/duplicate_images_in_batch": _share_of_repeats(images),
            "data/duplicate_captions_in_batch": _share_of_repeats(captions),
        }
        self._advise(images, captions)
        if all(is_numbered):
            bits = np.unpackbits(np.bitwise_or.reduce(seen), count=len(self._seen))
            metrics["data/unique_coverage"] = float(bits.mean())
        counts = self._source_counts(samples_seen)
        return metrics | {f"data/samples_of_{name}": float(count) for name, count in counts.items()}

    def _advise(self, images: np.ndarray, captions: np.ndarray) -> None:
        if self._duplicates is None:
            return
        advice = duplicate_advice(images, captions, self._duplicates)
        if advice is not None:
            self._duplicates = None
            if is_main():
                log.warning("%s", advice)


def duplicate_advice(images: np.ndarray, captions: np.ndarray, duplicates: str) -> str | None:
    """What to do about the repeats of a batch, or None.

    Args:
        images, captions: (N,) ids of the pairs of a global batch.
        duplicates: what the loss does with pairs that share one: ignore, mask or positive.
    """
    of_images, of_captions = _share_of_repeats(images), _share_of_repeats(captions)
    share = f"{of_images:.0%} of a batch's pairs share their image with another one, {of_captions:.0%} their caption"
    if duplicates == "mask" and max(of_images, of_captions) > MASKABLE_SHARE:
        return (
            f"{share}: loss.duplicates=mask takes many negatives away; ignore or positive did better where it was tried"
        )
    if of_images > HARMLESS_SHARE:
        return (
            f"{share}: pack again with --layout images, a sample an image with all its captions, or take a smaller "
            "global_batch_size" + ("; loss.duplicates=positive meanwhile" if duplicates == "ignore" else "")
        )
    if duplicates == "ignore" and of_captions > HARMLESS_SHARE:
        return (
            f"{share}: InfoNCE cannot fall below {loss_floor(images, captions):.2f} in such a batch, so judge by "
            "retrieval, which counts all that share; loss.duplicates=positive makes them right answers in training too"
        )
    return None


def loss_floor(images: np.ndarray, captions: np.ndarray) -> float:
    """Least InfoNCE of a batch, in nats, where the same image and the same caption always have the same features.

    The best that a softmax can do is the frequency with which pair (g, c) occurs among those of its image g, split
    evenly over the columns that say c: n_gc / (n_g n_c). Both directions come to the same. 0 where nothing repeats,
    ln 2 where each caption occurs twice.

    Args:
        images, captions: (N,) ids.
    """
    both = np.unique(np.stack([images, captions]), axis=1, return_inverse=True)[1]
    n_image, n_caption, n_both = (_times(ids) for ids in (images, captions, both.reshape(-1)))
    return float(np.mean(np.log(n_image) + np.log(n_caption) - np.log(n_both)))


def _times(ids: np.ndarray) -> np.ndarray:
    """(N,) ids -> (N,) how often each occurs."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return counts[inverse]


def _share_of_repeats(ids: np.ndarray) -> float:
    return float(np.mean(_times(ids) > 1))
