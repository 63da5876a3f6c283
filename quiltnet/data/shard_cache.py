"""Remote shards kept on a local disk, up to a number of bytes.

Why not a library's: fsspec's file caches have no limit; webdataset's ``FileCache`` names files by the last part of the
URL alone (train/000.tar and val/000.tar would be one file), checks neither size nor checksum, lets two processes fetch
one file at the same time, and removes files by their age, the one just being read among them.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from quiltnet.data.pairs import short_hash
from quiltnet.data.remote_files import Unreachable
from quiltnet.data.remote_shards import RemoteShard, place_of
from quiltnet.data.remote_sources import without_secrets
from quiltnet.errors import UserError

COPY_BYTES = 1 << 20

# Nothing else in the folder is ever touched.
OWN_NAME = re.compile(r"(?P<digest>[0-9a-f]{16})-(?P<size>\d+)-(?P<readable>[\w.]+)")
PART_NAME = re.compile(r"[0-9a-f]{16}-[\w.]+\.[0-9a-f]{16}\.part")

DOWNLOADS = 2  # of a shard whose bytes are not those of the manifest: once may be the fault of the line
ABANDONED_S = 600.0  # a download that has not grown for so long belongs to a process that is gone

log = logging.getLogger(__name__)

# Files of all caches that this process reads. (What another one removes meanwhile can still be read to its end.)
_open_files: weakref.WeakKeyDictionary[BinaryIO, Path] = weakref.WeakKeyDictionary()


class ShardCache:
    """A folder of whole shards; several processes may share it.

    A shard is fetched under a temporary name, checked against the manifest's size and checksum, then renamed. Files are
    called ``<hash of URL and checksum>-<size>-<name>``, so one of another length was damaged, and is fetched again.
    Least recently opened shards are removed when a new one needs their room. The limit holds for finished shards;
    every download that runs in another process may lie above it.

    Args:
        folder: made where it is not there.
        limit_bytes: of all shards in it.
        wait_s: for another process that is fetching the same shard; then the shard is streamed.

    Raises:
        UserError: the folder cannot be written, or the limit is not positive.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, *, wait_s: float = 120.0) -> None:
        self.folder = Path(os.path.abspath(Path(folder).expanduser()))
        self.limit_bytes = limit_bytes
        self._wait_s = wait_s
        self._warned = False
        if limit_bytes < 1:
            raise UserError(f"a cache of {limit_bytes} bytes holds nothing; give it at least the size of some shards")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be a cache ({error.strerror}); give a folder that can") from error
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"{self.folder} cannot be a cache: it cannot be written; give a folder that can")

    def open(self, shard: RemoteShard, connect: Callable[[], BinaryIO]) -> BinaryIO | None:
        """The shard as a local file, which ``connect`` fetches where it is not there yet.

        None where it has to be streamed: it is larger than the cache, the disk is full, or another process takes too
        long to fetch it.

        Raises:
            Unreachable: as ``connect`` and reading raise it; or changed_shard, for bytes that the manifest does not
                describe.
        """
        name = _name(shard)
        try:
            file = self._find(name)
            if file is None:
                with self._alone(name) as is_mine:
                    file = self._find(name)  # it may have come while we waited
                    if file is None and is_mine:
                        file = self._fetch(name, shard, connect)
            return file
        except OSError as error:  # of this disk: what is remote raises Unreachable
            self._warn(f"{self.folder}: {error.strerror or error}")
            return None

    def discard(self, shard: RemoteShard) -> None:
        """Remove a shard that turned out to be damaged."""
        for path in self._paths(_name(shard)):
            path.unlink(missing_ok=True)

    def _find(self, name: str) -> BinaryIO | None:
        for path in self._paths(name):
            with suppress(FileNotFoundError):  # removed by another process a moment ago
                if path.stat().st_size == _stated_size(path):
                    os.utime(path)
                    return _opened(path, path)
                path.unlink()
        return None

    def _paths(self, name: str) -> list[Path]:
        digest, readable = name.split("-", 1)
        found = [(path, OWN_NAME.fullmatch(path.name)) for path in self.folder.glob(f"{digest}-*")]
        return [path for path, parts in found if parts and parts["readable"] == readable]

    @contextmanager
    def _alone(self, name: str) -> Iterator[bool]:
        """Whether no other process fetches this shard."""
        lock = FileLock(self.folder / f"{name}.lock")
        try:
            lock.acquire(timeout=self._wait_s)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError):  # a file system without locks: two may fetch the same bytes
            yield True
            return
        try:
            yield True
        finally:
            lock.release()

    def _fetch(self, name: str, shard: RemoteShard, connect: Callable[[], BinaryIO]) -> BinaryIO | None:
        if shard.bytes is not None and shard.bytes > self.limit_bytes:
            self._warn(f"{place_of(shard.url)} is larger than the cache of {self.limit_bytes} bytes")
            return None
        part = self.folder / f"{name}.{secrets.token_hex(8)}.part"
        try:
            self._make_room(shard.bytes or 0)
            for _ in range(DOWNLOADS):
                copied = self._copy(part, connect)
                if copied is None:
                    self._warn(f"{place_of(shard.url)} is larger than the cache of {self.limit_bytes} bytes")
                    return None
                size, digest = copied
                if shard.bytes in (None, size) and shard.sha256 in (None, digest):
                    self._make_room(size)
                    path = self.folder / name.replace("-", f"-{size}-", 1)
                    file = _opened(part, path)  # before another process can find it, and remove it
                    os.replace(part, path)
                    return file
        finally:
            part.unlink(missing_ok=True)
        place = without_secrets(shard.url)
        raise Unreachable("changed_shard", f"{place}: its bytes are not those that the manifest describes")

    def _copy(self, part: Path, connect: Callable[[], BinaryIO]) -> tuple[int, str] | None:
        """(size, sha256); None if it is larger than the whole cache."""
        digest = hashlib.sha256()
        size = 0
        with connect() as source, open(part, "wb") as file:
            while data := source.read(COPY_BYTES):
                size += len(data)
                if size > self.limit_bytes:
                    return None
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    def _make_room(self, size: int) -> None:
        """Remove what was opened longest ago, until ``size`` more bytes fit."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                facts = path.stat()
                if PART_NAME.fullmatch(path.name) and time.time() - facts.st_mtime > ABANDONED_S:
                    path.unlink()
                elif OWN_NAME.fullmatch(path.name):
                    found.append((facts.st_mtime, facts.st_size, path))
        in_use = {path for file, path in list(_open_files.items()) if not file.closed}
        total = size + sum(of_file for _, of_file, _ in found)
        for _, of_file, path in sorted(found):
            if total <= self.limit_bytes:
                return
            if path not in in_use:
                path.unlink(missing_ok=True)
                total -= of_file

    def _warn(self, what: str) -> None:
        if not self._warned:
            log.warning("%s; such shards are streamed, without a local copy", what)
            self._warned = True


def _name(shard: RemoteShard) -> str:
    """Without the size. A checksum in it tells the shard from one that lay at the same URL before."""
    readable = re.sub(r"[^\w.]+", "_", place_of(shard.url).split("/")[-1])[-64:]
    return f"{short_hash(f'{shard.url} {shard.sha256} {shard.bytes}')}-{readable}"


def _opened(path: Path, name: Path) -> BinaryIO:
    """The file at ``path``, which is or will be called ``name``."""
    file = io.BufferedReader(io.FileIO(path))
    _open_files[file] = name
    return file


def _stated_size(path: Path) -> int:
    return int(OWN_NAME.fullmatch(path.name)["size"])
