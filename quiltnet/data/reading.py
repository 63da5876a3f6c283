"""The training stream: shards -> batches, in an order that no number of ranks or workers changes.

The stream is one permutation of all N samples after another. Position p of it is a sample of epoch ``p //
N``; global batch k holds positions [kG, (k+1)G), whether or not an epoch ends among them; rank r takes its
contiguous slice. What is drawn for a position (caption, crop, flip) comes from a generator seeded by it. So a
place in the stream is one number, and a loader has no state to save.
"""

from __future__ import annotations

import os
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quiltnet import distributed
from quiltnet.data.captions import check_policy, choose_caption
from quiltnet.data.decoding import BrokenSample, decode_pil
from quiltnet.data.pairs import caption_id, id_to_int64
from quiltnet.data.shard_files import ShardSpec, fingerprint, resolve_shards
from quiltnet.data.stored_pairs import StoredPairs
from quiltnet.errors import UserError

Transform = Callable[[bytes, np.random.Generator], Tensor]  # -> (3, H, W) uint8
Tokenize = Callable[[list[str]], Tensor]  # -> (B, L) int64

# If half of all samples are broken, 16 in a row are once in 65,000: then something else is wrong, and is
# said.
MAX_ATTEMPTS = 16

# First word of a seed, so that orders and samples are drawn independently.
ORDER_STREAM, SAMPLE_STREAM = 0, 1


