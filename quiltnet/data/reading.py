"""The training stream: shards -> batches, in an order that no number of ranks or workers changes.

The stream is one permutation of all N samples after another. Position p of it is a sample of epoch ``p //
N``; global batch k holds positions [kG, (k+1)G), whether or not an epoch ends among them; rank r takes its
contiguous slice. What is drawn for a position (caption, crop, flip) comes from a generator seeded by it. So a
place in the stream is one number, and a loader has no state to save.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from quiltnet import distributed
from quiltnet.data.batches import AS_STORED, Batch, BatchMaker, Tokenize, Transform
from quiltnet.data.captions import CaptionChoice
from quiltnet.data.local_pairs import LocalPairs, open_local
from quiltnet.data.remote_shards import is_remote
from quiltnet.data.shard_files import ShardSpec
from quiltnet.data.streamed_pairs import StreamedPairs, open_remote
from quiltnet.data.watchdog import StageBoard, Watchdog
from quiltnet.errors import UserError
from quiltnet.worker_signals import leave_signals_to_parent

# A loader process that is waiting (for a silent server, say) looks this often whether it is still wanted, and is given
# so long to end by itself.
LOOK_S, GRACE_S = 0.5, 2.0

VERBATIM = ("random", "first", "longest")  # policies by which the text of a sample is one of its captions


@dataclass(frozen=True)
class Source:
    """Shards, and how often their samples are drawn beside those of other sources (None: each once an epoch)."""

    shards: ShardSpec
    weight: float | None = None


class PairLoader:
    """An endless iterable of this rank's batches; every ``iter`` begins at ``start_position``.

    Attributes:
        samples_per_epoch: N.
        missing: number of samples, by shard, that were promised and are not there.
        start_position: place in the stream, in samples over all ranks.
        leaves_decoding: whether the images of batches are files that the device is to decode.
        board: what its processes are at.
    """

    def __init__(
        self,
        pairs: LocalPairs | StreamedPairs,
        maker: BatchMaker,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        prefetch: int,
        start_position: int = 0,
    ) -> None:
        self.samples_per_epoch = pairs.samples_per_epoch
        self.missing = pairs.missing
        self.start_position = start_position
        self.leaves_decoding = maker.leaves_decoding
        self.board = StageBoard(workers)
        self._pairs = pairs
        self._batches = _Batches(pairs, maker, self.board)
        self._global_batch_size = global_batch_size
        self._batch_size = global_batch_size // world_size
        self._rank = rank
        self._name = f"rank {rank}: " if world_size > 1 else ""
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
        return self._pairs.describe()

    def source_counts(self, position: int) -> dict[str, int]:
        """Samples of each source before ``position``; empty where there is one source."""
        return self._pairs.source_counts(position)

    def seen(self, position: int) -> np.ndarray | None:
        """(N,) bool: the samples that occur before ``position``; None where shards are streamed."""
        return self._pairs.seen(position)

    def close(self) -> None:
        """End the workers of every iterator that was started."""
        for stream in list(self._streams):
            stream.close()

    def _stream(self, position: int) -> Generator[Batch, None, None]:
        first = position + self._rank * self._batch_size
        ending = torch.zeros((), dtype=torch.bool).share_memory_()
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=(range(p, p + self._batch_size) for p in count(first, self._global_batch_size)),
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            collate_fn=_unchanged,
            worker_init_fn=partial(_start_worker, ending),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # DataLoader seeds its workers from the global one otherwise
        )
        batches = iter(loader)  # forks its processes, so before a thread of ours is there
        watchdog = Watchdog(self.board, who=self._name)
        try:
            while True:
                with watchdog.waiting():
                    batch = self._next(batches)
                yield batch
        finally:
            ending.fill_(True)
            watchdog.close()

    def _next(self, batches: Iterator[Batch | UserError]) -> Batch:
        try:
            batch = next(batches)
        except (ConnectionError, EOFError) as error:
            if not self._workers:
                raise
            # One that was killed had a batch to hand over, and DataLoader has not noticed yet that it is gone.
            raise RuntimeError("DataLoader worker ended while it handed over a batch.") from error
        if isinstance(batch, UserError):
            raise batch
        return batch


def build_loader(
    shards: ShardSpec | Mapping[str, Source],
    transform: Transform,
    tokenize: Tokenize,
    *,
    global_batch_size: int,
    seed: int,
    choose_caption: CaptionChoice | None = None,
    augment: Any = None,
    views: int = 1,
    teacher: bool = False,
    workers: int = 2,
    prefetch: int = 2,
    rank: int | None = None,
    world_size: int | None = None,
    start_position: int = 0,
    report: Callable[[int, int], None] | None = None,
    stream: Mapping[str, Any] | None = None,
) -> PairLoader:
    """The stream over ``shards``, for this rank.

    Args:
        shards: as ``resolve_shards`` takes them, or remote ones as ``resolve_remote``, or several sources by name.
        transform: bytes of an image and a generator -> (3, H, W) uint8, as ``TrainTransform``.
        tokenize: B captions -> (B, L) int64, and (B,) bool: which of them were cut.
        global_batch_size: pairs a step over all ranks.
        choose_caption: which text of a sample is used; a random one of its captions where None.
        augment: what is drawn for the augmentation on the device, as ``DeviceAugment``.
        views: tiles that are made of each image, 1 or 2.
        teacher: also give the features of a teacher that are stored with the samples.
        workers: processes a rank that read and decode; 0 reads in this one.
        prefetch: batches that each worker has ready.
        rank: of this process; what torch.distributed says where None, as for ``world_size``.
        start_position: samples (over all ranks) that an earlier run has taken from the stream.
        report: called with (shards looked at, their number) while a first look is taken.
        stream: for remote shards: ``allow_pipe``, ``cache``, ``samples_per_epoch``, ``shuffle_buffer``, … of
            ``open_remote``.

    Raises:
        UserError: shards, weights, batch size, seed or caption policy are not usable.
    """
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UserError(
            f"global_batch_size={global_batch_size} cannot be split over {world_size} ranks; "
            f"use {max(global_batch_size // world_size, 1) * world_size} or change the number of ranks"
        )
    if seed < 0:
        raise UserError(f"seed={seed}; seeds count from 0: give a number of 0 or more")
    choose_caption = choose_caption or CaptionChoice()
    if teacher and (choose_caption.policy not in VERBATIM or choose_caption.sentences is not None):
        raise UserError(AS_STORED)
    sources = shards if isinstance(shards, Mapping) else {"train": Source(shards)}
    if not sources:
        raise UserError("no source of training pairs is named; give data.train.shards, or data.train.sources")
    layout = {
        "global_batch_size": global_batch_size, "rank": rank, "world_size": world_size, "workers": workers
    }  # fmt: skip
    remote = [name for name, source in sources.items() if is_remote(source.shards)]
    if remote and len(remote) < len(sources):
        raise UserError(
            f"sources {', '.join(remote)} are remote and the others are not; name local ones as file:///… as well, "
            "and all are streamed"
        )
    pairs = (
        open_remote(sources, seed=seed, **layout, **(stream or {}))
        if remote
        else open_local(sources, seed=seed, report=report)
    )
    maker = BatchMaker(transform, tokenize, choose_caption, seed, augment, views, teacher)
    return PairLoader(pairs, maker, **layout, prefetch=prefetch, start_position=start_position)


class _Batches(Dataset):
    """Positions of a batch -> Batch, in this process or in a loader's."""

    def __init__(self, pairs: LocalPairs | StreamedPairs, maker: BatchMaker, board: StageBoard) -> None:
        self.pairs = pairs
        self.maker = maker
        self.board = board

    def __getitem__(self, positions: range) -> Batch | UserError:
        worker = get_worker_info()
        number = worker.id if worker is not None else 0
        try:
            batch = self.maker(positions, self.pairs.supply(positions, partial(self.board.write, number)))
        except UserError as error:
            return error  # raised in a worker, it would reach the user inside a traceback
        self.board.write(number, "waiting to be asked")
        return batch


def _unchanged(batch: Batch | UserError) -> Batch | UserError:
    return batch


def _start_worker(ending: Tensor, worker: int) -> None:
    leave_signals_to_parent(worker)
    # Workers are the parallelism: tokenizers would start a thread a core in each of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_in_time, args=(os.getppid(), ending), daemon=True).start()


def _end_in_time(parent: int, ending: Tensor) -> None:
    """End this process soon after the one that started it, however that one ended.

    DataLoader asks its processes to end, or lets them see that they are orphans, when they have finished a batch; one
    that waits for a silent server has minutes to go, and joining takes 5 s for each.
    """
    while os.getppid() == parent and not ending:
        time.sleep(LOOK_S)
    time.sleep(GRACE_S)
    os._exit(0)
