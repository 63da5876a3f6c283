"""The head of a model card: what the hub sorts models by, and their results as the hub's own classes write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import open_clip
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from quiltnet.errors import UserError
from quiltnet.release.card_scores import Score
from quiltnet.release.hub import HUB_PREFIX
from quiltnet.release.run_files import RunFiles

TAGS = ["zero-shot-image-classification", "clip", "vision", "language", "histopathology", "histology", "medical"]
TASKS = {
    "zeroshot": "zero-shot-image-classification",
    "retrieval": "image-text-retrieval",
    "val": "image-text-retrieval",
}
OTHER_TASK = "image-classification"  # of features, by probes and neighbours
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# What is made anew with every card; other fields of an earlier one are its owner's.
GENERATED = {"license", "library_name", "pipeline_tag", "tags", "base_model", "model_name", "model-index"}


def check_license(license: str) -> None:
    """Raises UserError where ``license`` has not the form of the hub's identifiers."""
    if not _LICENSE.fullmatch(license):
        raise UserError(
            f"license={license!r} is no identifier of the hub's, which are written like mit, apache-2.0 or "
            "cc-by-nc-4.0; other stands for a licence of your own"
        )


def metadata(
    run: RunFiles | None, name: str, scores: Sequence[Score], *, license: str | None, libraries: list[str]
) -> ModelCardData:
    """The card's metadata.

    Args:
        name: what the results are filed under.
        scores: of the exported weights.
        libraries: those that load the folder, by the hub's names; the first is the card's, all become tags.
    """
    results = [_eval_result(score, run) for score in scores]
    return ModelCardData(
        license=license,
        library_name=libraries[0] if libraries else None,
        pipeline_tag="zero-shot-image-classification",
        tags=[*TAGS, *libraries],
        base_model=base_model(run),
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_result(score: Score, run: RunFiles) -> EvalResult:
    interval = None if score.interval is None else {"interval_95": [float(f"{end:.6g}") for end in score.interval]}
    described = run.results.get("evaluators", {}).get(score.evaluator, {})
    split = described.get("dataset", described).get("split")
    kind = score.evaluator.partition("_")[0]
    return EvalResult(
        task_type=TASKS.get(kind, OTHER_TASK),
        dataset_type=score.evaluator,
        dataset_name=score.evaluator,
        dataset_split=None if split is None else str(split),
        metric_type=score.metric,
        metric_name=score.metric,
        metric_value=float(f"{score.value:.6g}"),
        metric_args=interval,
    )


def base_model(run: RunFiles | None) -> str | None:
    """The repository that the run's start came from, where it is one of the hub's."""
    model = {} if run is None else run.config.get("model", {})
    source = str(model.get("source") or "")
    if source.startswith(HUB_PREFIX):
        return _repository(source.removeprefix(HUB_PREFIX))
    architecture, _, tag = source.partition(":")
    architecture, tag = model.get("architecture", architecture), model.get("pretrained", tag)
    if not (isinstance(architecture, str) and isinstance(tag, str)):
        return None
    known = open_clip.get_pretrained_cfg(architecture, tag)
    return _repository(str(known.get("hf_hub") or "").strip("/"))


def _repository(name: str) -> str | None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name or None
