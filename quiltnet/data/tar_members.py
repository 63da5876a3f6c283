"""Where the members of a tar lie, found by reading its headers alone."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE

# What tarfile raises on damaged headers; all but the first are of its parsing of extended ones.
DAMAGE = (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError, MemoryError)

# Records of an extended header that say something about where a member lies, or what it is.
TELLING_RECORDS = (b" path=", b" size=", b" GNU.sparse", b" hdrcharset=")


class Member(NamedTuple):
    """A regular file in a tar; offset and size in bytes."""

    name: str
    offset: int
    size: int


class TarMembers:
    """Iterates over the regular files of one uncompressed tar, up to its end or to where it breaks off.

    Names are labels, never paths to open; links, folders, devices and sparse files are passed over. Ordinary headers
    are read here, in a third of tarfile's time; every other kind is left to tarfile.

    Attributes:
        is_truncated: once iterated over: the tar breaks off before its end-of-archive mark.

    Raises:
        tarfile.ReadError: the file does not begin as an uncompressed tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_truncated = False

    def __iter__(self) -> Iterator[Member]:
        with open(self.path, "rb") as file, _open_tar(file) as tar:
            tar.next()  # read when the file was opened; it comes again below
            descriptor, offset = file.fileno(), 0
            end = os.fstat(descriptor).st_size
            while offset < end:
                header = os.pread(descriptor, BLOCK, offset)
                size = None if tar.pax_headers else _ordinary_size(header)
                if size is not None:
                    yield Member(_name(header), offset + BLOCK, size)
                    offset += BLOCK + _padded(size)
                elif (skipped := _idle_extension(descriptor, header, offset)) and not tar.pax_headers:
                    offset += skipped
                else:
                    member, offset = _next_by_tarfile(tar, offset)
                    if member is None:
                        break
                    if member.isreg() and not member.issparse():
                        yield Member(member.name, member.offset_data, member.size)
            # The end is a block of zeros; anything else is a header that was cut or damaged.
            self.is_truncated = offset >= end or os.pread(descriptor, BLOCK, offset) != bytes(BLOCK)


def _ordinary_size(header: bytes) -> int | None:
    """Size of the regular file that a header announces; None for any other kind of header, and for a damaged one."""
    kind = header[156:157]
    # An old-style header (kind 0) whose name ends in a slash is a folder's.
    is_file = kind == b"0" or (kind == b"\0" and not header[:100].rstrip(b"\0").endswith(b"/"))
    return _stated_size(header) if is_file else None


def _stated_size(header: bytes) -> int | None:
    """The size in a sound header, None in one that is cut, damaged, or writes sizes in another way."""
    if len(header) < BLOCK or header[257:262] != b"ustar":
        return None
    try:
        size, checksum = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    # The sum of all bytes, those of the sum itself taken as blanks.
    is_sound = checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    return size if is_sound and size >= 0 else None


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    # GNU's old format keeps times where POSIX has the prefix, and says so by its magic.
    full = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
    return full.decode("utf-8", "replace")


def _idle_extension(descriptor: int, header: bytes, offset: int) -> int:
    """Bytes of an extended header that only tells times and owners of the next member; 0 for all other headers.

    The older webdataset writers put one before every member.
    """
    if header[156:157] != b"x":
        return 0
    size = _stated_size(header)
    records = os.pread(descriptor, size, offset + BLOCK) if size else b""
    if not records or len(records) < size or any(telling in records for telling in TELLING_RECORDS):
        return 0
    return BLOCK + _padded(size)


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", errors="replace")
    except DAMAGE as error:
        raise tarfile.ReadError(str(error) or type(error).__name__) from error


def _next_by_tarfile(tar: tarfile.TarFile, offset: int) -> tuple[tarfile.TarInfo | None, int]:
    """(member or None at the end, offset of what follows)"""
    tar.offset = offset
    tar.fileobj.seek(offset)
    try:
        member = tar.next()
    except DAMAGE:  # cut in the middle of an extended header, or of what it announces
        return None, offset
    tar.members.clear()  # tarfile would keep a kilobyte for each
    # A damaged size can lead back, again and again, or further than a file can reach.
    return (member, tar.offset) if member is not None and offset < tar.offset < 1 << 63 else (None, offset)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
