"""Offsets of a tar's members: random access to the samples of a local shard.

An index is a small file of its own (a safetensors file, mapped when it is used): ``<tar>.index`` beside the tar where
``quiltnet shard`` wrote one, or in the user's cache folder where one was made on first use. It says which bytes it
was made from, and is made again where they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
from array import array
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from quiltnet.data.tar_members import Member, TarMembers
from quiltnet.errors import UserError
from quiltnet.whole_files import as_any_file

# webdataset's convention: the key ends at the first dot of the base name, and keeps its folders.
MEMBER_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")

FORMAT = "1"
PIECE_BYTES = 1 << 26  # read at once: a damaged header may announce more than there is memory for
IDENTIFYING_BYTES = 16_384  # at the front and at the end: a tar's own end mark can have 10,240


class TarIndex:
    """Where the members of each sample of one uncompressed tar lie.

    Consecutive members with the same key are one sample, as for webdataset. Kept are the keys, 16 bytes a sample and
    20 bytes a member, all in one mapped file: processes share its pages.

    The tar itself is opened anew for each read (4 microseconds; decoding a tile takes 1,000) and not mapped: a file
    that shrinks meanwhile makes a read come back short, where a memory map would kill the process.

    Attributes:
        is_truncated: the tar breaks off before its end-of-archive mark.

    Raises:
        OSError, ValueError: ``file`` is no index.
    """

    def __init__(self, path: Path, file: Path) -> None:
        self.path = path
        self.file = file
        # Mapped by torch, since Python's mmap keeps a descriptor open, and there may be thousands.
        mapped = torch.from_file(str(file), shared=False, size=os.path.getsize(file), dtype=torch.uint8).numpy()
        begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        entries = json.loads(mapped[8:begin].tobytes())
        facts = entries.pop("__metadata__")
        tensors = {name: _view(mapped, begin, entry) for name, entry in entries.items()}
        self._keys, self._key_starts = tensors["keys"], tensors["key_starts"]
        self._starts, self._offsets = tensors["starts"], tensors["offsets"]
        self._sizes, self._kinds = tensors["sizes"], tensors["kinds"]
        self._extensions: list[str] = json.loads(facts["extensions"])
        self.is_truncated = facts["is_truncated"] == "true"
        self.identity = facts["identity"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def key(self, sample: int) -> str:
        return bytes(self._keys[self._key_starts[sample] : self._key_starts[sample + 1]]).decode("utf-8")

    def members(self, sample: int) -> list[str]:
        """Extensions of a sample's members, in the order of the tar."""
        return [self._extensions[kind] for kind in self._kinds[self._span(sample)]]

    def may_be_cut(self, sample: int) -> bool:
        """Whether the end of a tar that breaks off may have fallen between the members of this sample."""
        return self.is_truncated and sample == len(self) - 1

    def read(self, sample: int, wanted: Container[str]) -> dict[str, bytes]:
        """Bytes of those members of a sample whose extension is ``wanted``, by extension.

        Raises:
            EOFError: the file ends before a member does.
            OSError: the file is gone.
        """
        span = self._span(sample)
        places = zip(self._kinds[span].tolist(), self._offsets[span].tolist(), self._sizes[span].tolist(), strict=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return {
                self._extensions[kind]: _read_exactly(descriptor, size, offset)
                for kind, offset, size in places
                if self._extensions[kind] in wanted
            }
        finally:
            os.close(descriptor)

    def _span(self, sample: int) -> slice:
        return slice(self._starts[sample], self._starts[sample + 1])


def group_members(members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, members by extension): consecutive members of one key are a sample, as for webdataset.

    A repeated extension begins a new one.
    """
    newest: str | None = None
    found: dict[str, Member] = {}
    for member in members:
        name = MEMBER_NAME.fullmatch(member.name)
        if name is None:
            continue
        key, extension = name[1], name[2].lower()
        if newest is not None and (key != newest or extension in found):
            yield newest, found
            found = {}
        newest = key
        found[extension] = member
    if newest is not None:
        yield newest, found


def write_index(tar: Path) -> Path:
    """Index ``tar`` into ``<tar>.index`` beside it.

    Raises:
        tarfile.ReadError: it is no uncompressed tar.
        OSError: its folder cannot be written.
    """
    return _write(tar.with_name(f"{tar.name}.index"), _identity(tar), *_scan(tar))


def find_index(tar: Path) -> Path | None:
    """The file of an index that was made from ``tar`` as it is now: beside it, or in the cache."""
    identity, changed = _identity(tar), tar.stat().st_mtime_ns
    for file in (tar.with_name(f"{tar.name}.index"), _cached(tar)):
        try:
            # Of a tar that was written anew, both ends may be what they were.
            if file.stat().st_mtime_ns >= changed and TarIndex(tar, file).identity == identity:
                return file
        except (OSError, ValueError, KeyError):  # none, or not whole: it is made again
            continue
    return None


def ensure_index(tar: Path) -> Path:
    """``find_index``, or else a new index in the cache (about 15 microseconds a sample, once).

    Raises:
        tarfile.ReadError: it is no uncompressed tar.
        OSError: it cannot be read.
        UserError: the cache cannot be written.
    """
    found = find_index(tar)
    if found is not None:
        return found
    identity, scanned = _identity(tar), _scan(tar)
    try:
        return _write(_cached(tar), identity, *scanned)
    except OSError as error:
        raise UserError(
            f"indices of tars cannot be kept in {cache_folder()} ({error.strerror or error}); "
            "set QUILTNET_CACHE to a folder that can be written"
        ) from error


def open_index(tar: Path) -> TarIndex:
    """The index of ``tar``, made where there is none. Raises UserError where it is no tar that can be read."""
    try:
        return TarIndex(tar, ensure_index(tar))
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{tar} is not a tar that can be read ({error}); shards are uncompressed tars: gunzip a compressed one"
        ) from error


def cache_folder() -> Path:
    """``$QUILTNET_CACHE``, or a folder ``quiltnet`` where the user's caches are."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QUILTNET_CACHE") or Path(home) / "quiltnet")


def _cached(tar: Path) -> Path:
    place = hashlib.blake2b(os.fsencode(os.path.abspath(tar)), digest_size=8).hexdigest()
    return cache_folder() / "index" / f"{place}-{tar.name[-100:]}.index"


def _identity(tar: Path) -> str:
    """What an index is checked by, beside its age: the size of the tar and its ends. A copy has the same."""
    with open(tar, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = hashlib.blake2b(file.read(IDENTIFYING_BYTES), digest_size=16)
        file.seek(max(size - IDENTIFYING_BYTES, 0))
        ends.update(file.read())
        return f"{FORMAT} {size} {ends.hexdigest()}"


def _write(file: Path, identity: str, tensors: dict[str, np.ndarray], facts: dict[str, str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Ranks may build the same one at once: each writes its own, and one that is whole takes the name.
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:100]}.")
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata={"identity": identity, **facts})
        as_any_file(Path(temporary))
        os.replace(temporary, file)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, SafetensorError):  # its word for a full disk
            raise OSError(str(error)) from error
        raise
    return file


