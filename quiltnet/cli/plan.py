"""What a run is about to do, as ``plan_warnings`` judges it, from its config and its objects."""

from __future__ import annotations

from omegaconf import DictConfig
from torch.optim import Optimizer

from quiltnet.cli.clock import Clock
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training.run_plan import RunPlan, TowerPlan


def run_plan(
    cfg: DictConfig, model: ContrastiveModel, optimizer: Optimizer, clock: Clock, samples_per_epoch: int
) -> RunPlan:
    """The plan of a run whose optimiser has not made a step."""
    return RunPlan(
        total_samples=clock.total_samples,
        warmup_samples=clock.warmup_samples,
        samples_per_epoch=samples_per_epoch,
        global_batch_size=cfg.global_batch_size,
        optimizer=cfg.optim.get("name", "adamw").lower(),
        towers={tower: _tower_plan(cfg, model, optimizer, tower) for tower in ("image", "text")},
    )


def _tower_plan(cfg: DictConfig, model: ContrastiveModel, optimizer: Optimizer, tower: str) -> TowerPlan:
    parameters = dict(model.named_parameters())
    names = [name for name, (kind, _, _) in model.parameter_layers().items() if kind == tower]
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    learning = {name: rates[id(parameters[name])] for name in names if id(parameters[name]) in rates}
    # A projection may learn faster than what is pretrained; what is usual is said of the latter, where it learns.
    inner = [rate for name, rate in learning.items() if name not in model.projection_names()]
    return TowerPlan(
        tuning=cfg.tuning[tower],
        rate=max(inner or learning.values(), default=0.0),
        parameters=sum(parameters[name].numel() for name in names),
        pretrained=_is_pretrained(cfg.model, tower),
    )


def _is_pretrained(model: DictConfig, tower: str) -> bool:
    """Whether the tower's weights come from somewhere: with an earlier model, the whole model's, or its own."""
    own = model.get(tower) or {}
    return "source" in model or model.get("pretrained") is not None or bool(own.get("pretrained"))
