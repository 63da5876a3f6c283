"""A folder of images with their captions beside them -> rows for the shard writer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quiltnet.data.image_files import IMAGE_ENDINGS, walk_files
from quiltnet.data.pairs import PairRow
from quiltnet.data.row_table import ListedRows
from quiltnet.errors import UserError

SPLITS = ("train", "val", "test")
TEXTS = ("txt", "json")


def folder_source(
    folder: str | Path, *, split: str | None = None, source_of: Callable[[str], str] | None = None
) -> ListedRows:
    """Rows of ``name.jpg`` with ``name.txt`` (its caption) or ``name.json`` beside it, at any depth.

    The json says ``captions`` or ``caption``, which go before the txt, and whatever else becomes metadata. Folders
    called train, val or test at the top are the splits, where there are any.

    Args:
        split: without such folders, the split of all (``train``); with them, the only one that is read.
        source_of: image path -> source; None where each image is its own.

    Raises:
        UserError: it is no folder, or has no such split.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give one of images with .txt or .json files beside them")
    rows = _rows(root, Splits(root, split), source_of or (lambda path: path))
    return ListedRows(rows, where=str(root), identity=[str(root.resolve()), split, _fingerprint(root)])


class Splits:
    """The splits of what lies below a folder: its folders called train, val and test, if it has one of them.

    Args:
        wanted: without such folders, the split of all; with them, the only one that is wanted.
        names: of such folders.

    Raises:
        UserError: there are such folders, and none is ``wanted``.
    """

    def __init__(self, root: Path, wanted: str | None, names: Sequence[str] = SPLITS) -> None:
        self._folders = [name for name in names if (root / name).is_dir()]
        self._wanted = wanted
        if self._folders and wanted is not None and wanted not in self._folders:
            raise UserError(f"{root} has no folder {wanted}; its splits are {', '.join(self._folders)}")

    def of(self, path: str) -> tuple[str, str]:
        """(split, defect) of a path below the folder; beside the folders of splits, it has none."""
        if not self._folders:
            return self._wanted or "train", ""
        leading = path.partition("/")[0]
        return (leading, "") if leading in self._folders else (self._wanted or "train", "no_split")

    def wants(self, path: str) -> bool:
        return not self._folders or self._wanted is None or path.partition("/")[0] == self._wanted


def _rows(root: Path, splits: Splits, source_of: Callable[[str], str]) -> Iterator[PairRow]:
    number = 0
    for path, text, record in _images(root):
        if not splits.wants(path):
            continue
        split, misplaced = splits.of(path)
        captions, metadata, broken = _read_captions(text, record)
        for caption in captions or [None]:
            yield PairRow(number, path, caption, split, source_of(path), metadata, misplaced or broken)
            number += 1


def _images(root: Path) -> Iterator[tuple[str, Path | None, Path | None]]:
    """(path from ``root``, txt, json) of each image, in the order of their names."""
    for folder, names in walk_files(root):
        place = Path(folder)
        parted = [(stem, ending.lower(), place / name) for name in names for stem, _, ending in [name.rpartition(".")]]
        texts = {(stem, ending): path for stem, ending, path in parted if ending in TEXTS}
        for stem, ending, path in parted:
            if stem and ending in IMAGE_ENDINGS and not path.name.startswith("."):
                yield path.relative_to(root).as_posix(), *(texts.get((stem, kind)) for kind in TEXTS)


def _fingerprint(root: Path) -> str:
    """Of names, sizes and times of all files: a caption that was put right is another source."""
    digest = hashlib.blake2b(digest_size=16)
    for folder, names in walk_files(root):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            digest.update(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def _read_captions(text: Path | None, record: Path | None) -> tuple[list[str], dict[str, Any], str]:
    """(captions, metadata, defect)"""
    metadata: dict[str, Any] = {}
    captions: list[str] = []
    if record is not None:
        try:
            stated = json.loads(record.read_bytes())
        except (ValueError, RecursionError, OSError):
            return [], {}, "unreadable_json"
        if not isinstance(stated, dict):
            return [], {}, "unreadable_json"
        captions = texts_of(stated)
        metadata = {name: value for name, value in stated.items() if name not in ("captions", "caption")}
    if not captions and text is not None:
        try:
            caption = text.read_bytes().decode("utf-8-sig", "replace")
        except OSError:
            return [], metadata, "unreadable_text"
        captions = [caption] if caption.strip() else []
    return captions, metadata, ""


def texts_of(record: dict[str, Any]) -> list[str]:
    """The captions that a json states: ``captions``, else ``caption``; one text or a list of them."""
    stated = record.get("captions", record.get("caption"))
    texts = stated if isinstance(stated, list) else [stated]
    return [text for text in texts if isinstance(text, str) and text.strip()]
