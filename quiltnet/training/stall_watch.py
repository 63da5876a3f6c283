"""Ends a process that no longer moves, and says where it stands: a collective waits for ever without a word."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from quiltnet.distributed import rank
from quiltnet.training.stage import Stage, current_stage

EXIT_STALLED = 70  # sysexits.h: an internal error

# A probe's fit or a large file may take hours, rightly. Collectives in there have the process group's own limit. What
# should not take long has a stage of its own: the collective that a save begins with ("gathering"), and the wait for a
# batch of an evaluation ("evaluation data").
_WITHOUT_LIMIT = frozenset({"evaluation", "checkpoint", "starting"})


class StallWatch:
    """While entered, a thread sees that the stage changes; where it has not for ``timeout_s``, it ends the process.

    It prints rank, stage, step and the stacks of all threads first, and ends with exit code 70, without any cleaning
    up: the training thread stands in a call that does not return. Time in which the process itself was suspended
    does not count.

    Args:
        timeout_s: None to watch nothing.
        where: words for the moment, such as the step.
    """

    def __init__(self, timeout_s: float | None, where: Callable[[], str]) -> None:
        self._timeout_s = timeout_s
        self._where = where
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StallWatch:
        if self._timeout_s is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._timeout_s,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, timeout_s: float) -> None:
        period_s = min(1.0, timeout_s / 4)
        seen, waited_s, looked = current_stage(), 0.0, time.monotonic()
        while not self._closed.wait(period_s):
            now, stage = time.monotonic(), current_stage()
            # This thread sleeps as long as the process does: what passed beyond two looks is no waiting.
            waited_s = waited_s + min(now - looked, 2 * period_s) if stage == seen else 0.0
            seen, looked = stage, now
            if waited_s > timeout_s and stage.name not in _WITHOUT_LIMIT:
                self._end(stage, waited_s)

    def _end(self, stage: Stage, waited_s: float) -> None:
        print(
            f"stalled: rank {rank()} is at {stage.name} ({self._where()}) and has not moved for {waited_s:.0f} s "
            "(callbacks.stall_timeout_s). Ranks wait for each other in forward, loss, backward, clip, optimizer, "
            "stopping, callbacks and gathering (of a checkpoint): look at the one that is elsewhere, or says nothing. "
            f"Exit code {EXIT_STALLED}; resume=auto goes on from the newest checkpoint. Stacks:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(EXIT_STALLED)
