"""``quiltnet teach``: a shard set with the features of a frozen teacher in it.

The data wing and the models are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quiltnet.cli.check import print_line, tar_progress, worker_count
from quiltnet.cli.shard_progress import continued_by_the_same_command
from quiltnet.errors import UserError

if TYPE_CHECKING:
    from quiltnet.model.contrastive import ContrastiveModel


def teach(
    source: Annotated[Path, typer.Argument(help="A shard set.")],
    teacher: Annotated[
        str, typer.Option(help="Run directory, exported folder, hub:org/name, or an open_clip name:tag.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    batch_size: Annotated[int, typer.Option(help="Images that the teacher encodes at once.")] = 64,
    workers: Annotated[int | None, typer.Option(help="Threads that decode; one a core by default.")] = None,
) -> None:
    """Encode a shard set once by a teacher, for objective.teacher=stored.

    Images, captions, keys, order, shard names and splits are carried over as they are. A run that was stopped goes on
    with the same command.
    """
    import torch

    from quiltnet.cli.run_directory import check_writable
    from quiltnet.data.teaching import teach_shards
    from quiltnet.release.hub import load_model

    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: one image at least is encoded at once")
    threads = worker_count(workers)
    check_writable(out)
    model = load_model(teacher).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    with continued_by_the_same_command(out), tar_progress("teaching") as progress:
        manifest = teach_shards(
            source, out, model, describe_teacher(teacher, model), batch_size=batch_size, workers=threads,
            progress=progress
        )  # fmt: skip
    _print_outcome(manifest, out)


def describe_teacher(name: str, model: ContrastiveModel) -> dict[str, Any]:
    """What a manifest says of a teacher; ``sha256`` is of its weights."""
    embed_dim = model.description.model_cfg["embed_dim"]
    scale = float(model.logit_scale.detach())
    return {"name": name, "embed_dim": embed_dim, "logit_scale": scale, "sha256": model.weights_sha256()}


def _print_outcome(manifest: dict[str, Any], out: Path) -> None:
    taught, samples = manifest["teacher"], manifest["totals"]["samples"]
    lines = (
        f"{samples - taught['without']:,} of {samples:,} samples have features of {taught['name']} "
        f"({taught['embed_dim']} wide)",
        f"shards: {out}",
        "to learn from them: objective.teacher=stored objective.distillation_weight=1.0",
    )
    print_line("\n".join(lines))
