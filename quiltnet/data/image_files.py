"""Where image bytes come from when shards are packed: a folder, or zips that are read in place."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import braceexpand
import numpy as np

from quiltnet.data.zipped_images import ZippedImages
from quiltnet.errors import UserError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp")


class Images(Protocol):
    """Image bytes by the path that a row names. Worker processes get a pickled copy each, after ``prepare``."""

    def prepare(self, work: Path, wanted: np.ndarray) -> None:
        """Once, before the first image is read. ``wanted``: codes (``hash_code``) of all paths that will be asked for;
        ``work``: a folder for what makes finding them quick. UserError for images that cannot be told apart."""

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError where there is none (or a folder in its place), OSError where it is damaged."""

    def size(self, path: str) -> int:
        """Bytes of an image, 0 where there is none; nothing is read."""

    def identity(self) -> Any:
        """JSON that differs for other images."""


@dataclass(frozen=True)
class ImageFolder:
    """Files below a folder."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; give the one that the image paths of the table start from")

    def prepare(self, work: Path, wanted: np.ndarray) -> None:
        """Files are found by their names."""

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def size(self, path: str) -> int:
        try:
            return os.stat(self.folder / path).st_size
        except (OSError, ValueError):
            return 0

    def identity(self) -> Any:
        return str(self.folder.resolve())


def find_images(named: Sequence[str | Path]) -> Images:
    """The images that a user names: their folder, or zips (a folder of zips, files, patterns with ``*`` or braces).

    Raises:
        UserError: nothing is there, or a zip is not a zip.
    """
    if len(named) == 1 and (folder := Path(named[0]).expanduser()).is_dir() and not _holds_zips(folder):
        return ImageFolder(folder)
    rule = "is no folder, and names no zip; give the folder that the image paths of the table start from, or its zips"
    return ZippedImages(find_files(named, (".zip",), rule))


def find_files(named: Sequence[str | Path], endings: Sequence[str], rule: str) -> list[Path]:
    """Files that a user names one by one, by folder (searched below as well), or by patterns; sorted, each once.

    Raises:
        UserError: a name stands for no such file. ``rule``: how the message goes on.
    """
    found: list[Path] = []
    for name in named:
        matched = [path for piece in _expanded(str(name)) for path in _matches(piece, endings)]
        if not matched:
            raise UserError(f"{name} {rule}")
        found += matched
    return sorted(dict.fromkeys(found))


def walk_files(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of ``root`` and all below it, in the order of names.

    Links to folders are followed, but for those to a folder that they lie in.
    """
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not _leads_back(folder, name))
        yield folder, sorted(names)


def _leads_back(folder: str, name: str) -> bool:
    place = os.path.join(folder, name)
    return os.path.islink(place) and Path(place).resolve() in (Path(folder).resolve() / name).parents


def _holds_zips(folder: Path) -> bool:
    """Whether a folder is one of zips: an archive that lies among images does not make it one."""
    endings = {entry.name.rpartition(".")[2].lower() for entry in os.scandir(folder) if entry.is_file()}
    return "zip" in endings and not endings & set(IMAGE_ENDINGS)


def _matches(name: str, endings: Sequence[str]) -> list[Path]:
    path = Path(os.path.abspath(Path(name).expanduser()))
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [os.path.join(folder, name) for folder, names in walk_files(path) for name in names]
    else:
        files = glob.glob(str(path), recursive=True)
    return [Path(file) for file in files if file.lower().endswith(tuple(endings))]


def _expanded(name: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(name))
    except braceexpand.UnbalancedBracesError:
        return [name]  # a file may be called so
