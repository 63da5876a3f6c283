"""Which sample goes to which tar: decided for all rows before the first image is read.

Samples of a split stand in the order of a seeded hash, so that no tar holds a run of one source, and are cut into tars
of equal planned size. The plan depends on the rows and the seed alone: not on how many processes carry it out, nor on
where they were stopped. It is numbers only, 40 bytes a row, and mapped by all who carry it out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

import numpy as np
import pyarrow as pa

from quiltnet.data.ledger import write_rejection
from quiltnet.data.pairs import hash_code, plain_path
from quiltnet.data.row_table import RowTable
from quiltnet.errors import UserError
from quiltnet.whole_files import write_whole

LAYOUTS = ("images", "rows")
PLAN_NAME = "plan.json"  # written last: with it the plan is whole
REJECTED_NAME = "rejected-rows.jsonl"


@dataclass(frozen=True)
class PlannedShard:
    """The ``number``-th tar of a split holds samples ``first`` to ``end`` of the plan."""

    split: str
    number: int
    first: int
    end: int

    @property
    def samples(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class Plan:
    """rows: (R,) positions in the row table, sample after sample; sample s has rows[starts[s]:starts[s + 1]].

    images, sources: (S,) 64-bit codes of each sample's image and source. splits: all, those without a sample too.
    rejected: rows by reason that no image was looked at for.
    """

    rows: np.ndarray
    starts: np.ndarray
    images: np.ndarray
    sources: np.ndarray
    shards: list[PlannedShard]
    splits: list[str]
    rejected: dict[str, int]

    def save(self, folder: Path) -> None:
        for name in ("rows", "starts", "images", "sources"):
            np.save(folder / f"plan-{name}.npy", getattr(self, name))
        shards = [[shard.split, shard.number, shard.first, shard.end] for shard in self.shards]
        rest = {"shards": shards, "splits": self.splits, "rejected": self.rejected}
        write_whole(folder / PLAN_NAME, json.dumps(rest))


def open_plan(folder: Path) -> Plan:
    """The plan saved in ``folder``, mapped."""
    saved = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
    names = ("rows", "starts", "images", "sources")
    arrays = [np.load(folder / f"plan-{name}.npy", mmap_mode="r") for name in names]
    shards = [PlannedShard(*entry) for entry in saved["shards"]]
    return Plan(*arrays, shards, saved["splits"], saved["rejected"])


def make_plan(table: RowTable, folder: Path, *, seed: int, layout: str, samples_per_shard: int) -> None:
    """Plan the shards of ``table`` into ``folder``; rows that have no chance are written down as rejected there.

    Args:
        layout: ``images``: all rows of an image in one split are a sample; ``rows``: each row is one.

    Raises:
        UserError: a split cannot name a folder.
    """
    chosen, split_names = [], {}
    rejected: Counter[str] = Counter()
    with open(folder / REJECTED_NAME, "w", encoding="utf-8") as file:
        start = 0
        for batch in table.batches():
            codes = _usable_rows(batch, start, seed, layout, split_names, rejected, file)
            chosen.append(codes)
            start += len(batch)
    # The splits in the order of their names, as folders are listed.
    ranks = {code: rank for rank, (_, code) in enumerate(sorted(split_names.items()))}
    rows = np.concatenate(chosen)
    split = np.array([ranks[code] for code in range(len(ranks))], np.int64)[rows["split"]]
    # Stable: the rows of a sample stay in the order of the table.
    order = np.lexsort((rows["image"], rows["order"], split))
    rows, split = rows[order], split[order]
    is_first = np.ones(len(rows), bool)
    if layout == "images":
        is_first[1:] = (rows["image"][1:] != rows["image"][:-1]) | (split[1:] != split[:-1])
    starts = np.flatnonzero(is_first)
    shards = _cut(sorted(split_names), split[starts], samples_per_shard)
    plan = Plan(
        rows["position"],
        np.append(starts, len(rows)),
        rows["image"][starts],
        rows["source"][starts],
        shards,
        sorted(split_names),
        dict(rejected),
    )
    plan.save(folder)


DETAILS = {
    "missing_image": "the table names none",
    "unsafe_path": "paths start from the folder of images, without / before them, and stay below it",
}

ROW = np.dtype([("position", "i8"), ("image", "u8"), ("order", "u8"), ("source", "u8"), ("split", "i8")])


def _usable_rows(
    batch: pa.RecordBatch,
    start: int,
    seed: int,
    layout: str,
    split_names: dict[str, int],
    rejected: Counter[str],
    file: TextIO,
) -> np.ndarray:
    """(usable rows of the batch) ROW; the others are counted and written down.

    split_names: name -> code, in order of appearance; names of this batch are added.
    """
    paths = batch.column("image_path").dictionary_encode()
    names = [plain_path(path) if path else "" for path in paths.dictionary.to_pylist()]
    places = paths.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    has_text = np.fromiter((bool(text) and not text.isspace() for text in batch.column("caption").to_pylist()), bool)
    reasons = np.array([*(_why_unsafe(name) for name in names), "missing_image"])[places].astype("U32")
    reasons[~has_text] = "null_caption"
    defects = np.array(batch.column("defect").to_pylist(), "U32")
    reasons = np.where(defects != "", defects, reasons)
    usable = np.flatnonzero(reasons == "")
    rejected.update(_write_rejections(batch, reasons, file))
    rows = np.zeros(len(usable), ROW)
    rows["position"] = start + usable
    rows["image"] = _codes(names)[places[usable]]
    if layout == "images":
        rows["order"] = _codes([f"{seed} {name}" for name in names])[places[usable]]
    else:
        numbers = batch.column("number").to_numpy()[usable]
        rows["order"] = _codes([f"{seed} {names[places[row]]} {n}" for row, n in zip(usable, numbers, strict=True)])
    sources = batch.column("source_id").dictionary_encode()
    rows["source"] = _codes(sources.dictionary.to_pylist())[sources.indices.to_numpy()[usable]]
    rows["split"] = _split_codes(batch.column("split"), split_names)[usable]
    return rows


def _write_rejections(batch: pa.RecordBatch, reasons: np.ndarray, file: TextIO) -> Counter[str]:
    """reasons: (rows of the batch), empty for those that are usable."""
    rejected = pa.array(np.flatnonzero(reasons != ""))
    of_rows = reasons[rejected].tolist()
    numbers = batch.column("number").take(rejected).to_pylist()
    paths = batch.column("image_path").take(rejected).to_pylist()
    for number, path, reason in zip(numbers, paths, of_rows, strict=True):
        # Of an image that is named, the source itself found that it is not there.
        detail = "" if path and reason == "missing_image" else DETAILS.get(reason, "")
        write_rejection(file, number, path, reason, detail)
    return Counter(of_rows)


def _why_unsafe(path: str) -> str:
    if not path:
        return "missing_image"
    # The cheap look first: hardly any path has a dot twice.
    is_unsafe = path[0] == "/" or "\0" in path or (".." in path and ".." in PurePosixPath(path).parts)
    return "unsafe_path" if is_unsafe else ""


def _codes(texts: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(hash_code, texts), np.uint64, len(texts))


def _split_codes(column: pa.Array, split_names: dict[str, int]) -> np.ndarray:
    splits = column.dictionary_encode()
    names = splits.dictionary.to_pylist()
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII):
            raise UserError(f"split {name!r} cannot name a folder; use letters, digits, _ and - in the split column")
        split_names.setdefault(name, len(split_names))
    return np.array([split_names[name] for name in names], np.int64)[splits.indices.to_numpy()]


def _cut(names: Sequence[str], splits: np.ndarray, samples_per_shard: int) -> list[PlannedShard]:
    """splits: (S,) place of each sample's split among ``names``, ascending."""
    shards = []
    for place, name in enumerate(names):
        first, end = np.searchsorted(splits, [place, place + 1]).tolist()
        for number, begin in enumerate(range(first, end, samples_per_shard)):
            shards.append(PlannedShard(name, number, begin, min(begin + samples_per_shard, end)))
    return shards
