"""Two runs never share a directory: a lock beside it, held for as long as the process lives."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, open_dict

from quiltnet.cli.run_directory import check_writable, delete_run_directory
from quiltnet.distributed import all_gather_object, is_main, on_main
from quiltnet.errors import UserError
from quiltnet.release.hub import CHECKPOINTS_FOLDER
from quiltnet.training.checkpoint import list_checkpoints

# The process that had it may be ending right now.
PATIENCE_S = 5.0


@contextmanager
def run_lock(path: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:  # all ranks
    """Rank 0 holds the lock of the run directory ``path``; the system lets go of it when it dies, however that happens.

    The lock's file lies beside the directory, which ``overwrite=true`` deletes. It names who has the lock, and stays,
    unless nothing came of the run: a mistake leaves nothing behind.

    Raises:
        UserError: another process has it, or the place cannot be written.
    """
    lock = FileLock(_lock_file(path))

    def take() -> None:
        check_writable(path)
        holder = _read(path)
        try:
            _lock_file(path).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=patience_s)
            _sign(path, holder.get("job"))
        except Timeout:
            who = f" (process {holder['pid']} on {holder['host']})" if holder else ""
            raise UserError(
                f"another run{who} is at work in {path}: end it first, or choose another run_name"
            ) from None
        except OSError as error:
            raise UserError(
                f"{_lock_file(path)} cannot be written and locked ({error}); the disk must allow locks, as NFS 4 does, "
                "and Lustre mounted with flock: choose another output_dir"
            ) from error

    on_main(take)
    try:
        yield
    finally:
        if lock.is_locked and not path.exists():
            _lock_file(path).unlink(missing_ok=True)
        lock.release()


def own(path: Path) -> None:
    """Say that the directory is now of this job's making. Called with the lock, when it has been entered."""
    if is_main():
        _sign(path, _job())


def go_on_after_restart(cfg: DictConfig, path: Path) -> None:  # all ranks
    """Where torchrun has started all ranks again (``--max-restarts``), the run goes on instead of beginning anew.

    ``cfg`` gets ``resume=auto`` and ``overwrite=false`` in place of what was given for the first start, provided that
    this very job had entered the run directory. One that had not saved anything by then begins again from what it was
    given. Called with the lock.
    """

    # Of the nodes, only the one whose rank has died counts it.
    is_restart = any(all_gather_object(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))

    def has_gone_on() -> bool:
        if not is_restart or _read(path).get("job") != _job():
            return False
        if not list_checkpoints(path / CHECKPOINTS_FOLDER):
            if path.exists():
                delete_run_directory(path)
            return False
        return True

    if on_main(has_gone_on):
        with open_dict(cfg):
            cfg.resume, cfg.overwrite = "auto", False


def _sign(path: Path, job: str | None) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "job": job}
    _lock_file(path).write_text(json.dumps(holder) + "\n", encoding="utf-8")


def _lock_file(path: Path) -> Path:
    path = path.resolve()  # one directory has one lock, whatever links lead to it
    return path.with_name(f".{path.name}.lock")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_lock_file(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):  # nobody has had it, or is about to sign
        return {}


def _job() -> str:
    """Names this job of torchrun, across its restarts; alone, this process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # "none" is what everyone has who gives no --rdzv-id; the agent then is this process's parent.
    return run_id if run_id != "none" else f"{socket.gethostname()}:{os.getppid()}"
