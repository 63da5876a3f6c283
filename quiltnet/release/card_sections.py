"""What a run says of itself, as the sections of a model card: data, recipe, results, checks, circumstances.

Counts and settings are shown, never captions, file names or places on this machine; the names of the training data come
in with ``share_samples`` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from quiltnet.release.card_metadata import base_model
from quiltnet.release.card_scores import Score
from quiltnet.release.card_text import facts, table
from quiltnet.release.run_files import RunFiles

PACKAGES = ("quiltnet", "torch", "open_clip_torch", "transformers", "timm", "accelerate", "safetensors")
RESULTS_HEADER = ("evaluator", "metric", "start", "trained", "95 % interval", "change")
NO_RUN = "The model was exported without a run of quiltnet; nothing is known of it here."
LIMITS = """\
Research only. **Not for diagnosis**, nor for any other decision about a patient: the model was not built, tested or
approved as a medical device.

- It compares a tile with texts and always finds some text the nearest, right or not; its scores are no probabilities
  of disease.
- Stains, scanners, magnifications, organs and species other than those of its training data may be read wrongly, and
  captions taken from the web carry their authors' mistakes and preferences.
- The numbers above are of the sets named there. They say nothing of other hospitals; measure it on data of your own.
- Text may describe patients: do not publish embeddings of reports without asking whose they are."""


class ComparedExport(Protocol):
    """How far a library's reload of the exported folder was from the model."""

    library: str
    difference: float
    limit: float
    what: str


def data_section(run: RunFiles, *, share_samples: bool) -> str:
    """How many pairs there were, and what each filter dropped."""
    data = run.environment.get("data", {})
    entries = {
        "pairs a pass over the data": _count(data.get("samples")),
        "shards (tar files)": _count(data.get("tars")),
        "hash of the shards (SHA-256)": data.get("sha256"),
        "names": _source_names(run) if share_samples else None,
    }
    parts = [facts(entries)]
    parts += [_packing(manifest["totals"], manifest.get("source", {})) for manifest in _manifests(run)]
    if not share_samples:
        parts.append("Names of the data sources are not part of this card.")
    return "\n\n".join(parts)


