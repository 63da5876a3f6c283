"""Signals in the processes of a loader: a run that saves before it ends needs them until then."""

from __future__ import annotations

import os
import signal
import threading


def leave_signals_to_parent(worker: int) -> None:
    """``worker_init_fn`` of a DataLoader: its processes are ended by their parent only.

    A terminal sends Ctrl-C to all processes, torchrun sends SIGTERM to each rank with all that it has started.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none, and its loaders die of a SIGTERM to the group
        # Blocked, it waits for the one thread that can see who has sent it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for, args=(os.getppid(),), name="signals", daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
