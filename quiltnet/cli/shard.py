"""``quiltnet shard``: a table and its images, or drawn tiles, into shards.

The data wing is imported where it is used: ``quiltnet --help`` must not wait for torch and pandas.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from quiltnet.errors import UserError

if TYPE_CHECKING:
    from quiltnet.data.pairs import PairRow


class Format(str, Enum):
    """What is packed."""

    quilt1m = "quilt1m"
    csv = "csv"
    synthetic = "synthetic"


def shard(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[
        Format,
        typer.Option(help="quilt1m: the release; csv: any csv, tsv or parquet table; synthetic: drawn tiles."),
    ] = Format.quilt1m,
    table: Annotated[Path | None, typer.Option(help="Table of images and captions.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that its image paths start from.")] = None,
    subset: Annotated[str | None, typer.Option(help="quilt1m: only these, as quilt,openpath.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Only this split; without a column of splits, the split of all rows.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="csv: image paths.")] = "image_path",
    caption_column: Annotated[str, typer.Option(help="csv: captions.")] = "caption",
    split_column: Annotated[str | None, typer.Option(help="csv: train, val, ...")] = None,
    source_column: Annotated[str | None, typer.Option(help="csv: slide, case or article of an image.")] = None,
    samples: Annotated[int, typer.Option(help="synthetic: number of tiles; a tenth becomes val.")] = 1000,
    size: Annotated[int, typer.Option(help="synthetic: side of a tile in pixels.")] = 224,
    samples_per_shard: Annotated[int, typer.Option(help="Samples a tar.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the order of samples, and of what is drawn.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shard set at --out.")] = False,
) -> None:
    """Pack image-caption pairs into tar shards with a manifest.

    One sample per image with all its captions; images are copied byte for byte. Rows that cannot be used are
    counted by reason and listed in rejected.jsonl.
    """
    from quiltnet.data.quilt1m import quilt1m_rows
    from quiltnet.data.shards import check_target
    from quiltnet.data.tables import table_rows

    check_target(out, overwrite=overwrite)
    if subset is not None and format is not Format.quilt1m:
        raise UserError(f"--subset chooses among the subsets of Quilt-1M; leave it out with --format {format.value}")
    with tempfile.TemporaryDirectory(prefix="quiltnet-") as drawn:
        if format is Format.synthetic:
            images = Path(drawn)
            rows = _draw_rows(samples, size, seed, images)
            source = {"samples": samples, "size": size}
        else:
            table, images = _given(table, "--table"), _given(images, "--images")
            source = {"table": table.name, "subset": subset, "split": split}
            if format is Format.quilt1m:
                rows = quilt1m_rows(table, subset=subset.split(",") if subset else None, split=split)
            else:
                rows = table_rows(
                    table,
                    image_column=image_column,
                    caption_column=caption_column,
                    split_column=split_column,
                    source_column=source_column,
                    split=split,
                )
        manifest = _pack(
            rows,
            images,
            out,
            name=format.value,
            source={"format": format.value, **source},
            samples_per_shard=samples_per_shard,
            seed=seed,
            overwrite=overwrite,
        )
    _print_totals(manifest, out)


def _given(path: Path | None, option: str) -> Path:
    if path is None:
        raise UserError(f"{option} is not given; quilt1m and csv need --table and --images")
    return path


def _draw_rows(samples: int, size: int, seed: int, folder: Path) -> Iterator[PairRow]:
    """Draw tiles into ``folder``; the last tenth is the val split."""
    from quiltnet.data.pairs import PairRow
    from quiltnet.data.synthetic import draw_pairs

    numbers = count()
    for number, pair in enumerate(draw_pairs(samples, size, seed)):
        path = f"{pair.name}.jpg"
        (folder / path).write_bytes(pair.jpeg())
        facts = {"synthetic": True, "pattern": pair.pattern, **asdict(pair.attributes)}
        split = "val" if number >= samples - samples // 10 else "train"
        for caption in pair.captions:
            yield PairRow(next(numbers), path, caption, split, pair.name, facts)


def _pack(rows: Iterable[PairRow], images: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Shards from rows, under a progress bar on stderr."""
    from quiltnet.data.decoding import find_defect
    from quiltnet.data.pairs import group_by_image
    from quiltnet.data.shards import folder_reader, write_shards

    read_file = folder_reader(images)
    console = Console(stderr=True)
    with console.status("reading the table"):
        samples = group_by_image(rows)
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("packing", total=len(samples))

        def read_image(path: str) -> bytes:
            progress.advance(task)
            return read_file(path)

        return write_shards(samples, out, read_image=read_image, check_image=find_defect, **options)


def _print_totals(manifest: dict[str, Any], out: Path) -> None:
    table = Table("", "samples", "captions", "tars")
    for column in table.columns[1:]:
        column.justify = "right"
    for split, entry in manifest["splits"].items():
        table.add_row(split, str(entry["samples"]), str(entry["captions"]), str(len(entry["shards"])))
    totals = manifest["totals"]
    table.add_row("all", str(totals["samples"]), str(totals["captions"]), "", style="bold")
    console = Console()
    console.print(table)
    rejected = ", ".join(f"{rows} {reason}" for reason, rows in totals["rejected"].items()) or "none"
    console.print(f"rejected rows: {rejected}", highlight=False)
    shared = totals["in_several_splits"]["images"]
    if shared:
        console.print(f"warning: {shared} images are in more than one split: what val measures was trained on")
    console.print(f"shards: {out}", highlight=False, soft_wrap=True)
