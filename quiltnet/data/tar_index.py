"""Offsets of a tar's members: random access to the samples of a local shard."""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

# webdataset's convention: the key ends at the first dot of the base name, and keeps its folders.
MEMBER_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")


class TarIndex:
    """Where the members of each sample of one uncompressed tar lie.

    Consecutive members with the same key are one sample, as for webdataset. Member names are labels, never
    paths to open; links, folders and devices are passed over. Kept are the keys, 8 bytes a sample and 20
    bytes a member.

    The file is opened anew for each read (4 microseconds; decoding a tile takes 1,000): an index pickles,
    forks and holds no descriptor, however many shards there are. A file that shrinks meanwhile makes a read
    come back short, where a memory map would kill the process.

    Attributes:
        keys: one a sample, in the order of the tar.
        is_truncated: the tar breaks off before its end-of-archive mark.

    Raises:
        tarfile.ReadError: the file does not begin as an uncompressed tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: list[str] = []
        starts, offsets, sizes, kinds = array("q"), array("q"), array("q"), array("i")
        kind_of: dict[str, int] = {}  # distinct extensions are few: members name theirs by number
        seen: set[str] = set()  # extensions of the sample at hand
        with tarfile.open(path, "r:", errors="replace") as tar:
            for key, extension, offset, size in _members(tar):
                if not self.keys or key != self.keys[-1] or extension in seen:
                    self.keys.append(key)
                    starts.append(len(offsets))
                    seen.clear()
                seen.add(extension)
                offsets.append(offset)
                sizes.append(size)
                kinds.append(kind_of.setdefault(extension, len(kind_of)))
            end = tar.offset
        starts.append(len(offsets))
        self._starts, self._offsets = np.array(starts), np.array(offsets)
        self._sizes, self._kinds = np.array(sizes), np.array(kinds)
        self._extensions = list(kind_of)
        self.is_truncated = not _ends_at(path, end)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> list[str]:
        """Extensions of a sample's members, in the order of the tar."""
        return [self._extensions[kind] for kind in self._kinds[self._span(sample)]]

    def read(self, sample: int, wanted: Container[str]) -> dict[str, bytes]:
        """Bytes of those members of a sample whose extension is ``wanted``, by extension.

        Raises:
            EOFError: the file ends before a member does.
        """
        span = self._span(sample)
        places = zip(self.members(sample), self._offsets[span], self._sizes[span], strict=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return {
                extension: _read_exactly(descriptor, int(size), int(offset))
                for extension, offset, size in places
                if extension in wanted
            }
        finally:
            os.close(descriptor)

    def _span(self, sample: int) -> slice:
        return slice(self._starts[sample], self._starts[sample + 1])


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, int, int]]:
    """(key, extension, offset, size) of each regular file, up to the end or to where the tar breaks off."""
    # A ReadError says that the last member was cut. It is in the index already, and fails when it is read.
    with suppress(tarfile.ReadError):
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep a kilobyte for each
            name = MEMBER_NAME.fullmatch(member.name)
            if name and member.isreg() and not member.issparse():
                yield name[1], name[2].lower(), member.offset_data, member.size


def _ends_at(path: Path, offset: int) -> bool:
    """Whether an end-of-archive mark, a block of zeros, stands at ``offset``."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    # A network file system may return part of what is there; only an empty answer is the end of the file.
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise EOFError(f"the file ends {size - len(data)} bytes early")
        data += more
    return data
