"""``eval.py`` and ``quiltnet eval``: any models, any evaluators, one table."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from quiltnet.cli.run_directory import check_writable
from quiltnet.cli.tables import print_columns
from quiltnet.distributed import is_main
from quiltnet.errors import UserError
from quiltnet.release.hub import load_model
from quiltnet.training.callbacks import evaluate
from quiltnet.training.precision import build_accelerator


def run_eval(cfg: DictConfig) -> None:
    """Evaluate one model or several; all ranks share the work, rank 0 prints and writes."""
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise UserError("checkpoint is not set; say checkpoint=outputs/my_run, or ViT-B-32:openai, or a list of them")
    if not cfg.evaluator:
        raise UserError("no evaluator is chosen; say evaluator=[zeroshot_lc25000,val_pairs] (conf/evaluator/ has them)")
    output = Path(cfg.output) if cfg.output else None
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"output={output} must be a file in a folder that exists")
    if output is not None:
        check_writable(output)
    sources = list(cfg.checkpoint) if OmegaConf.is_list(cfg.checkpoint) else [cfg.checkpoint]
    accelerator = build_accelerator()
    evaluators = {name: instantiate(evaluator, _convert_="all") for name, evaluator in cfg.evaluator.items()}
    numbers = {source: evaluate(load_model(source).to(accelerator.device), evaluators) for source in sources}
    if is_main():
        print_columns(numbers)
        if output is not None:
            described = {name: evaluator.describe() for name, evaluator in evaluators.items()}
            content = {"checkpoints": numbers, "evaluators": described}
            output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
