"""``quiltnet embed``: features of any images by any model, in one file.

The wings are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import quiltnet
from quiltnet.cli.check import print_line
from quiltnet.cli.shard_progress import watch_progress
from quiltnet.errors import UserError
from quiltnet.whole_files import as_any_file, whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from quiltnet.model.contrastive import ContrastiveModel

IDS_LIMIT = 90_000_000  # bytes; safetensors reads no header of more than 100 MB


def embed(
    model: Annotated[
        str, typer.Argument(help="Run directory (RUN@best, RUN@ema), checkpoint, or anything that quiltnet.load takes.")
    ],
    data: Annotated[str, typer.Argument(help="Folder of images, table with a column of images, or shards.")],
    out: Annotated[Path, typer.Option(help="File to write: features (N, D), their ids in its metadata.")],
    image_column: Annotated[str | None, typer.Option(help="Column of a table that names the images.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that a table's paths start from; its own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images that a rank encodes at once.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes of each rank that decode; 0: its own.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder where features are kept, and found again.")] = None,
    before_projection: Annotated[
        bool, typer.Option("--before-projection", help="Features of the image tower itself, not of unit length.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Encode images into one file of features, one row an image, in the order of names, rows or samples.

    Several devices share the work: torchrun --nproc-per-node 8 --no-python quiltnet embed ...
    """
    if batch_size < 1 or workers < 0:
        raise UserError(f"--batch-size {batch_size} --workers {workers}: give at least 1 image and 0 processes")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} will be a safetensors file; let its name end in .safetensors")
    from quiltnet.cli.embed_sources import find_embed_images
    from quiltnet.cli.run_directory import check_out_file
    from quiltnet.distributed import is_main, on_main
    from quiltnet.evaluation.feature_cache import FeatureCache
    from quiltnet.evaluation.features import SetEncoder
    from quiltnet.evaluation.measuring import evaluation_mode
    from quiltnet.release.hub import load_model
    from quiltnet.training.precision import build_accelerator

    accelerator = build_accelerator()
    on_main(lambda: check_out_file(out, overwrite=overwrite))
    samples = find_embed_images(data, image_column, images)
    ids = json.dumps(list(samples.ids))
    if len(ids) > IDS_LIMIT:
        raise UserError(f"the names of {len(samples):,} images do not fit into one file; embed them in parts")
    loaded = load_model(model).to(accelerator.device)
    with evaluation_mode(loaded), _progress(len(samples), batch_size) as advance:
        encoder = SetEncoder(loaded, FeatureCache(cache) if cache else None, between=advance)
        features = encoder.images(samples, batch_size=batch_size, workers=workers, projected=not before_projection)
    if is_main():
        facts = {"model": model, "data": data, "data_sha256": samples.sha256(), "projected": not before_projection}
        _write(out, features, {"ids": ids, **_metadata(loaded, facts)})
        print_line(f"{len(features):,} images, {features.shape[1]} features each: {out}")


@contextmanager
def _progress(total: int, batch_size: int) -> Iterator[Callable[[], None]]:
    """What is called after each batch of all ranks, and told on standard error by the first."""
    from quiltnet.distributed import is_main, world_size

    if not is_main():
        yield lambda: None
        return
    shown, left = watch_progress(), total

    def advance() -> None:
        nonlocal left
        done = min(left, batch_size * world_size())
        left -= done
        shown.advance(done)

    shown.stage("encoding", total)
    try:
        yield advance
    finally:
        shown.close()


def _metadata(model: ContrastiveModel, facts: Mapping[str, Any]) -> dict[str, str]:
    """What a safetensors file can hold: texts by name. What is no text is written as JSON."""
    described = {**facts, **model.describe(), "quiltnet": quiltnet.__version__}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in described.items()}


def _write(out: Path, features: Tensor, metadata: Mapping[str, str]) -> None:
    """The file appears under its name when it is whole."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as unfinished:
        save_file({"features": features.contiguous()}, unfinished, metadata=dict(metadata))
        as_any_file(unfinished)
