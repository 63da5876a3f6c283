"""``eval.py`` and ``quiltnet eval``: any models, any evaluators, one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from quiltnet.cli.comparison_files import check_output, write_comparison
from quiltnet.cli.evaluators import make_evaluators
from quiltnet.cli.options import check_values
from quiltnet.cli.tables import print_rows
from quiltnet.cli.targets import check_targets
from quiltnet.data.tar_index import cache_folder
from quiltnet.distributed import is_main, on_main
from quiltnet.errors import UserError
from quiltnet.evaluation.comparison import Comparison
from quiltnet.evaluation.feature_cache import FeatureCache
from quiltnet.evaluation.measuring import measure
from quiltnet.release.hub import load_model
from quiltnet.training.precision import build_accelerator


def run_eval(cfg: DictConfig) -> None:  # all ranks
    """Evaluate one model or several; all ranks share the work, rank 0 prints and writes."""
    check_targets(cfg, cfg.get("allow_targets"))
    sources = _sources(cfg)
    if not cfg.evaluator:
        raise UserError("no evaluator is chosen; say evaluator=[zeroshot_lc25000,val_pairs] (conf/evaluator/ has them)")
    check_values(cfg)
    output = Path(cfg.output) if cfg.output is not None else None
    if output is not None:
        on_main(lambda: check_output(output, overwrite=cfg.overwrite))
    accelerator = build_accelerator(cfg.precision)
    evaluators = make_evaluators(cfg)
    models = {name: load_model(source) for name, source in sources.items()}  # all: a wrong name must not wait for hours
    dtype = tower_dtype(cfg.precision)
    outcomes, described = {}, {}
    for name, model in models.items():
        model.to(accelerator.device)
        outcomes[name] = measure(model, evaluators, cache=feature_cache(cfg.feature_cache), dtype=dtype)
        described[name] = {"source": sources[name], **model.describe()}
        model.cpu()
    if is_main():
        comparison = Comparison(outcomes)
        _print(comparison)
        if output is not None:
            choices = {
                "precision": cfg.precision,
                "models": described,
                "evaluators": {name: evaluator.describe() for name, evaluator in evaluators.items()},
            }
            write_comparison(output, comparison, choices, chart_metric=cfg.chart_metric)
            print(f"results: {output}")


def _sources(cfg: DictConfig) -> dict[str, str]:
    """Name in tables and charts -> what to load."""
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise UserError("checkpoint is not set; say checkpoint=outputs/my_run, or ViT-B-32:openai, or a list of them")
    given: Any = OmegaConf.to_container(cfg)["checkpoint"]
    if isinstance(given, Mapping):
        sources = {str(name): source for name, source in given.items()}
    else:
        listed = given if isinstance(given, list) else [given]
        if len(set(listed)) < len(listed):
            raise UserError(f"checkpoint={listed} names a model twice; give each once")
        sources = {str(source): source for source in listed}
    wrong = [source for source in sources.values() if not isinstance(source, str)]
    if wrong or not sources:
        raise UserError(
            f"checkpoint={given} must name models: one, a list [a,b], or names of your own {{base: a, ours: b}}"
        )
    return sources


def tower_dtype(precision: str) -> torch.dtype:
    """What the towers compute in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def feature_cache(folder: str | None) -> FeatureCache | None:
    """Where features are kept between evaluations, by the option ``feature_cache``."""
    if folder is None:
        return None
    return FeatureCache(cache_folder() / "features" if folder == "auto" else folder)


def _print(comparison: Comparison) -> None:
    print_rows(comparison.value_table())
    differences = comparison.difference_table()
    if len(differences) > 1:
        print(f"difference to {comparison.baseline}, paired on the same items (* where the 95 % interval leaves 0 out)")
        print_rows(differences)
