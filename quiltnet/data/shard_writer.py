"""Writing one planned tar: in this process, or in one of several.

Worker processes import this module and what it needs, and not torch.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quiltnet.data.image_files import Images
from quiltnet.data.ledger import ShardReport, write_rejection
from quiltnet.data.manifest import shard_entry
from quiltnet.data.planning import PlannedShard, open_plan
from quiltnet.data.row_table import RowTable
from quiltnet.data.samples import Rejection, Sample, build_sample
from quiltnet.data.worker_pool import leave_with_parent

JOURNAL = "journal"
SAMPLES_AT_ONCE = 1000  # rows of so many are in memory, however large a tar is


@dataclass(frozen=True)
class Job:
    """What every process needs to know. folder: of the shard set in the making; work: of rows, plan and journal."""

    folder: Path
    work: Path
    name: str
    layout: str
    images: Images
    check_image: Callable[[bytes], str | None]

    def tar(self, shard: PlannedShard) -> Path:
        return self.folder / shard.split / f"{self.name}-{shard.number:06d}.tar"

    def report(self, shard: PlannedShard) -> Path:
        return self.work / JOURNAL / f"{shard.split}-{shard.number:06d}.json"

    def rejected(self, shard: PlannedShard) -> Path:
        return self.report(shard).with_suffix(".rejected.jsonl")


class ShardWriter:
    """Writes planned tars, one at a time."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._table, self._plan = RowTable(job.work), open_plan(job.work)

    def write(self, number: int) -> ShardReport:
        """Write the ``number``-th tar of the plan. It is on the disk afterwards; its report is not yet."""
        shard = self._plan.shards[number]
        path = self._job.tar(shard)
        path.parent.mkdir(exist_ok=True)
        report = ShardReport()
        unfinished = path.with_name(f"{path.name}.partial")
        with open(self._job.rejected(shard), "w", encoding="utf-8") as rejected, open(unfinished, "wb") as file:
            _write_tar(file, self._samples(shard, report, rejected))
            file.flush()
            os.fsync(file.fileno())
        if report.samples:
            os.replace(unfinished, path)
            report.entry = shard_entry(path, samples=report.samples, captions=report.captions, folder=self._job.folder)
        else:
            unfinished.unlink()
        return report

    def _samples(self, shard: PlannedShard, report: ShardReport, rejected: io.TextIOBase) -> Iterator[Sample]:
        """The samples of a tar; ``report`` is filled in as they are drawn."""
        starts, is_rows = self._plan.starts, self._job.layout == "rows"
        for first in range(shard.first, shard.end, SAMPLES_AT_ONCE):
            bounds = starts[first : min(first + SAMPLES_AT_ONCE, shard.end) + 1]
            rows = self._table.take(self._plan.rows[bounds[0] : bounds[-1]])
            for place, (begin, end) in enumerate(zip(bounds[:-1] - bounds[0], bounds[1:] - bounds[0], strict=True)):
                of_sample = rows[begin:end]
                try:
                    sample = build_sample(of_sample, self._job.images, self._job.check_image, row_is_sample=is_rows)
                except Rejection as rejection:
                    report.left_out.append(first - shard.first + place)
                    report.rejected[rejection.args[0]] += len(of_sample)
                    for row in of_sample:
                        write_rejection(rejected, row.number, row.image_path, *rejection.args)
                else:
                    report.accept(sample.captions, sample.size, duplicates=len(of_sample) - len(sample.captions))
                    yield sample


def _write_tar(file: io.BufferedIOBase, samples: Iterable[Sample]) -> None:
    # A fixed time and owner: the checksum is one of the contents.
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, data in sorted(sample.members.items()):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size, member.mode, member.uname, member.gname = len(data), 0o444, "quiltnet", "quiltnet"
                tar.addfile(member, io.BytesIO(data))
            tar.members.clear()  # tarfile would keep a kilobyte for each


_writer: ShardWriter | None = None


def start_worker(job: Job) -> None:
    global _writer
    leave_with_parent()
    _writer = ShardWriter(job)


def write_in_worker(number: int) -> ShardReport:
    return _writer.write(number)
