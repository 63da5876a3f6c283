"""``manifest.json``: size and checksum of each file of a checkpoint, written after all others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_EARLIER_NAME = "train_state.pt"  # of versions that pickled


def write_manifest(folder: Path) -> None:
    """Describe all files in ``folder``."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    }
    content = {"format": _FORMAT, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_files(folder: Path, required: Collection[str], contents: Collection[str] | None = None) -> str | None:
    """Why the files are not those that the manifest describes; None where they are.

    Args:
        required: names that a manifest must have.
        contents: names of the files that are read and whose checksums are compared; None: all of them. Sizes are
            compared of every file.
    """
    try:
        files = _read_manifest(folder)
        missing = next((name for name in required if name not in files), None)
        if missing is not None:
            return f"{MANIFEST_NAME} does not list {missing}"
        for name, expected in files.items():
            if why := _check_file(folder / name, expected, contents is None or name in contents):
                return why
    except OSError as error:
        return f"it cannot be read ({error})"
    except _Damaged as damaged:
        return str(damaged)
    return None


class _Damaged(Exception):
    """args: what is wrong."""


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if (folder / _EARLIER_NAME).is_file():
            raise _Damaged(f"it has {_EARLIER_NAME} and no {MANIFEST_NAME}: an earlier version of quiltnet wrote it")
        raise _Damaged(f"{MANIFEST_NAME} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, files = content["format"], content["files"]
        entries = {name: {"size": int(of["size"]), "sha256": str(of["sha256"])} for name, of in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{MANIFEST_NAME} is damaged") from error
    if version != _FORMAT:
        raise _Damaged(f"{MANIFEST_NAME} is of format {version}; this version of quiltnet reads format {_FORMAT}")
    if any(Path(name).name != name for name in entries):
        raise _Damaged(f"{MANIFEST_NAME} names files outside the checkpoint")
    return entries


def _check_file(path: Path, expected: dict[str, Any], reads: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected["size"]:
        return f"{path.name} has {size:,} bytes in place of {expected['size']:,}"
    if reads and _sha256(path) != expected["sha256"]:
        return f"{path.name} is damaged: its checksum is not the one it was saved with"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest came with Python 3.11
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
