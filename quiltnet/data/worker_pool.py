"""Tasks over processes: results in order, few tasks ahead, and no process that outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from quiltnet.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """``map(function, tasks)``, computed by ``workers`` processes.

    Args:
        function: pickled once a task, so a function of a module or a partial of one.
        workers: 1 computes in this process.

    Raises:
        UserError: a process was killed.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: this process has threads by now (torch's, a progress bar's), whose locks a fork would keep.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    try:
        ahead: deque = deque()
        for task in tasks:
            ahead.append(pool.submit(function, task))
            if len(ahead) >= 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for want of memory; repeat the command with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def leave_with_parent() -> None:
    """Called by a worker process, once.

    Ctrl-C, which a terminal sends to all processes, ends it at once; so does the end of its parent, even a killed one:
    a process that is left behind would write where the successor of its parent does.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_watch_parent, daemon=True).start()


def available_cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _watch_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare_worker() -> None:
    leave_with_parent()
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
