"""``quiltnet export``: a run becomes a folder that other libraries load, with a card, and goes to the hub if asked.

Models are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quiltnet.errors import UserError

if TYPE_CHECKING:
    from quiltnet.release.comparison import Comparison

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Push:
    """Where on the hub the folder goes, and how."""

    repository: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    dry_run: bool = False


def export(
    source: Annotated[
        str, typer.Argument(help="Run directory (RUN@best, RUN@ema), checkpoint, or anything that quiltnet.load takes.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[
        str, typer.Option(help="Of open_clip, transformers, onnx; several with commas between.")
    ] = "open_clip",
    half: Annotated[bool, typer.Option("--half", help="Round weights to float16: half the size.")] = False,
    license: Annotated[
        str | None,
        typer.Option(help="Licence of the weights, as the hub writes it (mit, cc-by-nc-4.0); --push needs one."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export; what you wrote in its card stays.")
    ] = False,
    share_samples: Annotated[
        bool, typer.Option("--share-samples", help="The card may name the data's sources and files.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Send the folder to the hub.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: a repository that is made is private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="With --push: a branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="With --push: open a pull request.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: list what would go, and send nothing.")
    ] = False,
) -> None:
    """Write a model for other libraries, load it back by each, and compare embeddings before saying so."""
    from quiltnet.cli.run_directory import check_writable
    from quiltnet.release.card import state_license
    from quiltnet.release.card_metadata import check_license
    from quiltnet.release.exporting import check_formats, check_out, check_same_export, is_export
    from quiltnet.release.hub import load_model

    formats = [name for name in format.split(",") if name]
    check_formats(formats)
    if license is not None:
        check_license(license)
    to = _read_push(push, private=private, revision=revision, create_pr=create_pr, dry_run=dry_run)
    if to is not None and license is None:
        raise UserError("--push needs --license: whose weights they began with, and which data, you know and we do not")
    if to is not None and is_export(out) and not overwrite:  # the same command again, after a push that broke off
        check_same_export(out, load_model(source), formats, half=half)
        print(f"{out} exists and goes to the hub as it is; --overwrite makes it anew")
        state_license(out, license)
        _send(out, to)
        return
    check_out(out, overwrite=overwrite)
    check_writable(out)
    comparisons = _write(
        source, out, formats, half=half, license=license, overwrite=overwrite, share_samples=share_samples
    )
    _tell(out, formats, comparisons)
    if to is not None:
        _send(out, to)


def _read_push(repository: str | None, **options: bool | str | None) -> Push | None:
    """Raises UserError for options without ``--push``, and for what the hub would refuse after the export."""
    from quiltnet.release.push import check_push

    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if repository is None:
        if given:
            raise UserError(f"{' and '.join(given)} go with --push org/name; say where the export shall go")
        return None
    to = Push(repository, **options)
    check_push(repository, revision=to.revision, create_pr=to.create_pr, dry_run=to.dry_run)
    return to


def _write(
    source: str,
    out: Path,
    formats: Sequence[str],
    *,
    half: bool,
    license: str | None,
    overwrite: bool,
    share_samples: bool,
) -> list[Comparison]:
    from quiltnet.release.card import write_card
    from quiltnet.release.exporting import export_model
    from quiltnet.release.hub import find_checkpoint, load_model, read_source
    from quiltnet.release.run_files import CONFIG_NAME, read_run
    from quiltnet.training.averaging import AVERAGE_SUFFIX
    from quiltnet.training.checkpoint import samples_of

    at = read_source(source)
    checkpoint = find_checkpoint(at)
    # Named outright, so that its weights are not compared with their checksum a second time.
    found = source if checkpoint is None else f"{checkpoint}{AVERAGE_SUFFIX if at.averaged else ''}"
    run = read_run(at.run) if at.run is not None and (at.run / CONFIG_NAME).is_file() else None

    def write_readme(folder: Path, comparisons: list[Comparison]) -> None:
        write_card(
            folder,
            run,
            comparisons=comparisons,
            license=license,
            previous=out / CARD_NAME,
            share_samples=share_samples,
            averaged=at.averaged,
            samples_seen=samples_of(checkpoint) if checkpoint is not None and run is not None else None,
            final=out,
        )

    return export_model(
        load_model(found),
        out,
        formats=formats,
        half=half,
        overwrite=overwrite,
        finish=write_readme,
    )


def _tell(out: Path, formats: Sequence[str], comparisons: Sequence[Comparison]) -> None:
    from quiltnet.cli.tables import print_rows

    rows = [[c.library, c.what, f"{c.difference:.1e}", f"{c.limit:.0e}"] for c in comparisons]
    print_rows([["loaded by", "compared", "largest difference", "limit"], *rows])
    print(f"{out}: complete")
    if "open_clip" in formats:
        print(f'  open_clip.create_model_and_transforms("local-dir:{out}")')
    if "transformers" in formats:
        print(f'  transformers.CLIPModel.from_pretrained("{out}")')
    if "onnx" in formats:
        print(f'  onnxruntime.InferenceSession("{out}/onnx/image_encoder.onnx")')
    if {"open_clip", "transformers"} & set(formats):
        print(f'  quiltnet.load("{out}")')


def _send(out: Path, to: Push) -> None:
    from quiltnet.release.open_clip_export import name_repository
    from quiltnet.release.push import push_folder

    if not to.dry_run:
        name_repository(out, to.repository)
    print(
        push_folder(
            out,
            to.repository,
            private=to.private,
            revision=to.revision,
            create_pr=to.create_pr,
            dry_run=to.dry_run,
        )
    )
