"""Says what the loader is doing when it has given nothing for a while."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

PATIENCE_S = 60.0
FIRST_PATIENCE_S = 10.0  # the first batch may wait for a shuffle buffer to fill, and who waits wants to see it
TEXT_BYTES = 240


class StageBoard:
    """One line for each loader process, in memory that they share: what it does, and since when."""

    def __init__(self, workers: int) -> None:
        # As tensors they stay shared with a process that is spawned; arrays would be copied.
        self._lines = torch.zeros((max(workers, 1), TEXT_BYTES), dtype=torch.uint8).share_memory_()
        self._times = torch.full((max(workers, 1),), time.monotonic(), dtype=torch.float64).share_memory_()

    def write(self, worker: int, stage: str) -> None:
        line = stage.encode("utf-8", "replace")[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
        self._lines.numpy()[worker] = np.frombuffer(line, np.uint8)
        self._times.numpy()[worker] = time.monotonic()

    def read(self) -> list[tuple[str, float]]:
        """(stage, seconds since it began) of each process."""
        now = time.monotonic()
        stages = [line.tobytes().rstrip(b"\0").decode("utf-8", "replace") for line in self._lines.numpy()]
        return [(stage or "starting", now - begun) for stage, begun in zip(stages, self._times.tolist(), strict=True)]


class Watchdog:
    """While a batch is waited for longer than ``patience_s``, tells on stderr what every loader process is at.

    Args:
        first_patience_s: the same, for the first batch.
        who: the rank, where there are several, as a word in front of what is told.
    """

    def __init__(
        self,
        board: StageBoard,
        patience_s: float = PATIENCE_S,
        *,
        first_patience_s: float = FIRST_PATIENCE_S,
        who: str = "",
    ) -> None:
        self._board = board
        self._later_patience_s = patience_s
        self._patience_s = min(patience_s, first_patience_s)
        self._who = who
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loader-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None
            self._patience_s = self._later_patience_s

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        told_of, times = None, 0
        while not self._closed.wait(min(1.0, self._patience_s / 4)):
            since = self._since
            if since != told_of:
                told_of, times = since, 0
            if since is not None and time.monotonic() - since > (times + 1) * self._patience_s:
                times += 1
                self._tell(time.monotonic() - since)

    def _tell(self, waited_s: float) -> None:
        stages = "".join(
            f"\n  loader {worker}: {stage}, for {seconds:.0f} s"
            for worker, (stage, seconds) in enumerate(self._board.read())
        )
        print(f"{self._who}no batch for {waited_s:.0f} s{stages}", file=sys.stderr, flush=True)
