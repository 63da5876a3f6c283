"""``quiltnet prepare``: shards with images no larger than training needs.

The data wing is imported where it is used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quiltnet.cli.check import print_line, tar_progress, worker_count
from quiltnet.cli.shard_progress import continued_by_the_same_command
from quiltnet.errors import UserError

if TYPE_CHECKING:
    from quiltnet.data.preparing import Plan

DEFAULT_QUALITY = 95


def prepare(
    source: Annotated[Path, typer.Argument(help="A shard set, one split of it, or a folder of any tars.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    size: Annotated[int, typer.Option(help="Shorter side in pixels; nothing is enlarged.")] = 256,
    jpeg: Annotated[int | None, typer.Option(help="Quality of JPEGs, 4:4:4; 95 by default.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Keep pixels, not JPEGs: fastest to read, largest on disk.")
    ] = False,
    apply_exif: Annotated[
        bool, typer.Option("--apply-exif", help="Turn images as their EXIF orientation says.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
) -> None:
    """Resize the images of a shard set once, so that every epoch decodes less.

    Captions, ids, keys, order, shard names and splits are carried over. A run that was stopped goes on with the same
    command. Samples that cannot be used are counted and listed in rejected.jsonl.
    """
    from quiltnet.cli.run_directory import check_writable
    from quiltnet.data.prepared_images import PreparedForm
    from quiltnet.data.preparing import plan_preparing, prepare_shards

    if raw and jpeg is not None:
        raise UserError(f"--raw keeps no JPEG, and --jpeg {jpeg} asks for one; give one of them")
    quality = None if raw else DEFAULT_QUALITY if jpeg is None else jpeg
    form = PreparedForm(size, quality, apply_exif)
    processes = worker_count(workers)
    with Console(stderr=True).status("looking at the shards"):
        plan = plan_preparing(source, out, form)
    check_writable(plan.out)
    _print_plan(plan)
    with continued_by_the_same_command(plan.out), tar_progress("preparing") as progress:
        manifest = prepare_shards(plan, workers=processes, progress=progress)
    _print_outcome(manifest, plan)


def _print_plan(plan: Plan) -> None:
    goes_on = f"; {plan.finished} of them are finished, from a run that was stopped" if plan.finished else ""
    lines = (
        f"{len(plan.tasks)} tars{goes_on}",
        f"estimated size of what is to be written: {plan.estimated_bytes / 1e9:.3f} GB",
    )
    print_line("\n".join(lines))


def _print_outcome(manifest: dict[str, Any], plan: Plan) -> None:
    totals, prepared = manifest["totals"], manifest["prepared"]
    before = sum(task.source.stat().st_size for task in plan.tasks)
    after = sum(shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"])
    rejected = ", ".join(f"{rows} {reason}" for reason, rows in totals["rejected"].items()) or "none"
    lines = (
        f"{totals['samples']:,} samples, {prepared['copied']:,} of them copied byte for byte",
        f"rejected rows: {rejected}",
        f"{before / 1e9:.3f} GB became {after / 1e9:.3f} GB",
        _describe_error(prepared["error"]),
        f"shards: {plan.out}",
    )
    print_line("\n".join(lines))


def _describe_error(error: dict[str, Any]) -> str:
    if not error["samples"]:
        return "error: none, no image was resized or encoded anew"
    psnr = "equal" if error["psnr_db"] is None else f"{error['psnr_db']} dB"
    return (
        f"error at 224 pixels of {error['samples']} images that were resized or encoded anew, in levels of 255: "
        f"mean {error['mean_abs']}, 99 % at most {error['p99']}, largest {error['max']}; {psnr}"
    )
