"""One tar of prepared images from one tar of originals, and the record of it that a stopped run finds again."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quiltnet.data.decoding import BrokenSample
from quiltnet.data.ledger import ShardReport, read_report
from quiltnet.data.manifest import shard_entry
from quiltnet.data.pairs import short_hash
from quiltnet.data.prepared_images import PreparedForm, PreparedImage
from quiltnet.data.stored_pairs import IMAGE_EXTENSIONS, StoredPair, pair_from_members
from quiltnet.data.tar_index import TarIndex, open_index, write_index
from quiltnet.errors import UserError


@dataclass(frozen=True)
class ShardTask:
    """Attributes:
    folder: of the new set; the tar goes to the split's folder in it, under its old name.
    record: the report of the finished tar; beside it lies what else is known of it.
    promised: samples by the manifest of the source.
    measured: images to measure the error on, of those that have one.
    """

    source: Path
    split: str
    folder: Path
    record: Path
    promised: int | None
    measured: int

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has done it, and what it wrote is there."""
        if not self.record.is_file():
            return False
        entry = read_report(self.record).entry
        return entry is None or (self.target.is_file() and self.target.stat().st_size == entry["bytes"])

    @property
    def target(self) -> Path:
        return self.folder / self.split / self.source.name

    def read_facts(self) -> dict[str, np.ndarray]:
        """images, sources: (N,) uint64, of each sample of the source; levels: (256,) int64; measured, copied; rejected,
        as lines of JSON."""
        with np.load(self.record.with_suffix(".npz"), allow_pickle=False) as facts:
            return dict(facts)


@dataclass(frozen=True)
class PreparedSample:
    """Attributes:
    pair: as it was; image: what became of its image.
    members: contents by extension, in the order of the source.
    """

    pair: StoredPair
    image: PreparedImage
    members: dict[str, bytes]


class _Dropped(Exception):
    """args: reason, and how many captions go with the sample."""


def prepare_shard(task: ShardTask, form: PreparedForm) -> int:
    """Write, index and record one tar; the number of samples of its source."""
    index = open_index(task.source)
    for folder in (task.target.parent, task.record.parent):
        folder.mkdir(parents=True, exist_ok=True)
    unfinished = task.target.with_name(f".{task.target.name}.unfinished")
    work = _Work(task, form, index)
    with open(unfinished, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(len(index)):
                sample = work.take(index, number)
                if sample is not None:
                    _write_sample(tar, sample)
                tar.members.clear()  # tarfile would keep a kilobyte for each
        file.flush()
        os.fsync(file.fileno())
    if work.report.samples:
        os.replace(unfinished, task.target)
        write_index(task.target)
        counts = {"samples": work.report.samples, "captions": work.report.captions}
        work.report.entry = shard_entry(task.target, folder=task.folder, **counts)
    else:
        unfinished.unlink()
    work.save()
    return len(index)


def prepare_sample(index: TarIndex, number: int, form: PreparedForm) -> PreparedSample | None:
    """A sample as it will be stored; None where it cannot be used."""
    try:
        return _prepare(index, number, form)
    except _Dropped:
        return None


class _Work:
    """Counts what becomes of the samples of one tar."""

    def __init__(self, task: ShardTask, form: PreparedForm, index: TarIndex) -> None:
        samples = len(index)
        self.report = ShardReport()
        self._task = task
        self._form = form
        self._rejected: list[str] = []
        self._ids = np.zeros((2, samples), np.uint64)  # images, sources
        self._levels = np.zeros(256, np.int64)
        self._measured_at = np.linspace(0, samples - 1, min(task.measured, samples)).astype(int)
        self._measured = self._copied = 0
        # Of a tar that breaks off, nobody may know how many it held: then it is one at least.
        missing = int(index.is_truncated) if task.promised is None else task.promised - samples
        if missing > 0:
            self._reject("", "missing_from_tar", missing)

    def take(self, index: TarIndex, number: int) -> PreparedSample | None:
        try:
            sample = _prepare(index, number, self._form)
        except _Dropped as drop:
            reason, captions = drop.args
            self._reject(index.key(number), reason, captions)
            self.report.left_out.append(number)
            return None
        self._count(sample, number)
        # Where a place of the measure falls on an image without an error, the next one makes up for it.
        due = int(np.searchsorted(self._measured_at, number, side="right"))
        if not sample.image.is_lossless and self._measured < due:
            self._levels += self._form.error_levels(sample.pair.image, sample.image.data)
            self._measured += 1
        return sample

    def save(self) -> None:
        """The report last: a shard that has one is finished."""
        facts = {"images": self._ids[0], "sources": self._ids[1], "levels": self._levels}
        counts = {"measured": self._measured, "copied": self._copied, "rejected": "".join(self._rejected)}
        np.savez(self._task.record.with_suffix(".npz"), **facts, **counts)
        self.report.save(self._task.record)

    def _count(self, sample: PreparedSample, number: int) -> None:
        height, width = sample.image.size
        self.report.accept(sample.pair.captions, (width, height), duplicates=0)
        self._copied += sample.image.data is sample.pair.image
        source = sample.pair.record.get("source_id", sample.pair.image_id)
        self._ids[:, number] = int(sample.pair.image_id, 16), int(short_hash(str(source)), 16)

    def _reject(self, key: str, reason: str, captions: int) -> None:
        self.report.rejected[reason] += captions
        shard = f"{self._task.split}/{self._task.source.name}"
        self._rejected.append(json.dumps({"shard": shard, "key": key, "reason": reason, "rows": captions}) + "\n")


def _prepare(index: TarIndex, number: int, form: PreparedForm) -> PreparedSample:
    try:
        members = index.read(number, index.members(number))
    except EOFError as error:
        raise _Dropped("truncated_tar", 1) from error
    except OSError as error:
        raise UserError(
            f"{index.path} can no longer be read ({error}); bring it back, and the same command continues"
        ) from error
    try:
        pair = pair_from_members(index.key(number), members, "/".join(index.path.parts[-2:]))
    except BrokenSample as error:
        raise _Dropped("truncated_tar" if index.may_be_cut(number) else error.reason, 1) from error
    try:
        image = form.prepare(pair.image)
    except BrokenSample as error:
        raise _Dropped(error.reason, len(pair.captions)) from error
    renamed = {
        image.extension if name in IMAGE_EXTENSIONS else name: image.data if name in IMAGE_EXTENSIONS else data
        for name, data in members.items()
    }
    return PreparedSample(pair, image, _with_image_id(renamed, pair))


def _write_sample(tar: tarfile.TarFile, sample: PreparedSample) -> None:
    """Under its old key, but never with a name that leads out of the folder where someone may unpack it.

    The image comes first, so that a second sample of a name begins where its image does.
    """
    key = "/".join(part for part in sample.pair.key.split("/") if part not in ("", ".."))
    for extension, data in sorted(sample.members.items(), key=lambda member: member[0] not in IMAGE_EXTENSIONS):
        # No time and no owner: the checksum of the tar is one of the contents.
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _with_image_id(members: dict[str, bytes], pair: StoredPair) -> dict[str, bytes]:
    """A foreign sample's id comes from where it lies; it moves, so the id is written down."""
    if pair.record.get("image_id") == pair.image_id:
        return members
    record: dict[str, Any] = {**pair.record, "image_id": pair.image_id}
    if "image_id" in pair.record:
        record["original_image_id"] = pair.record["image_id"]
    return {**members, "json": json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")}
