"""Configs into the objects of a run, all of them checked; nothing is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from quiltnet.cli.clock import Clock, plan_clock
from quiltnet.cli.computing import computing
from quiltnet.cli.evaluators import check_monitored_split, make_evaluators
from quiltnet.cli.objective import make_objective
from quiltnet.cli.options import check_options, check_run_name
from quiltnet.cli.plan import run_plan
from quiltnet.cli.saving import check_saving
from quiltnet.cli.sweep import check_monitor, monitored, refuse_search
from quiltnet.cli.targets import check_targets
from quiltnet.cli.train_data import open_loader
from quiltnet.data.reading import PairLoader
from quiltnet.distributed import world_size
from quiltnet.evaluation.measuring import Evaluator
from quiltnet.model.adapters import apply_tuning, waiting
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.patch_dropout import set_patch_dropout
from quiltnet.training.alarms import check_alarm
from quiltnet.training.averaging import Averaging, check_averaging, evaluator_of
from quiltnet.training.batchnorm import check_adapting
from quiltnet.training.early_stopping import check_early_stopping
from quiltnet.training.engine import seed_everything
from quiltnet.training.gradcache import check_micro_batch_size, warn_of_batch_statistics
from quiltnet.training.objective import Objective
from quiltnet.training.optim import check_sharded
from quiltnet.training.placement import Placement, check_placement, check_towers
from quiltnet.training.precision import build_accelerator
from quiltnet.training.run_plan import plan_warnings
from quiltnet.training.thawing import check_thawing


@dataclass(frozen=True)
class Parts:
    """The objects of a run, made and checked; nothing is written yet."""

    accelerator: Accelerator
    model: ContrastiveModel
    waiting: dict[str, int]  # what trains from a count of samples on only
    averaging: Averaging | None
    loader: PairLoader
    clock: Clock
    evaluators: dict[str, Evaluator]
    monitor: str | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    objective: Objective
    placement: Placement
    computing: dict[str, Any]
    warnings: list[str]
    loggers: list[Any]
    config: dict[str, Any]


def make_parts(cfg: DictConfig) -> Parts:  # all ranks
    """Configs into objects."""
    _check_options(cfg)
    accelerator = build_accelerator(cfg.precision, deterministic=cfg.deterministic)
    placement = _check_step(cfg, accelerator)
    seed_everything(cfg.seed)
    model = instantiate(cfg.model, _convert_="all")
    check_towers(placement, model)
    tuning = instantiate(cfg.tuning, _convert_="all")
    apply_tuning(model, tuning)
    if cfg.patch_dropout:
        set_patch_dropout(model.clip, cfg.patch_dropout)
    if cfg.micro_batch_size is not None:
        warn_of_batch_statistics(model, cfg.micro_batch_size)
    if model.batchnorm == "adapted":
        check_adapting(model)
    loader = open_loader(cfg, model)
    clock = plan_clock(cfg, loader.samples_per_epoch)
    check_thawing(
        {"image": tuning.image_thaw_samples, "text": tuning.text_thaw_samples}, placement, clock.total_samples
    )
    objective = make_objective(cfg, model, accelerator)  # before the optimiser: it may thaw the model's bias
    spans = {"total_samples": clock.total_samples, "warmup_samples": clock.warmup_samples}
    monitor = _check_monitor(cfg)
    evaluators = make_evaluators(cfg, first=monitor and evaluator_of(monitor))
    check_monitored_split(monitor, evaluators)
    check_alarm(cfg.callbacks.alarm.metrics, evaluators)
    check_saving(cfg, monitor)
    check_early_stopping(cfg.callbacks.early_stopping.patience, monitor, clock.evaluate_every_samples)
    optimizer = instantiate(cfg.optim, model, _convert_="all")
    if placement.sharding == "fsdp":
        check_sharded(optimizer, accelerator.device)
    return Parts(
        accelerator=accelerator,
        model=model,
        waiting=waiting(model, tuning),
        averaging=_averaging(cfg, placement),
        loader=loader,
        clock=clock,
        evaluators=evaluators,
        monitor=monitor,
        optimizer=optimizer,
        schedule=instantiate(cfg.schedule, **spans),
        objective=objective,
        placement=placement,
        computing=computing(cfg, model, accelerator.device),
        warnings=plan_warnings(run_plan(cfg, model, optimizer, clock, loader.samples_per_epoch)),
        loggers=[],
        config=_resolved(cfg, clock),
    )


def _check_options(cfg: DictConfig) -> None:
    check_targets(cfg, cfg.get("allow_targets"))
    refuse_search(cfg)
    check_run_name(cfg, "first_try", "results go to outputs/first_try")
    check_options(cfg)


def _check_step(cfg: DictConfig, accelerator: Accelerator) -> Placement:
    """What a step cannot do on this machine is said before the data is touched."""
    if cfg.micro_batch_size is not None:
        check_micro_batch_size(cfg.micro_batch_size, cfg.global_batch_size, world_size())
    placement = instantiate(cfg.placement)
    check_placement(placement, accelerator, cfg.precision)
    return placement


def _averaging(cfg: DictConfig, placement: Placement) -> Averaging | None:
    if cfg.averaging.decay is None:
        return None
    averaging = Averaging(**cfg.averaging)
    check_averaging(averaging, placement.sharding)
    return averaging


def _check_monitor(cfg: DictConfig) -> str | None:
    monitor = monitored(cfg)
    if monitor is not None:
        check_monitor(monitor, cfg)
    return monitor


def _resolved(cfg: DictConfig, clock: Clock) -> dict[str, Any]:
    """The config as it will be written: everything said, in samples."""
    config = OmegaConf.to_container(cfg, resolve=True)
    spans = asdict(clock)
    config.update(epochs=None, total_samples=spans["total_samples"])
    config["schedule"].update(total_samples=spans["total_samples"], warmup_samples=spans["warmup_samples"])
    config["callbacks"].update({name: spans[name] for name in spans if name in config["callbacks"]})
    return config
