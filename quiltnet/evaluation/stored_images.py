"""Images within archives, each read when it is asked for, in any process."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from quiltnet.errors import UserError

LOCAL_HEADER_BYTES = 30  # of a member of a zip, before its name and extra field (APPNOTE.TXT 4.3.7)


class NpzImages(Sequence[np.ndarray]):
    """N images (H, W, 3) or (H, W) uint8: one array of an npz file.

    What ``np.savez`` writes is mapped, so all processes share it. What ``np.savez_compressed`` writes can only be
    unpacked as a whole: each process that asks for an image does so once, and keeps it.

    Args:
        path: the npz file.
        array: name of its array (N, H, W, 3) or (N, H, W).

    Raises:
        UserError: no whole npz file, or no such array in it.
    """

    def __init__(self, path: str | Path, array: str) -> None:
        self.path = Path(path)
        self.array = array
        self._opened: np.ndarray | None = None
        self._place = _place_of(self.path, array)
        shape, dtype = self._place.shape, self._place.dtype
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise UserError(
                f"{array} of {path} is {shape} {dtype}; images are (N, H, W, 3) or (N, H, W) of uint8: convert them"
            )

    def __len__(self) -> int:
        return self._place.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        if self._opened is None:
            self._opened = self._open()
        return np.asarray(self._opened[range(len(self))[index]])

    def content(self) -> list[str]:
        file = _identity(self.path)
        return [f"{file} {self.array} {index}" for index in range(len(self))]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _open(self) -> np.ndarray:
        place = self._place
        if place.offset is not None:
            return np.memmap(self.path, place.dtype, "r", place.offset, place.shape, "F" if place.is_fortran else "C")
        try:
            with open(self.path, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
                return archive[self.array]
        except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
            raise UserError(f"cannot read {self.array} of {self.path} ({error}); get the file anew") from error


class ArrayPlace(NamedTuple):
    """An array of an npz file; offset in bytes, None where it is compressed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    offset: int | None


def _place_of(path: Path, array: str) -> ArrayPlace:
    """Found by reading headers alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{array}.npy")
            with archive.open(info) as member:
                is_first = npy.read_magic(member) == (1, 0)
                read_header = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
                shape, is_fortran, dtype = read_header(member)
                header_bytes = member.tell()
        if info.compress_type != zipfile.ZIP_STORED:
            return ArrayPlace(shape, dtype, is_fortran, None)
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(LOCAL_HEADER_BYTES))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {array} of {path} as an npz file ({error}); get it anew, whole") from error
    start = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    return ArrayPlace(shape, dtype, is_fortran, start + header_bytes)


class TarImages(Sequence[bytes]):
    """Encoded images in uncompressed tars, read by where they lie.

    Args:
        tars: T paths.
        tar_numbers: (N,) which of them an image is in.
        offsets: (N,) int64, in bytes.
        sizes: (N,) int64, in bytes.
    """

    def __init__(self, tars: Sequence[Path], tar_numbers: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
        self.tars = tars
        self.tar_numbers = tar_numbers
        self.offsets = offsets
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> bytes:
        with open(self.tars[self.tar_numbers[index]], "rb") as file:
            file.seek(self.offsets[index])
            return file.read(self.sizes[index])

    def content(self) -> list[str]:
        files = [_identity(tar) for tar in self.tars]
        places = zip(self.tar_numbers.tolist(), self.offsets.tolist(), self.sizes.tolist(), strict=True)
        return [f"{files[tar]} {offset} {size}" for tar, offset, size in places]


class Member(NamedTuple):
    """A regular file in a tar; offset and size in bytes."""

    name: str
    offset: int
    size: int


def read_members(tar: Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in its order; headers alone are read.

    Raises:
        UserError: it is no uncompressed tar, or breaks off before its end.
    """
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.isreg():
                    yield Member(member.name, member.offset_data, member.size)
                archive.members.clear()  # tarfile would keep a kilobyte for each
            end = archive.offset
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read {tar} as an uncompressed tar ({error}); unpack a .gz, or get it anew") from error
    # tarfile takes a header that was cut or damaged for the end, which is a block of zeros.
    with open(tar, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"{tar} breaks off at byte {end}, before the end of a tar; get it anew, whole")


class HuggingFaceImages(Sequence):
    """The images of a Hugging Face data set on disk, as they are stored: encoded, or the path of a file.

    Args:
        rows: ``datasets.Dataset`` whose column is of the feature ``Image(decode=False)``.
        folder: of the data set.

    Raises:
        UserError: it names a file outside of the folder, as its table or, when it is asked for, as an image.
    """

    def __init__(self, rows: Any, column: str, folder: str | Path) -> None:
        self.rows = rows
        self.column = column
        self.folder = Path(folder).resolve()
        for file in rows.cache_files:
            self._inside(file["filename"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes | Path:
        stored = self.rows[index][self.column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise UserError(f"row {index} of the data set has no image; take it out of the set")
        if stored["bytes"] is not None:
            return stored["bytes"]
        return self._inside(stored["path"])

    def _inside(self, named: str) -> Path:
        file = (self.folder / named).resolve()
        if not file.is_relative_to(self.folder):
            raise UserError(
                f"{self.folder} names {named}, which is outside of it; where the data set is your own, save_to_disk of "
                "a newer datasets library keeps the images in it"
            )
        return file

    def content(self) -> list[str]:
        files = " ".join(_identity(Path(file["filename"])) for file in self.rows.cache_files)
        return [f"{files} {self.column} {index}" for index in range(len(self))]


def _identity(path: Path) -> str:
    status = os.stat(path)
    return f"{path} {status.st_size} {status.st_mtime_ns}"
