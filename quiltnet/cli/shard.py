"""``quiltnet shard``: pairs of any source, or drawn tiles, into shards.

The data wing is imported where it is used: ``quiltnet --help`` must not wait for torch and pandas.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quiltnet.cli.shard_progress import continued_by_the_same_command, watch_progress
from quiltnet.cli.shard_sources import Format, Layout, Request, check_request, open_source, with_split_column


def shard(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[
        Format,
        typer.Option(
            help="quilt1m: the release; csv: any csv, tsv or parquet table; folder: images with .txt or .json files "
            "beside them; webdataset: tars to pack again; synthetic: drawn tiles."
        ),
    ] = Format.quilt1m,
    table: Annotated[Path | None, typer.Option(help="quilt1m, csv: table of images and captions.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder that image paths start from, or zips: their folder, one, several, a pattern. "
            "webdataset: the tars."
        ),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of tables and lists.")] = "utf-8",
    subset: Annotated[str | None, typer.Option(help="quilt1m: only these, as quilt,openpath.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Only this split; where nothing says splits, the split of all rows.")
    ] = None,
    magnification: Annotated[str | None, typer.Option(help="quilt1m: only these of 0, 1, 2, as 1,2.")] = None,
    drop_not_histology: Annotated[
        bool, typer.Option("--drop-not-histology", help="quilt1m: leave out what was marked as no histology.")
    ] = False,
    min_words: Annotated[int | None, typer.Option(help="Only captions of so many words at least.")] = None,
    max_words: Annotated[int | None, typer.Option(help="Only captions of so many words at most.")] = None,
    keep_list: Annotated[
        Path | None, typer.Option(help="Only images listed here, one path a line, or in a table with --image-column.")
    ] = None,
    keep_column: Annotated[str | None, typer.Option(help="Score in the table of --keep-list.")] = None,
    keep_min: Annotated[float | None, typer.Option(help="Only scores of at least this.")] = None,
    keep_max: Annotated[float | None, typer.Option(help="Only scores below this.")] = None,
    image_column: Annotated[
        str | None, typer.Option(help="csv, --keep-list: image paths; image_path by default.")
    ] = None,
    caption_column: Annotated[str | None, typer.Option(help="csv: captions; caption by default.")] = None,
    split_column: Annotated[
        str | None, typer.Option(help="csv: train, val, ...; split by default, if there is one.")
    ] = None,
    source_column: Annotated[str | None, typer.Option(help="csv: slide, case or article of an image.")] = None,
    source_pattern: Annotated[
        str | None, typer.Option(help="Regular expression for the source in an image path: its first group.")
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="images: a sample an image, with all its captions; rows: a sample a row.")
    ] = Layout.images,
    samples: Annotated[
        int | None, typer.Option(help="synthetic: number of tiles, 1000 by default; a tenth becomes val.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="synthetic: side of a tile in pixels, 224 by default.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Samples a tar.")] = 1000,
    workers: Annotated[int | None, typer.Option(help="Processes; as a rule one a core.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of samples, and of what is drawn.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shard set at --out.")] = False,
) -> None:
    """Pack image-caption pairs into tar shards with a manifest.

    One sample per image with all its captions; images are copied byte for byte. Rows that cannot be used are counted
    by reason and listed in rejected.jsonl; rows that a filter drops are counted. A command that was stopped
    continues when it is given again.
    """
    request = Request(
        format=format, table=table, images=images, encoding=encoding, subset=subset, split=split,
        magnification=magnification, drop_not_histology=drop_not_histology, min_words=min_words, max_words=max_words,
        keep_list=keep_list, keep_column=keep_column, keep_min=keep_min, keep_max=keep_max,
        image_column=image_column, caption_column=caption_column, split_column=split_column,
        source_column=source_column, source_pattern=source_pattern, samples=samples, size=size, seed=seed,
    )  # fmt: skip
    out = Path(os.path.abspath(out.expanduser()))
    with continued_by_the_same_command(out):
        manifest = _pack(
            request,
            out,
            layout=layout.value,
            samples_per_shard=samples_per_shard,
            seed=seed,
            workers=workers,
            overwrite=overwrite,
        )
    _print_totals(manifest, out)


def _pack(request: Request, out: Path, **options: Any) -> dict[str, Any]:
    from quiltnet.data.decoding import find_defect
    from quiltnet.data.shards import check_target, write_shards

    check_request(request, out)
    request = with_split_column(request)
    source = request.describe()
    check_target(out, overwrite=options["overwrite"], source=source)
    progress = watch_progress()
    with tempfile.TemporaryDirectory(prefix="quiltnet-") as drawn:
        rows, images, filters = open_source(request, Path(drawn))
        try:
            return write_shards(
                rows,
                out,
                name=request.format.value,
                source=source,
                images=images,
                check_image=find_defect,
                filters=filters,
                progress=progress,
                **options,
            )
        finally:
            progress.close()


def _print_totals(manifest: dict[str, Any], out: Path) -> None:
    table = Table("", "samples", "captions", "tars")
    for column in table.columns[1:]:
        column.justify = "right"
    for split, entry in manifest["splits"].items():
        table.add_row(split, str(entry["samples"]), str(entry["captions"]), str(len(entry["shards"])))
    totals = manifest["totals"]
    table.add_row("all", str(totals["samples"]), str(totals["captions"]), "", style="bold")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    counts = totals["rejected"]
    by_kind = {"filtered": {}, "rejected": {}}
    for reason, rows in counts.items():
        by_kind["filtered" if reason.startswith("filtered_") else "rejected"][reason.removeprefix("filtered_")] = rows
    for kind, of_kind in [*by_kind.items(), ("found", totals["findings"])]:
        if of_kind or kind == "rejected":
            words = ", ".join(f"{rows} {reason}" for reason, rows in of_kind.items()) or "none"
            console.print(f"{kind}{'' if kind == 'found' else ' rows'}: {words}")
    shared = totals["in_several_splits"]
    if shared["images"] or shared["sources"]:
        console.print(
            f"warning: {shared['images']} images and {shared['sources']} sources are in more than one split: "
            "val measures in part what was trained on"
        )
    console.print(f"shards: {out}")
