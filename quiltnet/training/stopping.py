"""A run that is asked to end before its time: by a signal to any of its ranks, at a step that all agree on."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from quiltnet.distributed import is_main, world_size

EXIT_STOPPED = 75  # sysexits.h: a temporary failure, try again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# SIGUSR1 is what Slurm sends before the time is up (sbatch --signal), SIGTERM what everyone sends.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Under torchrun one Ctrl-C arrives twice: from the terminal, and from torchrun, which hands it on.
_SAME_INTERRUPT_S = 1.0


class RunStopped(SystemExit):
    """The run was asked to stop, and all of it is saved. Where nobody catches it, the process ends with its code.

    A ``SystemExit``, since it is no error: nothing on the way that reports errors will take it for one.
    """


class EvaluationCut(Exception):
    """Raised inside an evaluation that the end of the run does not wait for."""


class Stopping:
    """Hears of SIGTERM, SIGUSR1 and Ctrl-C while it is entered, and lets all ranks stop at the same step.

    A signal sets a flag; nothing else happens until the training loop looks. Ranks send each other their flags without
    waiting, and read what has come of it when they look again, a step later. A second Ctrl-C, more than a second
    after the first, raises ``KeyboardInterrupt`` at once.

    Outside of the main thread, where Python lets nobody handle signals, none is heard. What handled them before does so
    again afterwards.

    Attributes:
        owes_evaluation: an evaluation was cut short; the run is not complete, even if its last step is done.
    """

    def __init__(self) -> None:
        self.owes_evaluation = False
        self._heard = 0
        self._interrupted_at: float | None = None
        self._agreed = 0
        self._sent: tuple[Any, torch.Tensor] | None = None
        self._group: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:  # all ranks
        if world_size() > 1:  # of its own: what is sent in the background must not meet the steps' collectives
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            # None: it was not set from Python, and cannot be set again from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        self._sent = self._group = None

    @property
    def signal_name(self) -> str:
        """What the ranks agreed to stop for: ``SIGTERM``, ``SIGUSR1``, or ``Ctrl-C``."""
        return "Ctrl-C" if self._agreed == signal.SIGINT else signal.Signals(self._agreed).name

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self._agreed == signal.SIGINT else EXIT_STOPPED

    def agreed(self) -> bool:  # all ranks
        """Whether to stop now, the same on every rank. Cheap enough for every step: it waits for no one but the past.

        What one rank has heard before this call, all know at the next one.
        """
        if not self._agreed and self._group is None:
            self._agreed = self._heard
        elif not self._agreed:
            self._exchange()
        return self._agreed != 0

    def cut_evaluation(self) -> None:  # all ranks
        """Called by an evaluation now and then, by all ranks as often.

        Raises:
            EvaluationCut: the run is to stop.
        """
        if self.agreed():
            self.owes_evaluation = True
            raise EvaluationCut

    def _exchange(self) -> None:
        if self._sent is not None:
            work, flag = self._sent
            work.wait()
            self._agreed = int(flag)
        # Signals are numbers: where ranks have heard different ones, all take the greatest.
        flag = torch.tensor(self._heard)
        self._sent = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
                self._say("stopping after this step, and saving; Ctrl-C once more stops at once")
            elif now - self._interrupted_at > _SAME_INTERRUPT_S:
                raise KeyboardInterrupt
        elif not self._heard:
            self._say(f"{signal.Signals(number).name}: stopping after this step, and saving")
        self._heard = max(self._heard, number)

    def _say(self, text: str) -> None:
        if is_main():
            os.write(2, f"\n{text}\n".encode())  # print might be interrupted within itself
