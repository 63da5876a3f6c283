"""Small files that are whole or as they were before, whatever ends the process."""

from __future__ import annotations

import os
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
