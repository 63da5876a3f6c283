"""Writing image-text shards: rows of a source and their images -> tars of samples, a manifest, a list of rejections.

One sample per image and split: ``{key}.jpg`` (or png, ...: the bytes of the file, never encoded again) and
``{key}.json`` with all captions of the image. A shard set is a folder::

    manifest.json    counts, sizes, checksums; see read_manifest
    rejected.jsonl   one line for each row that could not be used, with the reason
    train/quilt1m-000000.tar ...    val/quilt1m-000000.tar ...    and .tar.index beside each
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quiltnet import __version__
from quiltnet.data.image_files import Images
from quiltnet.data.ledger import Totals, read_report
from quiltnet.data.manifest import REJECTED_LIST, SCHEMA_VERSION, write_manifest
from quiltnet.data.packing import carry_out, written
from quiltnet.data.planning import LAYOUTS, PLAN_NAME, REJECTED_NAME, Plan, make_plan, open_plan
from quiltnet.data.row_table import SUMMARY_NAME, Filter, RowSource, RowTable, write_rows
from quiltnet.data.shard_writer import Job
from quiltnet.data.workplace import WORK, built_aside, check_target
from quiltnet.errors import UserError

# An image's size is asked of all files up to this number, and of so many of them beyond it.
ESTIMATED_FROM, SAMPLED = 100_000, 20_000
LISTED_AT_MOST = 1000  # rejected rows that are looked at to say what is wrong
TAR_BYTES = 2560  # headers of two members, their padding, and the ids of a sample's json


class Progress(Protocol):
    """Is told how far packing has come."""

    def stage(self, words: str, total: int | None) -> None:
        """What is done next, and of how many; None where that is not known."""

    def advance(self, count: int) -> None: ...

    def say(self, text: str) -> None: ...


class Silent:
    """A progress that nobody watches."""

    def stage(self, words: str, total: int | None) -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, text: str) -> None: ...


def write_shards(
    rows: RowSource,
    out: str | Path,
    *,
    name: str,
    source: dict[str, Any],
    images: Images,
    check_image: Callable[[bytes], str | None],
    filters: Sequence[Filter] = (),
    layout: str = "images",
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int | None = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack ``rows`` into a shard set; the same input gives the same bytes, for any number of workers.

    Samples of a split stand in the order of a seeded hash: those of one source are spread over all shards.
    Everything is built in ``out.partial`` and renamed when it is whole, so that a run that is killed leaves nothing
    that looks finished; the same request then goes on where it stopped, if the source can be recognised.

    A row may be dropped by a filter, which is counted, or rejected, counted and listed: null_caption, missing_image,
    unsafe_path, unreadable_image, or what the source itself found wrong with it. A tar is planned for
    ``samples_per_shard`` images, and has fewer where some turn out to be unusable; where none is left there is no tar,
    and its number is not given to another.

    Args:
        name: first part of the file names of shards.
        source: what the pairs came from, for the manifest.
        check_image: why bytes are no usable image, or None.
        filters: choose rows, in this order.
        layout: ``images``: a sample per image and split, with all its captions; ``rows``: a sample a row.
        workers: processes that write tars; 0: this one; None: one a core, where there is enough to do.
        overwrite: replace a shard set that is already at ``out``.

    Returns:
        The manifest, as ``read_manifest`` gives it.

    Raises:
        UserError: for a target in use, a split that cannot name a folder, too little space, if not one sample is
            left, and for what is wrong with rows, filters or images.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    progress = progress or Silent()
    check_target(out, overwrite=overwrite, source=source)
    if workers is not None and workers < 0:
        raise UserError(f"workers={workers}; give the number of processes, or 0 to pack without any")
    options = _checked(
        {"layout": layout, "samples_per_shard": samples_per_shard, "seed": seed, "name": name, "source": source}
    )
    request = _request(rows, images, filters, options)
    with built_aside(out, request, progress.say, overwrite=overwrite) as folder:
        work = folder / WORK
        _plan(rows, filters, work, options, progress)
        plan = open_plan(work)
        images.prepare(work, plan.images)
        job = Job(folder, work, name, layout, images, check_image)
        _write(job, plan, workers, progress)
        return _finish(job, plan, options)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    if options["samples_per_shard"] < 1 or options["layout"] not in LAYOUTS:
        raise UserError(
            f"samples_per_shard={options['samples_per_shard']}, layout={options['layout']}; a shard holds at least 1, "
            f"and the layout is one of {', '.join(LAYOUTS)}"
        )
    return options


def _request(rows: RowSource, images: Images, filters: Sequence[Filter], options: dict[str, Any]) -> Any:
    """What a later run must ask for to go on with this one; None where the source cannot be recognised."""
    source = rows.identity()
    chosen = [chooser.identity() for chooser in filters]
    return None if source is None else [__version__, SCHEMA_VERSION, options, source, images.identity(), chosen]


def _plan(rows: RowSource, filters: Sequence[Filter], work: Path, options: dict[str, Any], progress: Progress) -> None:
    """Rows and plan in ``work``, unless a run before has left them there whole."""
    if not (work / SUMMARY_NAME).is_file():
        progress.stage("reading rows", None)
        write_rows(rows, work, filters, progress.advance)
    if not (work / PLAN_NAME).is_file():
        table = RowTable(work)
        progress.stage("planning shards", None)
        make_plan(
            table,
            work,
            seed=options["seed"],
            layout=options["layout"],
            samples_per_shard=options["samples_per_shard"],
        )


def _write(job: Job, plan: Plan, workers: int | None, progress: Progress) -> None:
    """All tars of the plan that are not there yet."""
    done = written(job, plan)
    todo = [number for number in range(len(plan.shards)) if number not in done]
    if done:
        progress.say(f"continuing: {len(done)} of {len(plan.shards)} tars are there")
    _check_space(job, plan, todo, progress)
    progress.stage("packing images", len(plan.images))
    progress.advance(sum(plan.shards[number].samples for number in done))
    for number in carry_out(job, plan, todo, workers):
        progress.advance(plan.shards[number].samples)


def _check_space(job: Job, plan: Plan, todo: Sequence[int], progress: Progress) -> None:
    """Say how much will be written, and raise UserError if there is no room for it."""
    samples = sum(plan.shards[number].samples for number in todo)
    if not samples:
        return
    share = samples / len(plan.images)
    needed = int(share * (estimate_bytes(job, plan) + TAR_BYTES * len(plan.images)))
    free = shutil.disk_usage(job.folder).free
    size = f"about {spell_bytes(needed)}; {spell_bytes(free)} are free"
    progress.say(f"{samples} samples to pack into {len(todo)} tars, {size} at {job.folder.parent}")
    if needed > free:
        raise UserError(
            f"the shards need about {spell_bytes(needed)}, and {job.folder.parent} has {spell_bytes(free)} free; "
            "make room, choose fewer rows, or give a folder on another disk"
        )


def estimate_bytes(job: Job, plan: Plan) -> int:
    """Of all images and texts of a plan: the sizes of files, of a sample of them if there are many."""
    table = RowTable(job.work)
    count = len(plan.images)
    # Samples stand in the order of a hash: every k-th of them is a fair choice.
    places = np.arange(0, count, 1 if count <= ESTIMATED_FROM else count // SAMPLED)
    sizes = sum(map(job.images.size, table.image_paths(plan.rows[plan.starts[places]])))
    return sizes * count // max(len(places), 1) + table.bytes


def spell_bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _finish(job: Job, plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    """Manifest and list of rejections, from the journal."""
    summary = RowTable(job.work).summary
    totals = Totals(plan.splits)
    totals.rejected.update(plan.rejected)
    totals.rejected.update(summary.dropped)
    with open(job.folder / REJECTED_LIST, "wb") as file:
        _append(job.work / REJECTED_NAME, file)
        for shard in plan.shards:
            report = read_report(job.report(shard))
            _append(job.rejected(shard), file)
            totals.add(report, shard.split, plan.images[shard.first : shard.end], plan.sources[shard.first : shard.end])
    counts = totals.as_dict()
    if not counts["samples"]:
        raise _nothing_left(job, counts["rejected"])
    for split, entry in totals.splits.items():
        if (job.folder / split).is_dir() and not entry["shards"]:
            (job.folder / split).rmdir()
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "creator": f"quiltnet {__version__}",
        "source": options["source"],
        "seed": options["seed"],
        "samples_per_shard": options["samples_per_shard"],
        "layout": options["layout"],
        "totals": {**counts, "findings": {what: count for what, count in summary.findings.items() if count}},
        "splits": totals.splits,
    }
    write_manifest(job.folder, manifest)
    return manifest


def _nothing_left(job: Job, rejected: dict[str, int]) -> UserError:
    """What is wrong with one row may be wrong with all: its path starts elsewhere, or is not spelt as here."""
    with open(job.folder / REJECTED_LIST, encoding="utf-8") as file:
        listed = list(map(json.loads, islice(file, LISTED_AT_MOST)))
    usual, _ = Counter((line["reason"], line["detail"]) for line in listed).most_common(1)[0]
    one = next(line for line in listed if (line["reason"], line["detail"]) == usual)
    place = ", ".join(filter(None, (f"row {one['row']}", one["image_path"], one["detail"])))
    rule = "; a path's folders are told apart by /" if "\\" in (one["image_path"] or "") else ""
    return UserError(
        f"no pair is left to pack, rejected are {rejected}, such as {usual[0]} ({place}); check table and images{rule}"
    )


def _append(path: Path, file: Any) -> None:
    if path.is_file():
        with open(path, "rb") as part:
            shutil.copyfileobj(part, file)
