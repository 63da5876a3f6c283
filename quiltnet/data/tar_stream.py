"""Samples of a tar that arrives as a stream of bytes, to be read once from front to back."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from quiltnet.data.tar_index import MEMBER_NAME

GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 20 * tarfile.BLOCKSIZE  # that tarfile reads at once

# A header may announce any size. No tile is a quarter of a GiB; what claims to be is passed over unread.
MAX_MEMBER_BYTES = 1 << 28

# What tarfile and zlib raise on damaged bytes; from ValueError on, by tarfile's parsing of extended headers.
DAMAGE = (
    tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, IndexError, OverflowError, RecursionError
)  # fmt: skip

READS_PAST_END = 16  # tarfile passes over what a header announces by reading it, though the stream has ended


@dataclass
class TarSample:
    """The files of a sample.

    Attributes:
        key: its name.
        members: contents by extension, in lower case, of those that were wanted.
        defect: too_many_bytes or truncated_tar where a wanted file could not be had whole.
        is_last_before_cut: the tar broke off in it, or right behind it.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    defect: str | None = None
    is_last_before_cut: bool = False


class BrokenTar(Exception):
    """No more samples can be had. reason: not_a_tar, or truncated_tar where it broke off or is damaged."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_samples(file: BinaryIO, wanted: Container[str], first: int = 0) -> Iterator[TarSample]:
    """The samples of a tar, from number ``first`` on; they are those of ``TarIndex``, in its order.

    Names of members are labels, never paths; links, folders, devices and sparse files are passed over. A gzip-ed tar is
    known by its first bytes. (webdataset's reader takes a tar that was cut between two members for a whole one, and
    ends a shard at the first repeated name.)

    Args:
        file: at the first byte of the tar; only its ``read`` is used, and may give less than was asked for. What it
            raises is passed on, once the samples before it have been given.
        wanted: extensions whose contents are kept.

    Raises:
        BrokenTar: after the last sample that could be read.
    """
    rewound = _Rewound(file)
    chunks = _Chunks(gzip.GzipFile(fileobj=rewound) if rewound.magic == GZIP_MAGIC else rewound)
    sample, number, seen = None, -1, set()
    try:
        with tarfile.open(fileobj=chunks, mode="r|", bufsize=CHUNK_BYTES, errors="replace") as tar:
            for key, extension, member in _members(tar):
                if sample is None or key != sample.key or extension in seen:
                    if number >= first:
                        yield sample
                    sample, number, seen = TarSample(key), number + 1, set()
                seen.add(extension)
                if number >= first and extension in wanted:
                    _read_member(tar, member, extension, sample)
            is_whole = chunks.block(tar.offset) == bytes(tarfile.BLOCKSIZE)  # a block of zeros is the end
    except DAMAGE as error:
        if sample is None and (chunks.end == 0 or isinstance(error, tarfile.ReadError)):
            raise BrokenTar("not_a_tar") from error
        is_whole = False
    if number >= first:
        sample.is_last_before_cut = not is_whole
        yield sample
    if not is_whole:
        raise BrokenTar("truncated_tar")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, member) of each regular file."""
    for member in tar:
        tar.members.clear()  # tarfile would keep a kilobyte for each
        name = MEMBER_NAME.fullmatch(member.name)
        if name and member.isreg() and not member.issparse():
            yield name[1], name[2].lower(), member


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: TarSample) -> None:
    if member.size > MAX_MEMBER_BYTES:
        sample.defect = "too_many_bytes"
        return
    try:
        sample.members[extension] = tar.extractfile(member).read()
    except DAMAGE:
        sample.defect = "truncated_tar"
        raise


class _Rewound:
    """A stream whose first two bytes (its magic) were looked at."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._unread = self.magic = file.read(1) + file.read(1)

    def read(self, size: int) -> bytes:
        if self._unread:
            data, self._unread = self._unread[:size], self._unread[size:]
            return data
        return self._file.read(size)


class _Chunks:
    """Reads on behalf of tarfile, and remembers the end of what was read.

    Attributes:
        end: number of bytes read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tail = b""
        self._reads_past_end = 0
        self.end = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._reads_past_end = 0 if data else self._reads_past_end + 1
        if self._reads_past_end > READS_PAST_END:
            raise EOFError("the stream has ended")
        self._tail = (self._tail + data)[-2 * CHUNK_BYTES :]
        self.end += len(data)
        return data

    def block(self, offset: int) -> bytes:
        """The block at ``offset``, which tarfile has just looked at; short or empty where the stream ended."""
        start = offset - (self.end - len(self._tail))
        return self._tail[start : start + tarfile.BLOCKSIZE] if start >= 0 else b""
