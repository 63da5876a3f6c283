"""Where a shard set is in the making: a folder beside its target, found again by the same request."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from quiltnet.data.manifest import MANIFEST_NAME, read_manifest
from quiltnet.errors import UserError
from quiltnet.whole_files import write_whole

# No split can be called so: their folders are made beside it.
WORK, REQUEST_NAME, LOCK_NAME = ".work", "request.json", "lock"


def check_target(out: str | Path, *, overwrite: bool, source: dict[str, Any] | None = None) -> None:
    """Raises UserError if a shard set must not be written to ``out``: only another one is ever replaced.

    source: what would be packed, for the message.
    """
    out = Path(out).expanduser()
    if os.path.ismount(out):
        raise UserError(f"{out} is a mount point, and cannot be replaced by a finished set; give a folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_set = (out / MANIFEST_NAME).is_file()
    if overwrite and not is_set:
        raise UserError(f"{out} is not a shard set, and is not overwritten; give another folder")
    if overwrite:
        return
    there = read_manifest(out)["source"] if is_set else None
    if source is not None and there is not None and there != source:
        raise UserError(
            f"{out} exists already and holds another source: {json.dumps(there)}, and not {json.dumps(source)}; "
            "give another folder, or --overwrite to replace it"
        )
    raise UserError(f"{out} exists already; give another folder, or --overwrite to replace a shard set")


@contextmanager
def built_aside(out: Path, request: Any, say: Callable[[str], None], *, overwrite: bool = False) -> Iterator[Path]:
    """``out.partial``, to build in, with what the same ``request`` has left there.

    When the block ends well, the folder takes the name ``out`` (and what had it goes). When it does not, it stays for
    the same request to go on with; but it goes if nothing can go on with it, as after a user's mistake at the door.

    Args:
        request: JSON that differs wherever the result would; None for one that cannot be recognised.
        overwrite: a shard set at ``out`` may be replaced.

    Raises:
        UserError: the folder cannot be made, somebody else is at work there, the disk is full, or somebody has used
            ``out`` meanwhile.
    """
    partial = partial_of(out)
    try:
        lock = _claim(out, request, say)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give a folder that can") from error
    with lock:
        try:
            yield partial
            check_target(out, overwrite=overwrite)
        except BaseException as error:
            if request is None or (isinstance(error, UserError) and not any(partial.glob("*/*.tar"))):
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{out}: the disk is full; make room, and the same command continues") from error
            raise
        if out.exists():
            out.rename(partial / WORK / "replaced")
        partial.rename(out)
        shutil.rmtree(out / WORK, ignore_errors=True)


def partial_of(out: Path) -> Path:
    """Where the set at ``out`` is built."""
    return out.with_name(f"{out.name}.partial")


def is_begun(out: Path, request: Any) -> bool:
    """Whether a run with the same ``request`` has left something to go on with."""
    try:
        recorded = (partial_of(out) / WORK / REQUEST_NAME).read_text(encoding="utf-8")
        return request is not None and json.loads(recorded) == json.loads(json.dumps(request))
    except (OSError, ValueError):
        return False


def _claim(out: Path, request: Any, say: Callable[[str], None]) -> TextIO:
    """Make the folder, or take it over; the open file that is returned keeps others out of it."""
    partial = partial_of(out)
    work = partial / WORK
    if partial.exists() and any(partial.iterdir()) and not work.is_dir():
        raise UserError(f"{partial} is in the way, and not what packing leaves behind; move it away")
    work.mkdir(parents=True, exist_ok=True)
    lock = open(work / LOCK_NAME, "w")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(f"another process is packing into {partial}; wait for it, or give another folder") from error
    recorded = work / REQUEST_NAME
    if not is_begun(out, request):
        if recorded.is_file():
            say(f"{partial} was left by another request or an older table; starting over")
        _clear(partial, {work})
        _clear(work, {work / LOCK_NAME})
        write_whole(recorded, json.dumps(request))
    return lock


def _clear(folder: Path, kept: set[Path]) -> None:
    for path in set(folder.iterdir()) - kept:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
