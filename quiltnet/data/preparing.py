"""Shards whose images are no larger than training needs: one pass, so that every later epoch decodes less."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quiltnet import __version__
from quiltnet.data.ledger import Totals, read_report
from quiltnet.data.manifest import MANIFEST_NAME, REJECTED_LIST, SCHEMA_VERSION, sha256_of, write_manifest
from quiltnet.data.prepared_images import PreparedForm, summarise_error
from quiltnet.data.prepared_shards import ShardTask, prepare_sample, prepare_shard
from quiltnet.data.shard_files import ShardFile, fingerprint
from quiltnet.data.shard_sets import ShardSet, find_shard_set
from quiltnet.data.tar_index import open_index
from quiltnet.data.worker_pool import map_tasks
from quiltnet.data.workplace import WORK, built_aside, check_target, is_begun, partial_of
from quiltnet.errors import UserError

MEASURED = 256  # images over all shards, on which the error is measured, of those that have one
_ESTIMATED_FROM = 48  # images
_TAR_BLOCK = 512

Progress = Callable[[int, int, int], None]  # shards done, all shards, samples


@dataclass(frozen=True)
class Plan:
    """What will be done, checked and estimated, before anything is written.

    Attributes:
        tasks: a tar each; ``finished`` of them were done by an earlier run of the same command.
        estimated_bytes: of the tars that are still to be made.
    """

    found: ShardSet
    out: Path
    form: PreparedForm
    tasks: list[ShardTask]
    finished: int
    estimated_bytes: int

    @property
    def request(self) -> dict[str, Any]:
        """What makes two runs the same, so that one can go on with what the other has left."""
        tars = [str(task.source) for task in self.tasks]
        return {"from": _origin(self.found), **self.form.describe(), "tars": tars, "measured": MEASURED}


def plan_preparing(source: str | Path, out: str | Path, form: PreparedForm) -> Plan:
    """Find the shards, and what an earlier run that was stopped has left of the work.

    Args:
        source: a shard set, one split of it, or a folder of any tars.
        out: a folder that does not exist.

    Raises:
        UserError: nothing to prepare, a target in use, a tar that is missing or cannot be read, or less disk than
            the estimate.
    """
    found = find_shard_set(source)
    out = Path(os.path.abspath(Path(out).expanduser()))
    _check_target(found.root, out)
    plan = Plan(found, out, form, list(_tasks(found, out)), 0, 0)
    goes_on = is_begun(out, plan.request)
    waiting = [task for task in plan.tasks if not (goes_on and task.is_finished)]
    estimate = _estimate_bytes(waiting, form)
    free = shutil.disk_usage(_existing_parent(out)).free
    if estimate > free:
        raise UserError(
            f"{out} needs about {estimate / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room, choose a smaller "
            "--size or --jpeg in place of --raw, or another disk"
        )
    return Plan(found, out, form, plan.tasks, len(plan.tasks) - len(waiting), estimate)


def prepare_shards(
    plan: Plan, *, workers: int = 1, progress: Progress | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Carry out a plan. The set appears at ``plan.out`` when it is whole; a run that was stopped is continued by the
    same plan, from the shards that it had finished.

    Args:
        workers: processes.
        progress: called with (shards done, all shards, samples seen).
        say: is told in a sentence when what another run has left is thrown away.

    Returns:
        The manifest of the new set, which says in ``prepared`` what was done, and the error against the original.

    Raises:
        UserError: the target cannot be written, or not one sample can be used.
    """
    with built_aside(plan.out, plan.request, say) as folder:
        for pattern in ("*/.*.unfinished", "*/.*.index.*"):  # of a run that was killed
            for leftover in folder.glob(pattern):
                leftover.unlink()
        waiting = [task for task in plan.tasks if not task.is_finished]
        done, seen = len(plan.tasks) - len(waiting), 0
        for samples in map_tasks(partial(prepare_shard, form=plan.form), waiting, workers):
            done, seen = done + 1, seen + samples
            if progress is not None:
                progress(done, len(plan.tasks), seen)
        manifest = _manifest(plan, folder)
        write_manifest(folder, manifest)
    return manifest


