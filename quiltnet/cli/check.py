"""``quiltnet check data`` and ``quiltnet check run``: what is wrong, before it costs a training run.

The wings are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quiltnet.cli.tables import print_table
from quiltnet.errors import UserError

if TYPE_CHECKING:
    from quiltnet.data.checking import Check, Finding
    from quiltnet.model.tokenizer import Tokenizer

check = typer.Typer(
    no_args_is_help=True, help="Check a shard set or a run; exit code 1 where something is above its limit."
)


@check.command()
def data(
    folder: Annotated[Path, typer.Argument(help="A shard set, one split of it, or a folder of any tars.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation set to look for among the images: a folder of images, a table of labels, shards; "
            "may be given again."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of report.json and contact_sheet.png; check/ in the set by default.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Whose tokeniser counts: an open_clip architecture, a run directory or an export.")
    ] = "ViT-B-32",
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Compare every tar with the manifest's sha256.")
    ] = False,
    near_distance: Annotated[int, typer.Option(help="Bits of 64 that hashes of near duplicates may differ in.")] = 4,
    turned: Annotated[
        bool, typer.Option(help="Whether turned by right angles, or mirrored, an image is a near duplicate.")
    ] = True,
    tiny_side: Annotated[int, typer.Option(help="An image with a shorter side, in pixels, is tiny.")] = 64,
    giant_pixels: Annotated[int, typer.Option(help="An image of more pixels is giant.")] = 16_777_216,
    aspect: Annotated[float, typer.Option(help="Longer by shorter side, above which an image is elongated.")] = 4.0,
    max_broken: Annotated[float, typer.Option(help="Share of samples that cannot be used.")] = 0.01,
    max_leaks: Annotated[int, typer.Option(help="Images of a held-out set that training has too; -1: any number.")] = 0,
    max_duplicates: Annotated[
        float | None, typer.Option(help="Share of images that are copies in their split.")
    ] = None,
    max_duplicate_captions: Annotated[float | None, typer.Option(help="Share of captions that repeat.")] = None,
    max_truncated: Annotated[float | None, typer.Option(help="Share of captions that the tokeniser cuts.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="How many of each finding report.json names.")] = 100,
) -> None:
    """Check every sample of a shard set: files, images, captions, copies, leaks."""
    from quiltnet.cli.run_directory import check_writable
    from quiltnet.data.check_report import write_report
    from quiltnet.data.checking import Bounds, Limits, check_data

    limits = Limits(
        broken=max_broken,
        leaks=None if max_leaks == -1 else max_leaks,
        duplicates=max_duplicates,
        duplicate_captions=max_duplicate_captions,
        truncated=max_truncated,
    )
    target = out or _default_out(folder)
    try:
        check_writable(target)
    except UserError as error:  # as a set that others share
        raise UserError(f"{error} with --out") from error
    load_tokenizer(model)  # a name that is none is found out now
    with tar_progress("checking") as progress:
        found = check_data(
            folder,
            against=against or (),
            limits=limits,
            bounds=Bounds(near_distance, turned, tiny_side, giant_pixels, aspect),
            checksums=checksums,
            truncated=partial(is_truncated, model=model),
            workers=worker_count(workers),
            progress=progress,
        )
    write_report(found, target, examples=examples)
    print_findings(found)
    print_line(f"report: {target}")
    if not found.passed:
        raise typer.Exit(1)


@check.command()
def run(folder: Annotated[Path, typer.Argument(help="A run directory, such as outputs/my_run.")]) -> None:
    """Check a run directory: checkpoints load and are finite, config, metrics and results are whole."""
    from quiltnet.cli.check_run import check_run, print_checks

    checks = check_run(folder)
    print_checks(checks)
    if not all(passed.is_well for passed in checks):
        raise typer.Exit(1)


@lru_cache(maxsize=1)
def load_tokenizer(source: str) -> Tokenizer:
    """The tokeniser alone, without weights, of an open_clip architecture or of a folder that describes a model."""
    import open_clip

    from quiltnet.model.folder import CONFIG_NAME, read_description
    from quiltnet.model.tokenizer import bpe_tokenizer, built_in_tokenizer, hugging_face_tokenizer
    from quiltnet.model.weights import hub_access
    from quiltnet.release.hub import DESCRIPTION_FOLDER

    folder = next((f for f in (Path(source), Path(source) / DESCRIPTION_FOLDER) if (f / CONFIG_NAME).is_file()), None)
    if folder is None and source not in open_clip.list_models():
        raise UserError(
            f"--model {source} is neither an open_clip architecture (such as ViT-B-32) nor a run directory or "
            "an exported folder; give one of them"
        )
    described = open_clip.get_model_config(source) if folder is None else read_description(folder).model_cfg
    text_cfg = described["text_cfg"]
    context_length = text_cfg.get("context_length", open_clip.model.CLIPTextCfg.context_length)
    name = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    options = text_cfg.get("tokenizer_kwargs") or {}
    with hub_access(f"the tokeniser of {source}", "give --model a folder that holds its vocabulary"):
        if folder is None:
            return built_in_tokenizer(source, context_length)
        if name is not None:
            return hugging_face_tokenizer(name, context_length, **options)
    return bpe_tokenizer(context_length, **options)


def is_truncated(captions: list[str], *, model: str) -> Sequence[bool]:
    """Whether the tokeniser of ``model`` cuts each caption. A function of a module: worker processes import it."""
    tokenize = load_tokenizer(model)
    return (tokenize.measure(captions)[1] > tokenize.context_length).tolist()


def print_findings(check: Check) -> None:
    """A line for each finding that has a limit or a count."""
    table = Table("finding", "count", "of", "share", "limit", "")
    table.columns[0].no_wrap = True
    for column in table.columns[1:5]:
        column.justify = "right"
    for finding in check.findings:
        if finding.count or finding.limit is not None:
            table.add_row(*_cells(finding), style="bold red" if finding.is_above else None)
        for name, count in finding.details.items():
            if count:
                table.add_row(f"  {escape(name)}", f"{count:,}", "", "", "", "", style="dim")
    print_table(table)
    above = [finding.name for finding in check.findings if finding.is_above]
    print_line(f"above its limit: {', '.join(above)}" if above else "nothing is above its limit")


def print_line(text: str) -> None:
    Console(markup=False, highlight=False, soft_wrap=True).print(text)


def _cells(finding: Finding) -> tuple[str, ...]:
    limit = "" if finding.limit is None else f"{finding.limit:.2%}" if finding.is_share else f"{finding.limit:,}"
    verdict = "above" if finding.is_above else "" if finding.limit is None else "ok"
    of = f"{finding.of:,} {finding.unit}"
    return escape(finding.name), f"{finding.count:,}", of, f"{finding.share:.2%}", limit, verdict


def _default_out(folder: Path) -> Path:
    """Beside the splits of a set, never among the tars of one."""
    from quiltnet.data.manifest import MANIFEST_NAME

    folder = Path(os.path.abspath(folder.expanduser()))
    if folder.is_dir() and not (folder.parent / MANIFEST_NAME).is_file():
        return folder / "check"
    return folder.parent / f"check-{folder.stem}"


@contextmanager
def tar_progress(verb: str) -> Iterator[Callable[[int, int, int], None]]:
    """What is called with (tars done, all tars, samples seen), and shows it on stderr."""
    from quiltnet.cli.shard_progress import watch_progress

    before: list[int] = []
    with closing(watch_progress()) as watch:

        def show(done: int, total: int, samples: int) -> None:
            if not before:
                watch.stage(f"{verb} tars", total)
            watch.advance(done - (before.pop() if before else 0))
            before.append(done)

        yield show


def worker_count(workers: int | None) -> int:
    """Processes: as many as were asked for, or one for each core that this process may use."""
    from quiltnet.data.worker_pool import available_cores

    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: one process at least works")
    return workers or available_cores()
