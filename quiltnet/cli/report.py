"""``quiltnet report``: runs as one page that needs nothing else.

The wings are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quiltnet.cli.check import print_line
from quiltnet.errors import UserError

if TYPE_CHECKING:
    from quiltnet.data.held_out import ShardPairs
    from quiltnet.release.report_samples import Samples
    from quiltnet.release.report_subjects import Subject

REPORT_NAME = "report.html"
MOST_PAIRS = 500  # of the held-out ones that the gallery is made of
MOST_SAMPLED = 4  # runs whose samples a page shows


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or outputs of quiltnet eval.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default RUN/report.html, or report.html here for several.")
    ] = None,
    share_samples: Annotated[
        bool, typer.Option("--share-samples", help="Show held-out tiles, captions and file names as well.")
    ] = False,
    shards: Annotated[
        str | None, typer.Option(help="Held-out shards to show samples of; by default those that the run names.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write one self-contained HTML page of runs: verdict, curves, scores, data, configuration, environment."""
    if shards is not None and not share_samples:
        raise UserError("--shards says whose samples are shown; say --share-samples as well, or leave it out")
    from quiltnet.cli.run_directory import check_writable
    from quiltnet.release.report import check_report_path, render_report, write_report
    from quiltnet.release.report_subjects import read_subjects

    subjects = [replace(subject, manifest=_manifest(subject)) for subject in read_subjects(runs)]
    out = out or (runs[0] / REPORT_NAME if len(runs) == 1 else Path(REPORT_NAME))
    own = {(run / REPORT_NAME).resolve() for run in runs}
    check_report_path(out, is_own=out.resolve() in own, overwrite=overwrite)
    check_writable(out)
    samples = _samples(subjects, shards) if share_samples else []
    page = render_report(subjects, samples, share_samples=share_samples)
    write_report(page, out)
    print_line(f"{out}: {len(page.encode()) / 1e6:.2f} MB; open it in any browser")


def _samples(subjects: Sequence[Subject], shards: str | None) -> list[Samples]:
    """Of runs that have weights; the page says why others have none."""
    from quiltnet.release.hub import load_model
    from quiltnet.release.report_samples import Samples, make_samples

    made = []
    for subject in [subject for subject in subjects if subject.run is not None][:MOST_SAMPLED]:
        if not _has_weights(subject.run.path):
            made.append(Samples.absent(subject.name, "No samples: the run has saved no checkpoint yet."))
            continue
        pairs = _held_out(subject, shards)
        if pairs is None:
            made.append(Samples.absent(subject.name, "No samples: the run names no held-out shards (--shards does)."))
            continue
        made.append(make_samples(subject.name, load_model(subject.source), pairs))
    return made


def _has_weights(run: Path) -> bool:
    from quiltnet.release.hub import CHECKPOINTS_FOLDER
    from quiltnet.training.checkpoint import latest_checkpoint

    return latest_checkpoint(run / CHECKPOINTS_FOLDER) is not None


def _held_out(subject: Subject, shards: str | None) -> ShardPairs | None:
    from quiltnet.data.held_out import ShardPairs

    named = shards or _val_shards(subject.run.config)
    if not named:
        return None
    try:
        return ShardPairs(named, limit=MOST_PAIRS)
    except UserError as error:
        raise UserError(
            f"samples of {subject.name} cannot be shown: {error}. Start where the training was started, "
            "name the shards with --shards, or leave --share-samples out"
        ) from error


def _val_shards(config: Mapping[str, Any]) -> Any:
    return ((config.get("data") or {}).get("val") or {}).get("shards")


def _manifest(subject: Subject) -> dict[str, Any] | None:
    """Of the set that the run was trained on, where its shards are at hand; what it cannot say stays unsaid."""
    from quiltnet.data.shard_sets import find_shard_set

    shards = (((subject.run.config if subject.run else {}).get("data") or {}).get("train") or {}).get("shards")
    if not isinstance(shards, str) or "{" in shards or not Path(shards).exists():
        return None
    try:
        return find_shard_set(shards).manifest
    except UserError:  # a set that was moved in part; the run is told of all the same
        return None