def _scan(tar: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    keys, key_starts = bytearray(), array("q", [0])
    starts, offsets, sizes, kinds = array("q"), array("q"), array("q"), array("i")
    kind_of: dict[str, int] = {}  # distinct extensions are few: members name theirs by number
    members = TarMembers(tar)
    for key, found in group_members(members):
        keys += key.encode("utf-8", "replace")
        key_starts.append(len(keys))
        starts.append(len(offsets))
        for extension, member in found.items():
            offsets.append(member.offset)
            sizes.append(member.size)
            kinds.append(kind_of.setdefault(extension, len(kind_of)))
    starts.append(len(offsets))
    tensors = {
        "keys": np.frombuffer(keys, np.uint8) if keys else np.zeros(0, np.uint8),
        "key_starts": np.array(key_starts, np.int64),
        "starts": np.array(starts, np.int64),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
        "kinds": np.array(kinds, np.int32),
    }
    return tensors, {"extensions": json.dumps(list(kind_of)), "is_truncated": json.dumps(members.is_truncated)}


def _view(mapped: np.ndarray, begin: int, entry: dict) -> np.ndarray:
    """A tensor of a safetensors file (https://github.com/huggingface/safetensors#format), where it lies."""
    types = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
    first, end = entry["data_offsets"]
    if begin + end > len(mapped):
        raise ValueError("the index is cut")
    return mapped[begin + first : begin + end].view(types[entry["dtype"]])


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, min(size, PIECE_BYTES), offset)
    # A network file system may return part of what is there; only an empty answer is the end of the file.
    while len(data) < size:
        more = os.pread(descriptor, min(size - len(data), PIECE_BYTES), offset + len(data))
        if not more:
            raise EOFError(f"the file ends {size - len(data)} bytes early")
        data += more
    return data
