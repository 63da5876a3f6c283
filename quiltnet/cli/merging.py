"""What ``quiltnet merge`` does: load, merge, measure, choose, export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from torch import Tensor

from quiltnet.cli.evaluate import feature_cache, tower_dtype
from quiltnet.cli.evaluators import make_evaluators
from quiltnet.cli.hydra_main import CONF_MODULE
from quiltnet.cli.merge import MergeRequest, Soup
from quiltnet.cli.merge_files import Goal, Merged, MergeResult, write_merge
from quiltnet.cli.options import check_values
from quiltnet.cli.tables import print_rows
from quiltnet.errors import UserError
from quiltnet.evaluation.measuring import Evaluator, measure
from quiltnet.evaluation.outcome import Outcome
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.folder import write_description
from quiltnet.release.exporting import export_open_clip
from quiltnet.release.hub import load_model
from quiltnet.release.whole_folder import whole_folder
from quiltnet.training.interpolation import check_same_architecture, greedy_soup, interpolate, uniform_soup
from quiltnet.training.precision import build_accelerator

MODEL_FOLDER = "model"
_PREPROCESSING = ("size", "mean", "std", "interpolation", "resize_mode")

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Bench:
    """One model that takes any weights, and all that measures it."""

    model: ContrastiveModel
    evaluators: Mapping[str, Evaluator]
    options: Mapping[str, Any]

    def measure(self, weights: Weights) -> dict[str, Outcome]:
        self.model.clip.load_state_dict(weights)
        return measure(self.model, self.evaluators, **self.options)


def run_merge(request: MergeRequest) -> None:
    """Merge, print the table, and leave ``request.out`` with all files or not at all."""
    cfg = _compose(request)
    evaluators = make_evaluators(cfg)
    goal = _check_goal(request, evaluators)
    accelerator = build_accelerator(cfg.precision)
    model = load_model(request.sources[0])
    _check_sources(request.sources, model)
    options = {"cache": feature_cache(cfg.feature_cache), "dtype": tower_dtype(cfg.precision)}
    bench = Bench(model.to(accelerator.device), evaluators, options)
    merge = _interpolate if request.alphas else _greedy if request.soup is Soup.greedy else _uniform
    merged, weights = merge(request, bench, goal)
    result = MergeResult(
        sources=request.sources,
        merged=merged,
        goal=goal,
        by_alpha=bool(request.alphas),
        facts={
            "soup": request.soup.value if request.soup else None,
            "precision": cfg.precision,
            "evaluators": {name: evaluator.describe() for name, evaluator in evaluators.items()},
        },
    )
    if evaluators:
        print_rows(result.table())
    if weights is not None:
        model.clip.load_state_dict(weights)
    _write(request.out, result, model if weights is not None else None)
    if weights is None:
        print(
            f"no model is exported: {' and '.join(goal.test_metrics)} is measured on a test set, which nothing may be "
            "chosen by. Choose by a validation set, or take one: --alpha 0.5"
        )
    print(f"results: {request.out}")


def _compose(request: MergeRequest) -> DictConfig:
    """The evaluation's config with the request's evaluators; Hydra's complaints are the door's business."""
    overrides = [f"evaluator=[{','.join(request.evaluators)}]", *request.overrides]
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        cfg = compose("eval", overrides=overrides)
    check_values(cfg)
    return cfg


def _check_goal(request: MergeRequest, evaluators: Mapping[str, Evaluator]) -> Goal | None:
    if request.target is None:
        return None
    for metric in filter(None, (request.target, request.general)):
        if metric.partition("/")[0] not in evaluators:
            known = ", ".join(evaluators) or "none; say --evaluator NAME"
            raise UserError(f"{metric} must be EVALUATOR/METRIC of an evaluator of this merge ({known})")
    goal = Goal(request.target, request.general, {name: evaluator.split for name, evaluator in evaluators.items()})
    if request.soup is Soup.greedy and goal.test_metrics:
        raise UserError(
            f"a greedy soup would be chosen by {' and '.join(goal.test_metrics)}, measured on a test set; choose by a "
            "validation set, or say --soup uniform"
        )
    return goal


def _check_sources(sources: tuple[str, ...], model: ContrastiveModel) -> None:
    """All are loaded once, before anything is measured: a wrong one must not wait for hours."""
    _check_finite(sources[0], model)
    for source in sources[1:]:
        other = load_model(source)
        _check_finite(source, other)
        check_same_architecture(model.clip.state_dict(), other.clip.state_dict(), (sources[0], source))
        for name, value in _facts(model).items():
            if value != _facts(other)[name]:
                raise UserError(
                    f"{sources[0]} and {source} compute differently, {name} is {value} and {_facts(other)[name]}; only "
                    "models that began from the same weights can be merged"
                )


def _check_finite(source: str, model: ContrastiveModel) -> None:
    """A run that diverged would spoil every mean that it is in."""
    broken = next((name for name, tensor in model.clip.state_dict().items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"the weights of {source} are not finite, {broken} is the first; merge the models without it")


def _facts(model: ContrastiveModel) -> dict[str, Any]:
    """What tensors do not show, and moves features."""
    preprocess_cfg = model.description.preprocess_cfg
    shown = {name: preprocess_cfg[name] for name in _PREPROCESSING if name in preprocess_cfg}
    shown = {name: tuple(value) if isinstance(value, list) else value for name, value in shown.items()}
    model_cfg = model.description.model_cfg
    context_length = model_cfg["text_cfg"].get("context_length")
    return {"quick_gelu": model_cfg.get("quick_gelu", False), "context_length": context_length, **shown}


def _interpolate(request: MergeRequest, bench: Bench, goal: Goal | None) -> tuple[list[Merged], Weights | None]:
    base, tuned = map(_load, request.sources)
    merged = []
    for alpha in request.alphas:
        merged.append(_measured(f"{alpha:g}", interpolate(base, tuned, alpha), bench, goal))
    if goal is not None and request.chooses and goal.test_metrics:
        return merged, None
    chosen = 0
    if request.chooses:  # of equals the nearest to the base
        chosen = max(range(len(merged)), key=lambda number: goal.value(merged[number]))
    merged[chosen] = merged[chosen].marked("exported")
    return merged, interpolate(base, tuned, request.alphas[chosen])


def _uniform(request: MergeRequest, bench: Bench, goal: Goal | None) -> tuple[list[Merged], Weights]:
    merged = [_measured(name, _load(name), bench, goal) for name in request.sources] if bench.evaluators else []
    weights = uniform_soup(map(_load, request.sources))
    soup = _measured(f"soup of {len(request.sources)}", weights, bench, goal)
    return [*merged, soup.marked("exported")], weights


def _greedy(request: MergeRequest, bench: Bench, goal: Goal) -> tuple[list[Merged], Weights]:
    tried: dict[str, Merged] = {}

    def score(name: str, weights: Weights) -> float:
        tried[name] = _measured(name, weights, bench, goal)
        return goal.value(tried[name])

    soup = greedy_soup(request.sources, _load, score)
    alone = [tried[name].marked("in the soup" if name in soup.kept else "") for name in soup.scores]
    last = tried[f"soup with {soup.kept[-1]}"] if len(soup.kept) > 1 else tried[soup.kept[0]]
    return [*alone, Merged(f"soup of {len(soup.kept)}", last.outcomes, "exported")], soup.weights


def _load(source: str) -> Weights:
    return load_model(source).clip.state_dict()


def _measured(name: str, weights: Weights, bench: Bench, goal: Goal | None) -> Merged:
    merged = Merged(name, bench.measure(weights) if bench.evaluators else {})
    if goal is not None:
        goal.check(merged)
    return merged


def _write(out: Path, result: MergeResult, model: ContrastiveModel | None) -> None:
    with whole_folder(out) as unfinished:
        if model is not None:
            export_open_clip(model, unfinished / MODEL_FOLDER)
            # A Hugging Face tower is found by absolute path, which the move changes.
            write_description(model, unfinished / MODEL_FOLDER, final=out / MODEL_FOLDER)
        write_merge(unfinished, result)
