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
TEXT_BYTES = 240


class StageBoard:
    """One line for each loader process, in memory that they share: what it does, and since when."""

    def __init__(self, workers: int) -> None:
        self._lines = torch.zeros((max(workers, 1), TEXT_BYTES), dtype=torch.uint8).share_memory_().numpy()
        self._times = torch.zeros(max(workers, 1), dtype=torch.float64).share_memory_().numpy()

    def write(self, worker: int, stage: str) -> None:
        line = stage.encode("utf-8", "replace")[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
        self._lines[worker] = np.frombuffer(line, np.uint8)
        self._times[worker] = time.monotonic()

    def read(self) -> list[tuple[str, float]]:
        """(stage, seconds since it began) of each process."""
        now = time.monotonic()
        stages = [line.tobytes().rstrip(b"\0").decode("utf-8", "replace") for line in self._lines]
        return [(stage or "starting", now - begun) for stage, begun in zip(stages, self._times, strict=True)]


class Watchdog:
    """While a batch is waited for longer than ``patience_s``, tells on stderr what every loader process is at."""

    def __init__(self, board: StageBoard, patience_s: float = PATIENCE_S) -> None:
        self._board = board
        self._patience_s = patience_s
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
        print(f"no batch for {waited_s:.0f} s{stages}", file=sys.stderr, flush=True)
