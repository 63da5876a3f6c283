"""Random access to the image-caption pairs of local shards, our own or foreign ones."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quiltnet.data.decoding import BrokenSample
from quiltnet.data.pairs import image_id
from quiltnet.data.shard_files import ShardFile
from quiltnet.data.tar_index import TarIndex
from quiltnet.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp")
WANTED_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "json", "txt"))

CAPTION_PROBE = 16  # samples of a shard that are looked at before it is said to have no captions


@dataclass(frozen=True)
class StoredPair:
    """A sample as it lies in a shard: the bytes of an image, at least one caption, and ids."""

    key: str
    image: bytes
    captions: list[str]
    image_id: str


class StoredPairs:
    """The samples of several shards as one sequence, in shard order.

    A caption is what ``captions`` or ``caption`` of the sample's json say, else its txt. The image id is that
    of our own json; elsewhere it is made from the names of folder, shard and key.

    Attributes:
        missing: number of samples, by shard, that a manifest promises and a tar lacks; at least 1 of a tar
            that breaks off where nothing says how many it held.

    Raises:
        UserError: a shard is no tar, is empty, or has no captions.
    """

    def __init__(self, shards: Sequence[ShardFile]) -> None:
        self.shards = list(shards)
        self._indices = [_open_index(shard) for shard in shards]
        self._ends = np.cumsum([len(index) for index in self._indices])
        self.missing = {
            str(shard.path): absent
            for shard, index in zip(shards, self._indices, strict=True)
            if (absent := _count_missing(shard, index)) > 0
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> StoredPair:
        """Raises BrokenSample, with reason and key."""
        return _read_pair(*self._locate(number))

    def key(self, number: int) -> str:
        index, sample = self._locate(number)
        return index.keys[sample]

    def _locate(self, number: int) -> tuple[TarIndex, int]:
        number = range(len(self))[number]  # IndexError past the end
        shard = int(np.searchsorted(self._ends, number, side="right"))
        index = self._indices[shard]
        return index, number - int(self._ends[shard]) + len(index)


def _read_pair(index: TarIndex, sample: int) -> StoredPair:
    key = index.keys[sample]
    try:
        contents = index.read(sample, WANTED_EXTENSIONS)
        image = next((data for extension, data in contents.items() if extension in IMAGE_EXTENSIONS), None)
        if image is None:
            raise BrokenSample("no_image")
        record = _parse_json(contents.get("json", b"{}"))
        captions = _captions(record, contents.get("txt", b""))
    except EOFError as error:
        raise BrokenSample("truncated_tar", key) from error
    except BrokenSample as error:
        # The cut may have fallen between the members of a sample, or into its padding.
        cut = index.is_truncated and sample == len(index) - 1
        raise BrokenSample("truncated_tar" if cut else error.reason, key) from error
    stated = record.get("image_id")
    is_ours = isinstance(stated, str) and re.fullmatch("[0-9a-f]{16}", stated)
    folder, shard = index.path.parts[-2:]
    return StoredPair(key, image, captions, stated if is_ours else image_id(f"{folder}/{shard}/{key}"))


def _parse_json(data: bytes) -> dict[str, object]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenSample("unreadable_json") from error
    if not isinstance(record, dict):
        raise BrokenSample("unreadable_json")
    return record


def _captions(record: dict[str, object], txt: bytes) -> list[str]:
    stated = record.get("captions", record.get("caption"))
    texts = stated if isinstance(stated, list) else [stated]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    captions = captions or [text for text in [txt.decode("utf-8", "replace").strip()] if text]
    if not captions:
        raise BrokenSample("no_caption")
    return captions


def _open_index(shard: ShardFile) -> TarIndex:
    try:
        index = TarIndex(shard.path)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard.path} is not a tar that can be read ({error}); shards are uncompressed tars"
        ) from error
    if not len(index):
        raise UserError(f"{shard.path} is an empty tar; leave it out, or pack it again")
    if not any(_has_caption(index, sample) for sample in range(min(len(index), CAPTION_PROBE))):
        raise UserError(
            f"{shard.path} has no captions: its samples need a .json with captions or caption, or a .txt; "
            f"its first sample {index.keys[0]} has {', '.join(index.members(0))}"
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
