"""A model becomes a folder that other libraries load: written, loaded back by each, compared, then named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from quiltnet.errors import UserError
from quiltnet.model.adapters import has_lora, merge_lora
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.folder import write_description
from quiltnet.release.comparison import HALF_LIMIT, Comparison, NotEqual, Reference, take_reference
from quiltnet.release.onnx_export import check_onnx, compare_with_onnx, write_onnx
from quiltnet.release.open_clip_export import compare_with_open_clip, write_open_clip
from quiltnet.release.transformers_export import compare_with_transformers, write_transformers
from quiltnet.release.transformers_layout import check_transformers
from quiltnet.release.whole_folder import whole_folder

FORMATS = ("open_clip", "transformers", "onnx")
RECORD_NAME = "quiltnet_export.json"


def export_model(
    model: ContrastiveModel,
    out: Path,
    *,
    formats: Sequence[str] = ("open_clip",),
    half: bool = False,
    overwrite: bool = False,
    finish: Callable[[Path, list[Comparison]], None] | None = None,
) -> list[Comparison]:
    """Write ``out`` in all formats, load each back by its own library, and compare before saying so.

    The folder appears under its name when all comparisons have passed; until then it is called
    ``.NAME.unfinished``, and is removed when something fails. The model itself is left as it is; adapters are merged
    in what is written.

    Args:
        formats: of ``FORMATS``.
        half: round weights to float16. open_clip and transformers store them so; ONNX stores the rounded ones in
            float32.
        overwrite: replace an earlier export, when the new one is whole.
        finish: is given the unfinished folder and the comparisons, to write more into it.

    Returns:
        What was compared.

    Raises:
        UserError: ``out`` exists, a format is unknown, is not possible for this model or lacks its packages.
        NotEqual: a library makes something else of the export than the model does; nothing is left of it.
    """
    check_formats(formats)
    check_out(out, overwrite=overwrite)
    if "transformers" in formats:
        check_transformers(model)
    plain = deepcopy(merge_lora(model) if has_lora(model) else model).eval().cpu()
    with whole_folder(out) as unfinished:
        comparisons = [_round_weights(plain)] if half else []
        reference = take_reference(plain)
        for name in FORMATS:
            if name in formats:
                comparisons += _write_and_compare(name, plain, reference, unfinished, half=half)
        _check(comparisons, out)
        if "open_clip" in formats:
            # A Hugging Face tower is found by absolute path, which the move changes.
            write_description(plain, unfinished, final=out)
        record = json.dumps(_record(model, formats, half=half), indent=2)
        (unfinished / RECORD_NAME).write_text(record + "\n", encoding="utf-8")
        if finish is not None:
            finish(unfinished, comparisons)
    return comparisons


def export_open_clip(model: ContrastiveModel, out: Path) -> float:
    """``export_model`` in open_clip's layout alone; the largest difference between embeddings."""
    return max(comparison.difference for comparison in export_model(model, out))


def check_formats(formats: Sequence[str]) -> None:
    """Raises UserError for none, an unknown one, or one whose packages are not installed."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"--format {','.join(formats)}: choose of {', '.join(FORMATS)}, with commas between several")
    if "onnx" in formats:
        check_onnx()


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raises UserError where ``out`` exists, unless it is an earlier export that shall be replaced."""
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already; give another --out, remove it, or say --overwrite")
    if not is_export(out):
        raise UserError(f"{out} is no export, and is not overwritten; give another --out")


def is_export(folder: Path) -> bool:
    """Whether ``export_model`` made it; its record is what a download or a run's own ``model`` does not have."""
    return (folder / RECORD_NAME).is_file()


def check_same_export(folder: Path, model: ContrastiveModel, formats: Sequence[str], *, half: bool) -> None:
    """That ``folder`` is what ``export_model`` would make of this model: an earlier export may be of another.

    Raises:
        UserError: it is not.
    """
    kept = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    if kept != _record(model, formats, half=half):
        raise UserError(
            f"{folder} exists and is not this export: it holds {', '.join(kept['formats'])}, and weights, formats and "
            "--half must be the same for a push to go on; --overwrite makes it anew, another --out leaves it"
        )


def _record(model: ContrastiveModel, formats: Sequence[str], *, half: bool) -> dict[str, Any]:
    return {"weights_sha256": model.weights_sha256(), "formats": sorted(formats), "half": half}


def _write_and_compare(
    name: str, model: ContrastiveModel, reference: Reference, folder: Path, *, half: bool
) -> list[Comparison]:
    if name == "open_clip":
        write_open_clip(model, folder, half=half)
        return compare_with_open_clip(reference, folder)
    if name == "transformers":
        write_transformers(model, folder, half=half)
        return compare_with_transformers(reference, folder)
    write_onnx(model, folder)
    return compare_with_onnx(reference, folder)


@torch.no_grad()
def _round_weights(model: ContrastiveModel) -> Comparison:
    """To the numbers that float16 has, in place; how far that moves embeddings.

    Raises:
        UserError: a weight is beyond float16's range.
    """
    before = take_reference(model)
    for name, tensor in model.clip.state_dict().items():
        if not tensor.is_floating_point():
            continue
        rounded = tensor.half().float()
        if not rounded.isfinite().all():
            raise UserError(f"--half: {name} has values beyond 65504, which float16 cannot hold; leave --half out")
        tensor.copy_(rounded)
    after = take_reference(model)
    difference = before.features_difference(after.image_features, after.text_features)
    return Comparison("quiltnet", difference, HALF_LIMIT, "embeddings, float16 weights against float32")


def _check(comparisons: Sequence[Comparison], out: Path) -> None:
    for found in comparisons:
        if not found.passed:
            raise NotEqual(
                f"{found.library} makes something else of the export ({found.what} differ by {found.difference:.1e}, "
                f"limit {found.limit:.0e}); nothing was written to {out}"
            )
