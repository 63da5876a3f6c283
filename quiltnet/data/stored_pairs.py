"""Random access to the image-caption pairs of local shards, our own or foreign ones."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from quiltnet.data.decoding import BrokenSample
from quiltnet.data.pairs import image_id
from quiltnet.data.shard_files import ShardFile
from quiltnet.data.tar_index import TarIndex, open_index
from quiltnet.data.teacher_features import TEACHER_EXTENSION
from quiltnet.errors import UserError

# npy: pixels as `quiltnet prepare --raw` keeps them.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp", "npy")
WANTED_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "json", "txt", TEACHER_EXTENSION))

CAPTION_PROBE = 16  # samples of a shard that are looked at before it is said to have no captions
OPEN_INDICES = 4096  # Linux allows a process 65,530 maps


@dataclass(frozen=True)
class StoredPair:
    """A sample as it lies in a shard: the bytes of an image, at least one caption, ids, its json, if it has one, and
    the bytes of a teacher's features, if it has any."""

    key: str
    image: bytes
    captions: list[str]
    image_id: str
    record: dict[str, Any] = field(default_factory=dict)
    teacher: bytes = b""


class StoredPairs:
    """The samples of several shards as one sequence, in shard order.

    Args:
        shards: local tars.
        report: called with (number of shards looked at, their number), since a first look at a large set takes time.

    Attributes:
        counts: samples of each shard.
        identities: of each shard, by which another tar under its name is known.
        missing: number of samples, by shard, that a manifest promises and a tar lacks; at least 1 of a tar
            that breaks off where nothing says how many it held.

    Raises:
        UserError: a shard is no tar, is empty, or has no captions; the cache of indices cannot be written.
    """

    def __init__(self, shards: Sequence[ShardFile], report: Callable[[int, int], None] | None = None) -> None:
        self.shards = list(shards)
        self.missing: dict[str, int] = {}
        self._files: list[tuple[str, str, int]] = []  # tar, index, time of the index
        self.counts: list[int] = []
        self.identities: list[str] = []
        for number, shard in enumerate(self.shards):
            index = _open_shard(shard)
            self._files.append((str(shard.path), str(index.file), index.file.stat().st_mtime_ns))
            self.counts.append(len(index))
            self.identities.append(index.identity)
            absent = _count_missing(shard, index)
            if absent > 0:
                self.missing[str(shard.path)] = absent
            if report is not None:
                report(number + 1, len(self.shards))
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> StoredPair:
        """Raises BrokenSample, with reason and key (the tar's path, where keys can no longer be read)."""
        return _read_pair(*self._locate(number))

    def key(self, number: int) -> str:
        index, sample = self._locate(number)
        return index.key(sample)

    def shard_of(self, number: int) -> str:
        """The tar that holds a sample."""
        return self._files[bisect_right(self._ends, number)][0]

    def _locate(self, number: int) -> tuple[TarIndex, int]:
        number = range(len(self))[number]  # IndexError past the end
        shard = bisect_right(self._ends, number)
        try:
            index = _opened(*self._files[shard])
        except OSError as error:  # deleted or made anew, as its tar may be; keys are in it
            raise BrokenSample("unreadable_shard", self._files[shard][0]) from error
        return index, number - self._ends[shard] + self.counts[shard]


def pair_from_members(key: str, members: Mapping[str, bytes], place: str) -> StoredPair:
    """A sample from its files.

    A caption is what ``captions`` or ``caption`` of the json say, else the txt. The image id is that of our own json;
    elsewhere it is made from the place and the key.

    Args:
        members: contents by extension, in lower case; those that are no image, json, txt or features do not matter.
        place: ``folder/shard.tar``.

    Raises:
        BrokenSample: no_image, several_images (which one do the captions describe?), unreadable_json, no_caption.
    """
    images = [data for extension, data in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise BrokenSample("several_images" if images else "no_image", key)
    try:
        record = _parse_json(members.get("json", b"{}"))
        captions = _captions(record, members.get("txt", b""))
    except BrokenSample as error:
        raise BrokenSample(error.reason, key) from error
    stated = record.get("image_id")
    is_ours = isinstance(stated, str) and re.fullmatch("[0-9a-f]{16}", stated)
    named = stated if is_ours else image_id(f"{place}/{key}")
    return StoredPair(key, images[0], captions, named, record, members.get(TEACHER_EXTENSION, b""))


@lru_cache(maxsize=OPEN_INDICES)
def _opened(path: str, file: str, written: int) -> TarIndex:
    """The index of a tar. Raises OSError where it is not the one that was ``written`` then."""
    if os.stat(file).st_mtime_ns != written:
        raise OSError(f"{file} was made again: {path} is not the tar that it was")
    return TarIndex(Path(path), Path(file))


def _read_pair(index: TarIndex, sample: int) -> StoredPair:
    key = index.key(sample)
    try:
        members = index.read(sample, WANTED_EXTENSIONS)
        return pair_from_members(key, members, "/".join(index.path.parts[-2:]))
    except EOFError as error:
        raise BrokenSample("truncated_tar", key) from error
    except OSError as error:  # deleted or unreachable since the index was opened
        raise BrokenSample("unreadable_shard", key) from error
    except BrokenSample as error:
        if index.may_be_cut(sample):
            raise BrokenSample("truncated_tar", key) from error
        raise


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenSample("unreadable_json") from error
    if not isinstance(record, dict):
        raise BrokenSample("unreadable_json")
    return record


def _captions(record: dict[str, Any], txt: bytes) -> list[str]:
    stated = record.get("captions", record.get("caption"))
    texts = stated if isinstance(stated, list) else [stated]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    captions = captions or [text for text in [txt.decode("utf-8-sig", "replace").strip()] if text]
    if not captions:
        raise BrokenSample("no_caption")
    return captions


def _open_shard(shard: ShardFile) -> TarIndex:
    index = open_index(shard.path)
    if not len(index):
        raise UserError(f"{shard.path} is an empty tar; leave it out, or pack it again")
    if not any(_has_caption(index, sample) for sample in range(min(len(index), CAPTION_PROBE))):
        raise UserError(
            f"{shard.path} has no captions: its samples need a .json with captions or caption, or a .txt; "
            f"its first sample {index.key(0)} has {', '.join(index.members(0))}"
        )
    return index


def _has_caption(index: TarIndex, sample: int) -> bool:
    """Whether a sample has text, or is damaged, which says nothing of the others."""
    try:
        _read_pair(index, sample)
    except BrokenSample as error:
        return error.reason not in ("no_caption", "no_image")
    return True


def _count_missing(shard: ShardFile, index: TarIndex) -> int:
    return int(index.is_truncated) if shard.samples is None else shard.samples - len(index)
