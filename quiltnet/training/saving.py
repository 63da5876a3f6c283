"""Checkpoints while training goes on: a step waits for a copy in memory, a thread writes it."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quiltnet.distributed import is_main, on_main
from quiltnet.errors import UserError
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.checkpoint import checkpoint_path, list_checkpoints, merits, samples_of, save_checkpoint
from quiltnet.training.checkpoint_copies import CheckpointCopies
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.retention import Retention, remove_unwanted
from quiltnet.training.stage import stage
from quiltnet.training.tensor_tree import map_tensors

log = logging.getLogger(__name__)

OnFailure = Literal["continue", "stop"]

# Of waiting for copies when the run has ended.
_COPIES_LIMIT_S = 600.0


class SaveCheckpoint(Callback):
    """A checkpoint every so many samples, at the end, and where the monitored metric is among the best.

    Rank 0 copies what is saved into memory of the host (as much again as a checkpoint, kept for the next one), and a
    thread writes, checks and renames it while training goes on. A save that is asked for meanwhile waits for it.

    Args:
        root: folder of the checkpoints.
        retention: which of them stay. Others are deleted when a new one is whole.
        evaluate: what measures ``monitor``; it comes earlier among the callbacks.
        monitor: ``evaluator/metric`` that is saved beside the weights, and that ``retention.best`` goes by.
        lower_is_better: whether less of it is better.
        on_failure: where a checkpoint cannot be written, the disk being full, ``continue`` says so and tries again at
            the next clock; ``stop`` ends the run. A last checkpoint that cannot be written is an error in any case.
        background: false: each save waits for its writing.
        copies: to where finished checkpoints are copied.

    Raises:
        UserError: by ``step_end``, on every rank, a checkpoint that could not be written, with ``stop``; by
            ``save_now`` and at the end with either.
    """

    stage: ClassVar[str] = "checkpoint"

    def __init__(
        self,
        root: Path,
        every_samples: int,
        retention: Retention | None = None,
        *,
        evaluate: Evaluate | None = None,
        monitor: str | None = None,
        lower_is_better: bool = False,
        on_failure: OnFailure = "continue",
        background: bool = True,
        copies: CheckpointCopies | None = None,
    ) -> None:
        self.root = root
        self.every_samples = every_samples
        self.retention = retention or Retention()
        self.evaluate = evaluate
        self.monitor = monitor
        self.lower_is_better = lower_is_better
        self.on_failure = on_failure
        self.background = background
        self.copies = copies
        self._buffers = HostBuffers()
        self._writing: Future[Path] | None = None  # on rank 0
        self._is_open = False  # whether the outcome of a save is not known yet; on every rank, with `stop`
        self._saved_at = -1
        self._scored: Any = None  # the evaluation that was looked at last
        self._score_at: tuple[int, float | None] = (-1, None)

    def fit_start(self, state: TrainState) -> None:
        if on_main(lambda: checkpoint_path(self.root, state.samples_seen).exists()):  # a finished run, resumed
            self._saved_at = state.samples_seen
        if self.evaluate is not None and self.evaluate.was_owed:
            self.save_now(state)  # the checkpoint of this moment was made without the metric
        elif self.evaluate is not None:
            self._scored = self.evaluate.last
        if self.copies is not None and is_main():
            for folder in list_checkpoints(self.root):
                if samples_of(folder) <= state.samples_seen:
                    self.copies.copy(folder)  # unless the copy is there

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        self.settle(wait=False)
        score = self._new_score(state)
        if state.passed(self.every_samples) or self._is_among_best(score):
            self._save(state)

    def fit_end(self, state: TrainState) -> None:
        self.save_now(state)
        if self.copies is not None and is_main():
            left = self.copies.finish(_COPIES_LIMIT_S)
            if left:
                names = ", ".join(path.name for path in left)
                log.warning("not copied to %s: %s; they are whole in %s", self.copies.url, names, self.root)
            else:
                self._remove_unwanted(checkpoint_path(self.root, state.samples_seen))  # what was being copied before
                self.copies.finish(_COPIES_LIMIT_S)

    def run_stopped(self, state: TrainState) -> None:
        self.save_now(state)

    def close(self) -> None:
        """Whoever starts the run again must not meet a thread that still writes in its directory."""
        if self._writing is not None and (error := self._writing.exception()) is not None:
            log.warning("the checkpoint after %s samples could not be written (%s)", f"{self._saved_at:,}", error)
        if self.copies is not None:
            self.copies.close()

    def save_now(self, state: TrainState) -> None:  # all ranks
        """Save this moment, unless that was done, and return when it is written."""
        self.settle(wait=True)
        score = self._new_score(state)
        if on_main(lambda: self._saved_at) != state.samples_seen or self._is_among_best(score):
            self._save(state)
        on_main(lambda: self._outcome(wait=True))
        self._is_open = False

    def _new_score(self, state: TrainState) -> float | None:
        """The monitored metric, where it was measured since the last call: the same on all ranks."""
        if self.evaluate is None or self.evaluate.last is self._scored:
            return None
        self._scored = self.evaluate.last
        score = None if self.monitor is None else self._scored.get(self.monitor)
        self._score_at = state.samples_seen, score
        return score

    def _is_among_best(self, score: float | None) -> bool:  # all ranks
        if score is None or not self.retention.best:
            return False
        self.settle(wait=True)  # what is being written counts
        merit = -score if self.lower_is_better else score

        def decide() -> bool:
            others = merits(list_checkpoints(self.root), self.monitor)
            return self.retention.is_among_best(merit, others.values())

        return on_main(decide)

    def _save(self, state: TrainState) -> None:  # all ranks
        self.settle(wait=True)
        # Rank 0 may have waited long for its disk, rightly; here the others wait for it. From here on all go together,
        # and a rank that does not come is missed by the stall watch.
        on_main(lambda: None)
        with stage("gathering"):
            saved = state.state_dict()
        self._saved_at = state.samples_seen
        self._is_open = True
        if not is_main():
            return
        measured_at, score = self._score_at
        if measured_at == state.samples_seen and score is not None:
            saved["monitored"] = {"metric": self.monitor, "value": score, "lower_is_better": self.lower_is_better}
        snapshot = self._buffers.take(saved)
        with_one_thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = with_one_thread.submit(self._write, snapshot)
        with_one_thread.shutdown(wait=not self.background)

    def _write(self, snapshot: dict[str, Any]) -> Path:
        folder = save_checkpoint(self.root, snapshot)
        if self.copies is not None:
            self.copies.copy(folder)
        self._remove_unwanted(folder)
        return folder

    def _remove_unwanted(self, newest: Path) -> None:
        spare = [] if self.copies is None or self.copies.current is None else [self.copies.current]
        for gone in remove_unwanted(self.root, newest, self.retention, spare=spare):
            if self.copies is not None:
                self.copies.remove(gone)

    def settle(self, *, wait: bool) -> None:  # all ranks
        """Say what became of the save before, if that is known, or wait for it."""
        if not self._is_open:
            return
        if self.on_failure == "stop":
            self._is_open = not on_main(lambda: self._outcome(wait))
        elif is_main():
            try:
                self._is_open = not self._outcome(wait)
            except UserError as error:
                self._is_open = False
                log.warning("%s; training goes on", error)

    def _outcome(self, wait: bool) -> bool:
        """Whether the save before is over; on rank 0.

        Raises:
            UserError: it failed.
        """
        if self._writing is None:
            return True
        if not (wait or self._writing.done()):
            return False
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except OSError as error:
            lost_at, self._saved_at = self._saved_at, -1
            newest = next((folder.name for folder in reversed(list_checkpoints(self.root))), "none")
            raise UserError(
                f"the checkpoint after {lost_at:,} samples could not be written ({error}); the newest in "
                f"{self.root} is {newest}. Free space or make it writable; resume=auto goes on from the newest"
            ) from error
        return True


class HostBuffers:
    """Memory of the host that takes copies of tensors, and is used again for the next ones; pinned for CUDA."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state that stays as it is until the next call, when its tensors are written over."""
        copy = map_tensors(state, self._copy)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copy

    def _copy(self, path: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[path] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
