"""Images that lie in tars, read by offset."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quiltnet.data.pairs import hash_code, plain_path
from quiltnet.data.tar_members import Member

PLACES_NAME = "tar-places.npy"
UNPACKED = "unpacked"
GZIP_MAGIC = b"\x1f\x8b"
PROBE_BYTES = 4096


class TarredImages:
    """The images of several tars by the paths that ``ImagePlaces`` was told; of compressed tars, their copies."""

    def __init__(self, tars: Sequence[Path], identity: Any) -> None:
        self._tars = list(tars)
        self._identity = identity
        self._work: Path | None = None
        self._places: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": None}  # mapped anew by each process

    def prepare(self, work: Path, wanted: np.ndarray) -> None:
        self._work, self._places = work, None
        self._tars = [unpacked_name(work, number, tar) for number, tar in enumerate(self._tars)]

    def read(self, path: str) -> bytes:
        tar, offset, size = self._find(path)
        data = read_at(self._tars[tar], offset, size)
        if len(data) < size:
            raise OSError("the tar ends before the image does")
        return data

    def size(self, path: str) -> int:
        try:
            return self._find(path)[2]
        except FileNotFoundError:
            return 0

    def identity(self) -> Any:
        return self._identity

    def _find(self, path: str) -> tuple[int, int, int]:
        """(number of the tar, offset, size)"""
        if self._places is None:
            self._places = np.load(self._work / PLACES_NAME, mmap_mode="r")
        codes = self._places[0]
        code = np.uint64(hash_code(plain_path(path)))
        place = int(np.searchsorted(codes, code))
        if place == len(codes) or codes[place] != code:
            raise FileNotFoundError(path)
        tar, offset, size = self._places[1:, place].tolist()
        return tar, offset, size


class ImagePlaces:
    """Where images lie, gathered while tars are read: 40 bytes each."""

    def __init__(self) -> None:
        self._columns = [array("Q") for _ in range(5)]  # code of the path, number of the tar, offset, size, probe

    def add(self, path: str, number: int, tar: Path, image: Member) -> None:
        # Paths that two samples share stand for one image; a few bytes out of its middle tell if they do not.
        middle = image.offset + max(image.size - PROBE_BYTES, 0) // 2
        probe = zlib.crc32(read_at(tar, middle, min(image.size, PROBE_BYTES)))
        values = (hash_code(plain_path(path)), number, image.offset, image.size, probe)
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    def save(self, work: Path) -> tuple[int, int] | None:
        """Writes them down. Returns (code, number of a tar) of a path that stands for two different images."""
        columns = np.array(self._columns, np.uint64).reshape(5, -1)
        columns = columns[:, np.lexsort((columns[2], columns[1], columns[0]))]
        is_again = np.zeros(columns.shape[1], bool)
        is_again[1:] = columns[0, 1:] == columns[0, :-1]
        differs = np.zeros(columns.shape[1], bool)
        differs[1:] = is_again[1:] & (columns[3:, 1:] != columns[3:, :-1]).any(axis=0)
        if differs.any():
            code, number = columns[:2, differs][:, 0].tolist()
            return code, number
        np.save(work / PLACES_NAME, columns[:4, ~is_again])
        return None


def unpacked_name(work: Path, number: int, tar: Path) -> Path:
    """``tar`` itself, or the place of its copy if it is compressed, whatever its name."""
    with open(tar, "rb") as file:
        is_compressed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return work / UNPACKED / f"{number:06d}.tar" if is_compressed else tar


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file; fewer where it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)
