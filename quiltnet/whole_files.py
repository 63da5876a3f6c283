"""Files that are whole or as they were before, whatever ends the process, and that others may read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` as ``path``, which gets its name when every byte is on the disk; one writer at a time.

    File names in the text need not be Unicode (a surrogate stands for such a byte): those become escapes.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    unfinished = path.with_name(f".{path.name}.partial")
    with open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside ``path``, of the same ending, to write to: it becomes ``path`` when the block ends.

    Where the block fails nothing is left of it. Several processes may write the same ``path``: the last one stays.
    """
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def as_any_file(path: Path) -> None:
    """Give ``path`` the mode that a new file has here; safetensors 0.8 makes files for their owner alone.

    The mode is that of a file made for it: to ask for the umask is to change it, in all threads.
    """
    example = path.with_name(f".{path.name[:200]}.mode")
    example.touch()
    try:
        path.chmod(example.stat().st_mode & 0o777)
    finally:
        example.unlink()
