"""Shards that open_clip, img2dataset or we have written -> rows and images for the shard writer.

A first pass reads the headers, the txt and the json of every tar and notes where the images lie; they are read from
there when they are packed. A compressed tar is unpacked into the work folder first.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from quiltnet.data.decoding import BrokenSample
from quiltnet.data.folders import Splits
from quiltnet.data.image_files import find_files
from quiltnet.data.manifest import MANIFEST_NAME, TAR_ENDINGS, read_manifest
from quiltnet.data.pairs import PairRow, image_id
from quiltnet.data.row_table import ListedRows
from quiltnet.data.stored_pairs import IMAGE_EXTENSIONS, StoredPair, pair_from_members
from quiltnet.data.tar_index import group_members
from quiltnet.data.tar_members import Member, TarMembers
from quiltnet.data.tarred_images import ImagePlaces, TarredImages, read_at, unpacked_name
from quiltnet.errors import UserError

TEXTS = ("json", "txt")
GZIP_BITS = 16 + zlib.MAX_WBITS  # zlib's sign for gzip's format; Python's gzip gives up the last block of a cut file
UNPACKED_AT_ONCE = 16 << 20
MAX_TEXT_BYTES = 64 << 20  # a member that is said to be text and is larger is cut there
OURS = {"captions", "caption_ids", "image_id", "source_id", "image_path", "metadata", "caption_metadata"}

# What the reader of shards calls broken, in the words of the shard writer.
REASONS = {"no_image": "missing_image", "no_caption": "null_caption"}


class WebDatasetSource:
    """The samples of tars, as rows of the shard writer; ``images`` gives their images.

    A sample of our own keeps its ids and facts. Another's image path is ``tar/key.jpg``, without what is unsafe in
    the key: member names are labels, never paths. Folders called train, val or test below the folder named are the
    splits, where there are any; of a shard set, those that its manifest lists.

    Args:
        named: tars, their folder, or patterns; compressed ones too.
        split: without such folders, the split of all; with them, the only one that is read.
        source_of: image path -> source; None where each image is its own, or our json says it.

    Attributes:
        findings: samples whose key another has had (duplicate_keys) or could not be a path (unsafe_names), which
            get another name, and tars that break off (truncated_tars) or are none (unreadable_tars).

    Raises:
        UserError: nothing is there, or a tar is not that a manifest lists; while it is read: samples of our own claim
            to be the same image, and are not.
    """

    def __init__(
        self, named: Sequence[str | Path], *, split: str | None = None, source_of: Callable[[str], str] | None = None
    ) -> None:
        self._tars = find_files(
            named, TAR_ENDINGS, "holds no tar; give tars, their folder, or a pattern such as 'x/*.tar'"
        )
        only = Path(os.path.abspath(Path(named[0]).expanduser())) if len(named) == 1 else None
        self._root = only if only and only.is_dir() else Path(os.path.commonpath([path.parent for path in self._tars]))
        self._split, self._splits = split, _splits(self._root, split)
        self._source_of = source_of
        self.where, self.split_column = ", ".join(map(str, named)), "split"
        self.kinds: dict[str, str] = {}
        self.findings: Counter[str] = Counter()

    @property
    def images(self) -> TarredImages:
        return TarredImages(self._tars, self.identity())

    def identity(self) -> Any:
        status = [path.stat() for path in self._tars]
        tars = [[str(path), s.st_size, s.st_mtime_ns] for path, s in zip(self._tars, status, strict=True)]
        return [self._split, str(self._root), tars]

    def batches(self, work: Path) -> Iterator[pa.RecordBatch]:
        places = ImagePlaces()
        yield from ListedRows(self._rows(work, places)).batches(work)
        rival = places.save(work)
        if rival is not None:
            raise UserError(
                f"{self._tars[rival[1]]} holds an image with the path of another that differs from it "
                f"(image_id {rival[0]:016x}); pack the two sets of shards apart from each other"
            )

    def _rows(self, work: Path, places: ImagePlaces) -> Iterator[PairRow]:
        number = 0
        for tar_number, tar in enumerate(self._tars):
            label = tar.relative_to(self._root).as_posix()
            if not self._splits.wants(label):
                continue
            split, misplaced = self._splits.of(label)
            copy = unpacked_name(work, tar_number, tar)
            if copy != tar:
                _unpack(tar, copy)
            for sample in _samples(copy, _without_ending(label), self.findings):
                if sample.image is not None:
                    places.add(sample.path, tar_number, copy, sample.image)
                for caption, source_id, metadata in self._contents(sample):
                    defect = misplaced or sample.reason
                    yield PairRow(number, sample.path, caption, split, source_id, metadata, defect)
                    number += 1

    def _contents(self, sample: _Scanned) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
        """(caption, source_id, metadata) of each row of a sample."""
        source_id = self._source_of(sample.path) if self._source_of else sample.path
        if sample.pair is None:
            yield None, source_id, {}
            return
        record = sample.pair.record
        if not _is_ours(record):
            metadata = {name: value for name, value in record.items() if name not in ("caption", "captions")}
            yield from ((caption, source_id, metadata) for caption in sample.pair.captions)
            return
        source_id = source_id if self._source_of else record["source_id"]
        for place, caption in enumerate(sample.pair.captions):
            of_caption = {name: values[place] for name, values in record["caption_metadata"].items()}
            yield caption, source_id, {**record["metadata"], **of_caption}


def _splits(root: Path, split: str | None) -> Splits:
    """Of a shard set, of one split of it, or of any folder."""
    if (root / MANIFEST_NAME).is_file():
        splits = read_manifest(root)["splits"]
        entries = [entry["path"] for of_split in splits.values() for entry in of_split["shards"]]
        missing = next((path for path in entries if not (root / path).is_file()), None)
        if missing is not None:
            raise UserError(f"{root / missing} is missing, and the manifest lists it; bring it back")
        return Splits(root, split, list(splits))
    is_split = (root.parent / MANIFEST_NAME).is_file() and root.name in read_manifest(root.parent)["splits"]
    return Splits(root, split or root.name if is_split else split)


@dataclass(frozen=True)
class _Scanned:
    """One sample of a tar: its name, its texts, where its image lies, and why it cannot be used."""

    path: str
    pair: StoredPair | None = None
    image: Member | None = None
    reason: str = ""


def _samples(tar: Path, label: str, findings: Counter[str]) -> Iterator[_Scanned]:
    members = TarMembers(tar)
    names = _Names(label, findings)
    try:
        pending = None
        for key, found in group_members(members):
            if pending is not None:
                yield _scan(tar, names, *pending, is_last=False)
            pending = (key, found)
    except (tarfile.ReadError, OSError):
        findings["unreadable_tars"] += 1
        yield _Scanned(label, reason="unreadable_tar")
        return
    findings["truncated_tars"] += members.is_truncated
    if pending is not None:
        # The cut may have fallen into the last sample, or between its members.
        yield _scan(tar, names, *pending, is_last=members.is_truncated)


def _scan(tar: Path, names: _Names, key: str, found: dict[str, Member], *, is_last: bool) -> _Scanned:
    """is_last: of a tar that breaks off."""
    images = {extension: member for extension, member in found.items() if extension in IMAGE_EXTENSIONS}
    texts = {
        extension: read_at(tar, member.offset, min(member.size, MAX_TEXT_BYTES))
        for extension, member in found.items()
        if extension in TEXTS
    }
    end = tar.stat().st_size
    is_cut = any(member.offset + member.size > end for member in found.values())
    path = names.give(key, next(iter(images), "jpg"))
    if is_cut:
        return _Scanned(path, reason="truncated_tar")
    try:
        pair = pair_from_members(key, {**dict.fromkeys(images, b""), **texts}, names.label)
    except BrokenSample as error:
        reason = "truncated_tar" if is_last else REASONS.get(error.reason, error.reason)
        return _Scanned(path, reason=reason)
    path = pair.record["image_path"] if _is_ours(pair.record) else path
    return _Scanned(path, pair, next(iter(images.values())))


class _Names:
    """Paths for the samples of a tar, each once."""

    def __init__(self, label: str, findings: Counter[str]) -> None:
        self.label = label
        self._findings = findings
        self._given: Counter[str] = Counter()

    def give(self, key: str, extension: str) -> str:
        parts = [part for part in PurePosixPath(key).parts if part not in ("/", "//", "..")]
        safe = "/".join(parts).replace("\0", "") or "sample"
        self._findings["unsafe_names"] += safe != key
        name = safe
        while name in self._given:  # more than once where a key looks like a name that was made here
            self._given[safe] += 1
            name = f"{safe}~{self._given[safe]}"
        self._given[name] = 1
        self._findings["duplicate_keys"] += name != safe
        return f"{self.label}/{name}.{extension}"


def _is_ours(record: dict[str, Any]) -> bool:
    if not set(record) >= OURS or not isinstance(record["image_path"], str) or not isinstance(record["captions"], list):
        return False
    count, by_caption = len(record["captions"]), record["caption_metadata"]
    is_aligned = isinstance(by_caption, dict) and all(
        isinstance(values, list) and len(values) == count for values in by_caption.values()
    )
    is_plain = isinstance(record["metadata"], dict) and isinstance(record["source_id"], str)
    return is_aligned and is_plain and record["image_id"] == image_id(record["image_path"])


def _without_ending(label: str) -> str:
    for ending in sorted(TAR_ENDINGS, key=len, reverse=True):
        label = label.removesuffix(ending)
    return label


def _unpack(tar: Path, copy: Path) -> None:
    """As much of a compressed tar as there is: one that breaks off is met again when it is read."""
    copy.parent.mkdir(exist_ok=True)
    unpacker = zlib.decompressobj(GZIP_BITS)
    with open(tar, "rb") as packed, open(copy, "wb") as file, suppress(zlib.error):
        while block := packed.read(1 << 20):
            while block:
                file.write(unpacker.decompress(block, UNPACKED_AT_ONCE))
                block = unpacker.unconsumed_tail or unpacker.unused_data
                if unpacker.eof:  # several streams, one behind another, are one file too
                    unpacker = zlib.decompressobj(GZIP_BITS)
        file.write(unpacker.flush())
