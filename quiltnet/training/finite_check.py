"""Counts the steps whose numbers are not finite, says where they were, and ends a run that makes no others."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quiltnet.distributed import all_gather_object, is_main, on_main
from quiltnet.errors import UserError
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.loggers import LoggerGroup, cut_after, logged_lines

log = logging.getLogger(__name__)

_KEYS_SHOWN = 3


@dataclass(frozen=True)
class SkippedStep:
    """A step that was not made.

    Attributes:
        samples_seen: after it.
        step: its number, from 1 on.
        ranks: those whose features were not finite; none where only the loss, or its gradient, was not.
        keys: of the pairs of each rank.
    """

    samples_seen: int
    step: int
    ranks: list[int]
    keys: list[list[str]]


class FiniteCheck(Callback):
    """Looks at the flags of the steps since the last look; the steps themselves left the weights as they were.

    Each skipped step is a line of ``nonfinite.jsonl`` with the keys of its pairs; their number is logged as
    ``train/skipped_steps``. Steps that the gradient scaler of fp16 skips are in order and not among them.

    Args:
        path: of ``nonfinite.jsonl``.
        every_samples: clocks at which to look; reading the flags waits for the device, so the clock of the log.
            The checkpoint's must be among them, or a resumed run would forget what lay in between.
        max_in_a_row: end the run at so many skipped steps in a row; 1: at the first.

    Raises:
        UserError: by ``step_end`` and ``fit_end``, that many.
    """

    def __init__(self, path: Path, logger: LoggerGroup, every_samples: Sequence[int], *, max_in_a_row: int = 5) -> None:
        self.path = path
        self.logger = logger
        self.every_samples = every_samples
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self._in_a_row = 0
        self._steps: list[tuple[int, list[str], Tensor]] = []  # samples after the step, keys, (2,) flags

    def fit_start(self, state: TrainState) -> None:
        if state.samples_seen and is_main():
            cut_after(self.path, state.samples_seen)
        earlier = on_main(lambda: _samples_seen(self.path)) if state.samples_seen else []
        self.skipped, self._in_a_row = len(earlier), 0
        while earlier and earlier.pop() == state.samples_seen - self._in_a_row * state.global_batch_size:
            self._in_a_row += 1

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        flags = torch.stack([metrics["finite_features"], metrics["finite_step"]])
        self._steps.append((state.samples_seen, batch.key, flags))
        if any(state.passed(every) for every in self.every_samples):
            self._look(state)

    def fit_end(self, state: TrainState) -> None:
        self._look(state)

    def run_stopped(self, state: TrainState) -> None:
        self._look(state)

    def _look(self, state: TrainState) -> None:  # all ranks
        steps, self._steps = self._steps, []
        if not steps:
            return
        flags = torch.stack([flags for *_, flags in steps]).tolist()  # waits for the device
        # Every rank's loss is of all ranks' features: the step failed on all, the features perhaps on one.
        is_bad = [not step for _, step in flags]
        if not any(is_bad):
            self._in_a_row = 0
            return
        own = [(flags[number][0], keys) for number, (_, keys, _) in enumerate(steps) if is_bad[number]]
        of_ranks = zip(*all_gather_object(own), strict=True)  # step by step, what each rank has of it
        for number, (samples_seen, *_) in enumerate(steps):
            self._in_a_row = self._in_a_row + 1 if is_bad[number] else 0
            if is_bad[number]:
                found = next(of_ranks)
                ranks = [rank for rank, (features, _) in enumerate(found) if not features]
                step = SkippedStep(
                    samples_seen, samples_seen // state.global_batch_size, ranks, [keys for _, keys in found]
                )
                self._record(step)
        self.logger.log({"train/skipped_steps": self.skipped}, state.samples_seen)

    def _record(self, skipped: SkippedStep) -> None:
        self.skipped += 1
        if is_main():
            _write(self.path, skipped)
        told = f"step {skipped.step} ({skipped.samples_seen:,} samples seen): {_what(skipped)}"
        if self._in_a_row >= self.max_in_a_row:
            rule = "" if self.max_in_a_row == 1 else f"{self._in_a_row} steps in a row were not finite. The last, "
            raise UserError(
                f"{rule}{told}. The weights are those from before; the keys of the pairs are in {self.path}. Look at "
                "them, lower optim.lr, or compute in another precision (fp16 overflows where bf16 does not). "
                f"callbacks.max_nonfinite_steps={self.max_in_a_row} says how many may be skipped"
            )
        if is_main():
            log.warning("skipped %s; the keys of its pairs are in %s", told, self.path)


def _what(skipped: SkippedStep) -> str:
    if not skipped.ranks:
        return "the features are finite, the loss or its gradient is not"
    keys = ", ".join(skipped.keys[skipped.ranks[0]][:_KEYS_SHOWN])
    return f"features of rank {', '.join(map(str, skipped.ranks))} are not finite; its pairs begin with {keys}"


def _write(path: Path, skipped: SkippedStep) -> None:
    row: dict[str, Any] = {
        "samples_seen": skipped.samples_seen,
        "step": skipped.step,
        "ranks_with_bad_features": skipped.ranks,
        "keys": skipped.keys,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _samples_seen(path: Path) -> list[int]:
    return [line["samples_seen"] for line in logged_lines(path)]
