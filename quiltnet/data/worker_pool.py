"""Tasks over processes: results in order, few tasks ahead, and no process more where one is enough."""

from __future__ import annotations

import multiprocessing
import os
import signal
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
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
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


def _start_worker() -> None:
    # A terminal sends Ctrl-C to all processes. The main one ends the workers; a traceback of each helps nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
