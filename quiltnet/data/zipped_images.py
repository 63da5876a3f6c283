"""Images that lie in zips, read in place: an index of what is wanted, and one read for each image.

Python's zipfile keeps a kilobyte for every member of every zip in every process; for 650,000 images in ten zips and
sixteen processes that is 10 GB. The index here is one mapped file of 40 bytes an image.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quiltnet.data.pairs import hash_code, plain_path
from quiltnet.data.tarred_images import read_at
from quiltnet.errors import UserError

MEMBER = np.dtype(
    [
        ("code", "u8"),  # hash_code of its name
        ("is_stripped", "u1"),  # ... of its name without the leading directory
        ("zip", "u4"),
        ("offset", "i8"),  # of its local header
        ("stored", "i8"),
        ("size", "i8"),
        ("crc", "u4"),
        ("method", "u2"),
        ("flags", "u2"),
    ]
)

MEMBERS_NAME, CODES_NAME = "zip-members.npy", "zip-codes.npy"

# The header before a member's bytes, of which the lengths of name and extra field are needed:
# https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7
LOCAL_HEADER = struct.Struct("<4s22xHH")
LOCAL_MAGIC = b"PK\3\4"

MAX_BYTES = 1 << 30  # no image file is larger; a member that claims to be is not unpacked
IS_ENCRYPTED = 1


class ZippedImages:
    """The images of several zips as one folder: a member's name is its path, with or without one leading directory.

    Raises:
        UserError: one is not a zip; from ``prepare``: a wanted path names members with different bytes.
    """

    def __init__(self, zips: Sequence[Path]) -> None:
        self.zips = [Path(path) for path in zips]
        self._work: Path | None = None
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        for path in self.zips:
            if not zipfile.is_zipfile(path):
                raise UserError(f"{path} is not a zip that can be read; it may be cut or not be downloaded to its end")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # mapped anew by each process

    def prepare(self, work: Path, wanted: np.ndarray) -> None:
        wanted = np.unique(wanted)
        parts = [_members(path, number, wanted) for number, path in enumerate(self.zips)]
        members = np.concatenate(parts)
        # A full name goes before a stripped one; then the first zip.
        members = members[np.lexsort((members["zip"], members["is_stripped"], members["code"]))]
        is_first = np.ones(len(members), bool)
        is_first[1:] = members["code"][1:] != members["code"][:-1]
        chosen = members[is_first]
        of_each = chosen[np.cumsum(is_first) - 1]
        is_rival = (members["is_stripped"] == of_each["is_stripped"]) & (
            (members["crc"] != of_each["crc"]) | (members["size"] != of_each["size"])
        )
        if is_rival.any():
            self._refuse(of_each[is_rival][0], members[is_rival][0])
        self._work, self._index = work, None
        np.save(work / MEMBERS_NAME, chosen)
        np.save(work / CODES_NAME, chosen["code"])

    def read(self, path: str) -> bytes:
        member = self._find(path)
        if member is None:
            raise FileNotFoundError(path)
        if member["flags"] & IS_ENCRYPTED:
            raise OSError("the member is encrypted")
        if member["method"] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OSError(f"the member is compressed by method {member['method']}, which is not read here")
        if max(member["size"], member["stored"]) > MAX_BYTES:
            raise OSError(f"the member is said to have {member['size']} bytes")
        data = _read_stored(self.zips[member["zip"]], int(member["offset"]), int(member["stored"]))
        if member["method"] == zipfile.ZIP_DEFLATED:
            data = _inflate(data, int(member["size"]))
        if len(data) != member["size"] or zlib.crc32(data) != member["crc"]:
            raise OSError("the member is damaged: its checksum differs")
        return data

    def size(self, path: str) -> int:
        member = self._find(path)
        return 0 if member is None else int(member["size"])

    def identity(self) -> Any:
        status = [path.stat() for path in self.zips]
        return [[str(path.resolve()), s.st_size, s.st_mtime_ns] for path, s in zip(self.zips, status, strict=True)]

    def _find(self, path: str) -> np.void | None:
        if self._index is None:
            self._index = tuple(np.load(self._work / name, mmap_mode="r") for name in (CODES_NAME, MEMBERS_NAME))
        codes, members = self._index
        code = np.uint64(hash_code(plain_path(path)))
        place = int(np.searchsorted(codes, code))
        return members[place] if place < len(codes) and codes[place] == code else None

    def _refuse(self, one: np.void, other: np.void) -> None:
        places = []
        for member in (one, other):
            path = self.zips[member["zip"]]
            with zipfile.ZipFile(path) as file:
                name = next(info.filename for info in file.infolist() if info.header_offset == member["offset"])
            places.append(f"{name} in {path} ({member['size']} bytes)")
        raise UserError(f"{places[0]} and {places[1]} are the same path with different bytes; leave one of them out")


def _members(path: Path, number: int, wanted: np.ndarray) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as file:
            found = list(_found(file.infolist(), number))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is not a zip that can be read ({error}); get it again") from error
    members = np.array(found, MEMBER)
    return members[np.isin(members["code"], wanted)]


def _found(infos: Sequence[zipfile.ZipInfo], number: int) -> Iterator[tuple[int, ...]]:
    for info in infos:
        if info.is_dir():
            continue
        facts = (info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, info.flag_bits)
        name = plain_path(info.filename)
        yield (hash_code(name), 0, number, *facts)
        leading, _, rest = name.partition("/")
        if leading and rest:
            yield (hash_code(rest), 1, number, *facts)


def _read_stored(path: Path, offset: int, size: int) -> bytes:
    header = read_at(path, offset, LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or not header.startswith(LOCAL_MAGIC):
        raise OSError("the zip is damaged: no member begins where its directory says")
    _, name_length, extra_length = LOCAL_HEADER.unpack(header)
    return read_at(path, offset + LOCAL_HEADER.size + name_length + extra_length, size)


def _inflate(data: bytes, size: int) -> bytes:
    try:
        # At most one byte more than the directory says: a member that swells does not fill the memory.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise OSError(f"the member is damaged: {error}") from error