@dataclass(frozen=True)
class Batch:
    """Pairs of one rank.

    Attributes:
        image: (B, 3, H, W) uint8, not normalised.
        text: (B, L) int64.
        image_id: (B,) int64; equal where the image is the same.
        caption_id: (B,) int64; equal where the caption is the same but for case and white space.
        key: B sample keys.
        rejected: (key, reason) of samples that were broken, and that others in this batch stand in for.
    """

    image: Tensor
    text: Tensor
    image_id: Tensor
    caption_id: Tensor
    key: list[str]
    rejected: list[tuple[str, str]]

    def pin_memory(self) -> Batch:
        """Called by DataLoader."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("image", "text", "image_id", "caption_id")}
        return replace(self, **pinned)


@dataclass(frozen=True)
class DrawnPair:
    """One sample as drawn for one position. image: (3, H, W) uint8."""

    image: Tensor
    caption: str
    image_id: str
    key: str
    rejected: list[tuple[str, str]] = field(default_factory=list)


class PairDataset(Dataset):
    """Positions of the endless stream -> drawn pairs: a pure function of the seed and the position.

    A broken sample is replaced by another one, drawn from a generator that is seeded by seed, position and
    attempt.
    """

    def __init__(self, pairs: StoredPairs, transform: Transform, *, seed: int, caption_policy: str = "random") -> None:
        check_policy(caption_policy)
        if seed < 0:
            raise UserError(f"seed={seed}; seeds count from 0: give a number of 0 or more")
        self.pairs = pairs
        self.transform = transform
        self.seed = seed
        self.caption_policy = caption_policy

    def __getitem__(self, position: int) -> DrawnPair:
        """Raises UserError when 16 samples in a row are broken."""
        epoch, place = divmod(position, len(self.pairs))
        number = int(_permutation(len(self.pairs), self.seed, epoch)[place])
        rejected: list[tuple[str, str]] = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng([SAMPLE_STREAM, self.seed, position, attempt])
            if attempt > 0:
                number = int(rng.integers(len(self.pairs)))
            try:
                stored = self.pairs[number]
                caption = choose_caption(stored.captions, self.caption_policy, rng)
                return DrawnPair(self.transform(stored.image, rng), caption, stored.image_id, stored.key, rejected)
            except BrokenSample as error:
                rejected.append((self.pairs.key(number), error.reason))
        reasons = ", ".join(f"{reason} ({times})" for reason, times in Counter(r for _, r in rejected).items())
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row are broken: {reasons}; the last is {rejected[-1][0]}; "
            "look at the shards, or pack them again"
        )


@lru_cache(maxsize=4)  # a batch touches two epochs at most places; two loaders may share a process
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([ORDER_STREAM, seed, epoch]).permutation(samples)


class PairLoader:
    """An endless iterable of this rank's batches; every ``iter`` begins at ``start_position``.

    Attributes:
        samples_per_epoch: N.
        missing: number of samples, by shard, that were promised and are not there.
        start_position: place in the stream, in samples over all ranks.
    """

    def __init__(
        self,
        dataset: PairDataset,
        tokenize: Tokenize,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        prefetch: int,
        start_position: int = 0,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % world_size:
            raise UserError(
                f"global_batch_size={global_batch_size} cannot be split over {world_size} ranks; "
                f"use {max(global_batch_size // world_size, 1) * world_size} or change the number of ranks"
            )
        self.samples_per_epoch = len(dataset.pairs)
        self.missing = dataset.pairs.missing
        self.start_position = start_position
        self._batches = _Batches(dataset, tokenize)
        self._global_batch_size = global_batch_size
        self._batch_size = global_batch_size // world_size
        self._rank = rank
        self._workers = workers
        self._prefetch = prefetch
        self._streams: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Batch]:
        return self.start(self.start_position)

    def start(self, position: int) -> Iterator[Batch]:
        """Batches from ``position`` on, without end. Its workers live until it is dropped, or ``close``."""
        stream = self._stream(position)
        self._streams.add(stream)
        return stream

    def describe(self) -> dict[str, int | str]:
        """What the stream is made of, for the record of a run."""
        shards = self._batches.dataset.pairs.shards
        return {"samples": self.samples_per_epoch, "tars": len(shards), "sha256": fingerprint(shards)}

    def close(self) -> None:
        """End the workers of every iterator that was started."""
        for stream in list(self._streams):
            stream.close()

    def _stream(self, position: int) -> Generator[Batch, None, None]:
        first = position + self._rank * self._batch_size
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=(range(p, p + self._batch_size) for p in count(first, self._global_batch_size)),
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # DataLoader seeds its workers from the global one otherwise
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def build_loader(
    shards: ShardSpec,
    transform: Transform,
    tokenize: Tokenize,
    *,
    global_batch_size: int,
    seed: int,
    caption_policy: str = "random",
    workers: int = 2,
    prefetch: int = 2,
    rank: int | None = None,
    world_size: int | None = None,
    start_position: int = 0,
) -> PairLoader:
    """The stream over ``shards``, for this rank.

    Args:
        shards: as ``resolve_shards`` takes them.
        transform: bytes of an image and a generator -> (3, H, W) uint8, as ``TrainTransform``.
        tokenize: B captions -> (B, L) int64.
        global_batch_size: pairs a step over all ranks.
        workers: processes a rank that read and decode; 0 reads in this one.
        prefetch: batches that each worker has ready.
        rank: of this process; what torch.distributed says where None, as for ``world_size``.
        start_position: samples (over all ranks) that an earlier run has taken from the stream.

    Raises:
        UserError: shards, batch size, seed or caption policy are not usable.
    """
    pairs = StoredPairs(resolve_shards(shards))
    dataset = PairDataset(pairs, transform, seed=seed, caption_policy=caption_policy)
    return PairLoader(
        dataset,
        tokenize,
        global_batch_size=global_batch_size,
        rank=distributed.rank() if rank is None else rank,
        world_size=distributed.world_size() if world_size is None else world_size,
        workers=workers,
        prefetch=prefetch,
        start_position=start_position,
    )


class ShardPairs(Dataset):
    """Held-out pairs for evaluation, all or the first ``limit``, in shard order.

    ``[i]`` is (RGB image, all captions, image id). A broken sample is an error: what is measured must not depend
    silently on what could be read.

    Raises:
        UserError: the shards hold fewer samples than their manifest says.
    """

    def __init__(self, shards: ShardSpec, limit: int | None = None) -> None:
        self._pairs = StoredPairs(resolve_shards(shards))
        if self._pairs.missing:
            raise UserError(
                f"held-out shards lack samples that their manifest lists ({self._pairs.missing}); "
                "bring back the whole tars, or pack them again"
            )
        self._length = min(len(self._pairs), limit if limit is not None else len(self._pairs))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> tuple[Image.Image, list[str], str]:
        place = range(self._length)[number]
        try:
            pair = self._pairs[place]
            return decode_pil(pair.image), pair.captions, pair.image_id
        except BrokenSample as error:
            raise UserError(
                f"held-out pair {self._pairs.key(place)} cannot be read ({error.reason}); "
                "pack the shards again, which rejects it and says so"
            ) from error


class _Batches(Dataset):
    """Positions of a batch -> Batch."""

    def __init__(self, dataset: PairDataset, tokenize: Tokenize) -> None:
        self.dataset = dataset
        self.tokenize = tokenize

    def __getitem__(self, positions: range) -> Batch | UserError:
        try:
            return self._collate([self.dataset[position] for position in positions])
        except UserError as error:
            return error  # raised in a worker, it would reach the user inside a traceback

    def _collate(self, pairs: list[DrawnPair]) -> Batch:
        return Batch(
            image=torch.stack([pair.image for pair in pairs]),
            text=self.tokenize([pair.caption for pair in pairs]),
            image_id=torch.tensor([id_to_int64(pair.image_id) for pair in pairs]),
            caption_id=torch.tensor([id_to_int64(caption_id(pair.caption)) for pair in pairs]),
            key=[pair.key for pair in pairs],
            rejected=[rejection for pair in pairs for rejection in pair.rejected],
        )


def _unchanged(batch: Batch | UserError) -> Batch | UserError:
    return batch


def _start_worker(worker: int) -> None:
    # A terminal sends Ctrl-C to all processes. The main one ends the workers; a traceback of each helps nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers are the parallelism: tokenizers would start a thread a core in each of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