def _tasks(found: ShardSet, out: Path) -> Iterator[ShardTask]:
    # Tars that a manifest does not list are no part of the set.
    chosen = [
        (split, shard)
        for split, shards in found.splits.items()
        for shard in shards
        if found.manifest is None or shard.entry is not None
    ]
    if not chosen:
        raise UserError(f"{found.root} has no shards: its manifest lists none; pack the pairs again")
    folder = partial_of(out)
    measured = -(-MEASURED // len(chosen))
    for split, shard in chosen:
        if split == WORK:
            raise UserError(f"a split cannot be called {WORK}, as the folder {shard.path.parent} is; rename it")
        if not shard.path.is_file():
            raise UserError(f"{shard.path} is missing, and the manifest lists it; bring it back, or pack the set again")
        yield ShardTask(
            source=shard.path,
            split=split,
            folder=folder,
            record=folder / WORK / "finished" / split / f"{shard.path.name}.json",
            promised=None if shard.entry is None else shard.entry["samples"],
            measured=measured,
        )


def _check_target(source: Path, out: Path) -> None:
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(f"{out} is, holds or lies in the source {source}; give a folder elsewhere")
    check_target(out, overwrite=False)


def _origin(found: ShardSet) -> str:
    """What was prepared: the sha256 of the set's manifest, or of names and sizes where there is none."""
    if found.manifest is None:
        return fingerprint(ShardFile(shard.path) for shard in found.shards)
    home = found.root if (found.root / MANIFEST_NAME).is_file() else found.root.parent
    return sha256_of(home / MANIFEST_NAME)


def _estimate_bytes(tasks: list[ShardTask], form: PreparedForm) -> int:
    """From some samples, evenly spread, which are prepared for it."""
    sizes: list[int] = []
    total = 0
    for number, task in enumerate(tasks):
        index = open_index(task.source)
        total += len(index)
        # The shares of the first so many images that fall to this shard.
        here = (number + 1) * _ESTIMATED_FROM // len(tasks) - number * _ESTIMATED_FROM // len(tasks)
        for place in np.linspace(0, len(index) - 1, min(here, len(index))).astype(int).tolist():
            sample = prepare_sample(index, place, form)
            sizes.append(0 if sample is None else sum(map(_stored_size, sample.members.values())))
    return round(total * float(np.mean(sizes))) if sizes else 0


def _stored_size(data: bytes) -> int:
    """In a tar: a header, and the contents in whole blocks."""
    return _TAR_BLOCK + -(-len(data) // _TAR_BLOCK) * _TAR_BLOCK


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def _manifest(plan: Plan, folder: Path) -> dict[str, Any]:
    """Gathers what each shard has left on record; writes the list of rejected samples."""
    totals, levels = Totals(), np.zeros(256, np.int64)
    measured = copied = 0
    with open(folder / REJECTED_LIST, "w", encoding="utf-8") as file:
        for task in plan.tasks:
            report, facts = read_report(task.record), task.read_facts()
            totals.add(report, task.split, facts["images"], facts["sources"])
            levels += facts["levels"]
            measured, copied = measured + int(facts["measured"]), copied + int(facts["copied"])
            file.write(str(facts["rejected"]))
    described = totals.as_dict()
    if not described["samples"]:
        raise UserError(
            f"not one sample of {plan.found.root} can be used ({described['rejected']}); look at the shards"
        )
    before = plan.found.manifest or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "creator": f"quiltnet {__version__}",
        "source": before.get("source", {"shards": plan.found.root.name}),
        "seed": before.get("seed"),
        "samples_per_shard": before.get("samples_per_shard"),
        "layout": before.get("layout"),
        "totals": described,
        **({"teacher": before["teacher"]} if "teacher" in before else {}),
        "splits": totals.splits,
        "prepared": {
            "from": _origin(plan.found),
            **plan.form.describe(),
            "copied": copied,
            "error": summarise_error(levels, measured),
            "totals_before": before.get("totals"),
        },
    }
