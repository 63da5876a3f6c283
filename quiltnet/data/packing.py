"""Carrying out a plan: tars written by several processes, each whole or absent, and found again after a stop.

What a tar holds is in the plan, so its bytes are the same whoever writes it and whenever. A tar counts as written when
its report is in the journal; anything else in the folder is a leftover, and is written anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context

from quiltnet.data.ledger import ShardReport, read_report
from quiltnet.data.planning import Plan
from quiltnet.data.shard_writer import JOURNAL, Job, ShardWriter, start_worker, write_in_worker
from quiltnet.data.tar_index import write_index
from quiltnet.data.worker_pool import available_cores
from quiltnet.errors import UserError

SAMPLES_WORTH_PROCESSES = 5000  # a process takes a second to start, and packs a thousand images in two


def written(job: Job, plan: Plan) -> set[int]:
    """Numbers of the tars that the journal has, and that are there as it says; leftovers of others are removed."""
    known = {job.report(shard): number for number, shard in enumerate(plan.shards)}
    done = set()
    for path, number in known.items():
        if path.is_file() and _is_there(job, read_report(path)):
            done.add(number)
    tars = [job.tar(plan.shards[number]) for number in done]
    kept = {*tars, *(tar.with_name(f"{tar.name}.index") for tar in tars)}
    for split in {shard.split for shard in plan.shards}:
        for path in (job.folder / split).glob("*"):
            if path not in kept:
                path.unlink()
    return done


def carry_out(job: Job, plan: Plan, todo: Sequence[int], workers: int | None) -> Iterator[int]:
    """Write the tars ``todo``; yields the number of each when it and its report are on the disk.

    Args:
        workers: processes; 0: this one; None: one a core, where there is enough to do. A stopped parent takes its
            processes with it.
    """
    (job.work / JOURNAL).mkdir(exist_ok=True)
    if workers is None:
        is_much = sum(plan.shards[number].samples for number in todo) >= SAMPLES_WORTH_PROCESSES
        workers = available_cores() if is_much else 0
    for number, report in _reports(job, todo, workers):
        shard = plan.shards[number]
        if report.entry is not None:
            # Here and not by the workers, which would each import torch for it.
            write_index(job.tar(shard))
        report.save(job.report(shard))
        yield number


def _reports(job: Job, todo: Sequence[int], workers: int) -> Iterator[tuple[int, ShardReport]]:
    if not workers or not todo:
        writer = ShardWriter(job)
        yield from ((number, writer.write(number)) for number in todo)
        return
    # Spawned: Arrow's threads do not survive a fork.
    pool = ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn"), start_worker, (job,))
    try:
        futures = {pool.submit(write_in_worker, number): number for number in todo}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a packing process was killed, as happens where memory runs out; "
            "the same command continues, with fewer --workers if need be"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _is_there(job: Job, report: ShardReport) -> bool:
    if report.entry is None:
        return True
    with suppress(OSError):
        return (job.folder / report.entry["path"]).stat().st_size == report.entry["bytes"]
    return False