def _packing(totals: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """What packing a shard set kept and what it left out, by reason."""
    words = totals.get("caption_words") or {}
    kept = {
        "format packed from": source.get("format"),
        "rows read": _count(totals.get("rows")),
        "image-caption samples packed, all splits": _count(totals.get("samples")),
        "captions": _count(totals.get("captions")),
        "images": _count(totals.get("images")),
        "sources (slides, videos, articles)": _count(totals.get("sources")),
        "words a caption, median": words.get("p50"),
        "the same caption of an image again, dropped": _count(totals.get("duplicate_captions")),
    }
    rejected = totals.get("rejected") or {}
    if not rejected:
        return f"{facts(kept)}\n\nNo filter dropped a row."
    rows = [(reason, _count(rows)) for reason, rows in rejected.items()]
    return f"{facts(kept)}\n\n{table(['left out by', 'rows'], rows, numbers=1)}"


def _manifests(run: RunFiles) -> list[dict[str, Any]]:
    """Of the shard sets that the run trained on, if all lie on this machine still and count as many samples."""
    counted, found = 0, []
    for folder in _shard_folders(run):
        manifest = _read_manifest(folder.parent)
        if manifest is None or folder.name not in manifest["splits"]:
            return []
        counted += manifest["splits"][folder.name]["samples"]
        found.append(manifest)
    return found if counted == run.environment.get("data", {}).get("samples") else []


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none that can be read: the card then says what the run itself wrote down."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"totals", "splits"} <= set(manifest) else None


def _shard_folders(run: RunFiles) -> list[Path]:
    train = run.config.get("data", {}).get("train", {})
    given = [train.get("shards"), *(source.get("shards") for source in (train.get("sources") or {}).values())]
    return [Path(shards) for shards in given if isinstance(shards, str) and "://" not in shards]


def _source_names(run: RunFiles) -> str | None:
    train = run.config.get("data", {}).get("train", {})
    names = list(train.get("sources") or {}) or ["/".join(folder.parts[-2:]) for folder in _shard_folders(run)]
    return ", ".join(names) or None


def recipe_section(run: RunFiles, samples_seen: int) -> str:
    """Start, tuning, optimiser, batch, span, augmentation and averaging."""
    config = run.config
    tuning, optim, schedule = (config.get(name) or {} for name in ("tuning", "optim", "schedule"))
    samples = run.environment.get("data", {}).get("samples")
    total = config.get("total_samples")
    entries = {
        "start": _start(run),
        "image tower": _tuned(tuning, "image"),
        "text tower": _tuned(tuning, "text"),
        "loss": _class_name(config.get("loss")),
        "optimiser": optim.get("name"),
        "learning rate": optim.get("lr"),
        "weight decay": optim.get("weight_decay"),
        "schedule": _class_name(schedule),
        "warm-up, samples": _count(schedule.get("warmup_samples")),
        "global batch size": _count(config.get("global_batch_size")),
        "samples seen": _count(samples_seen),
        "samples planned": _count(total),
        "passes over the data, planned": f"{total / samples:.2f}" if total and samples else None,
        "precision": config.get("precision"),
        "patch dropout": config.get("patch_dropout") or None,
        "weights averaged (EMA decay)": (config.get("averaging") or {}).get("decay"),
        "distillation weight": (config.get("objective") or {}).get("distillation_weight") or None,
        "seed": config.get("seed"),
        **_augmentation(config.get("data") or {}),
    }
    return facts(entries)


def _augmentation(data: Mapping[str, Any]) -> dict[str, Any]:
    train, augment = data.get("train") or {}, data.get("augment") or {}
    policy = train.get("caption_policy")
    scale = train.get("crop_scale")
    switched_on = [name for name in ("horizontal_flip", "vertical_flip", "right_angle_rotations") if train.get(name)]
    return {
        "captions": policy if isinstance(policy, str) or policy is None else "weighted",
        "random crops, share of the area": None if scale is None else f"{scale[0]} to {scale[1]}",
        "flips and turns": ", ".join(switched_on).replace("_", " ") or "none",
        "colour jitter": ", ".join(map(str, augment["color_jitter"])) if any(augment.get("color_jitter", [])) else None,
        "stain jitter (HED)": augment.get("hed_jitter") or None,
        "stain normalisation": augment.get("stain_normalization"),
    }


def _start(run: RunFiles) -> str:
    model = run.config.get("model") or {}
    if known := base_model(run):
        return known
    architecture, pretrained = model.get("architecture"), model.get("pretrained")
    if model.get("source"):
        return "another model of the same owner"
    towers = [part for part in (model.get("image"), model.get("text")) if isinstance(part, Mapping)]
    if pretrained or any(tower.get("pretrained") for tower in towers):
        return " ".join(filter(None, [architecture, "pretrained weights"]))
    return " ".join(filter(None, [architecture, "random weights"]))


def _tuned(tuning: Mapping[str, Any], tower: str) -> str | None:
    how = tuning.get(tower)
    if how == "lora":
        return f"lora, rank {tuning.get('lora_rank')}, alpha {tuning.get('lora_alpha')}"
    last_n = tuning.get(f"{tower}_last_n")
    return how if last_n is None else f"{how}, {last_n} blocks"


def _class_name(config: Mapping[str, Any] | None) -> str | None:
    target = (config or {}).get("_target_")
    return None if target is None else str(target).rpartition(".")[2]


def results_section(scores: Sequence[Score], samples_seen: int, *, averaged: bool) -> str:
    """Every number of the exported weights beside the start's."""
    weights = "the averaged weights" if averaged else "the weights"
    if not scores:
        return f"Nothing was measured of {weights} after {samples_seen:,} samples."
    rows = [
        (
            score.evaluator,
            score.metric,
            "" if score.start is None else f"{score.start:.4f}",
            f"{score.value:.4f}",
            "" if score.interval is None else "{:.4f} to {:.4f}".format(*score.interval),
            "" if score.change is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*score.change),
        )
        for score in scores
    ]
    return (
        f"Measured of {weights} after {samples_seen:,} samples. Intervals are 95 % bootstrap percentiles; those of a "
        f"change resample start and trained model together.\n\n{table(RESULTS_HEADER, rows, numbers=4)}"
    )


def checks_section(comparisons: Sequence[ComparedExport]) -> str:
    """How far each library's reload was from the trained model, at export."""
    if not comparisons:
        return "The exported folder was not compared with the model."
    rows = [(c.library, c.what, f"{c.difference:.1e}", f"{c.limit:.0e}") for c in comparisons]
    return (
        "Each library loaded the exported folder back and encoded the same images and texts.\n\n"
        f"{table(['library', 'compared', 'largest difference', 'limit'], rows, numbers=2)}"
    )


def circumstances_section(run: RunFiles) -> str:
    """Versions and hardware of the run."""
    environment = run.environment
    packages = environment.get("packages") or {}
    entries = {
        "date": str(environment.get("time", ""))[:10] or None,
        "python": environment.get("python"),
        **{name: packages.get(name) for name in PACKAGES},
        "revision of the code": environment.get("git"),
        "processes": environment.get("world_size"),
        "GPUs": ", ".join(environment.get("gpus") or []) or "none",
        "CPU cores": environment.get("cpus"),
    }
    return facts(entries)


def _count(number: Any) -> Any:
    return f"{number:,}" if isinstance(number, int) else number
