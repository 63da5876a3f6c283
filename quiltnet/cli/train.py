"""``train.py`` and ``quiltnet train``: configs into objects, a run directory, a run."""

from __future__ import annotations

import math
import re
import shutil
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from quiltnet.cli.computing import computing
from quiltnet.cli.evaluators import check_monitored_split, make_evaluators
from quiltnet.cli.objective import make_objective
from quiltnet.cli.options import check_options
from quiltnet.cli.run_directory import RunDirectory, check_run_directory, create_run_directory
from quiltnet.cli.sweep import is_trial, monitored, trial_directory
from quiltnet.cli.tables import print_before_and_after
from quiltnet.cli.train_data import data_statistics, device_batches, open_loader
from quiltnet.data.reading import PairLoader
from quiltnet.distributed import barrier, is_main, on_main, rank, world_size
from quiltnet.errors import UserError
from quiltnet.evaluation.measuring import Evaluator, measure
from quiltnet.evaluation.outcome import paired_differences
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.folder import write_description
from quiltnet.model.patch_dropout import set_patch_dropout
from quiltnet.training.callbacks import Evaluate, LogMetrics, Quarantine, SaveCheckpoint
from quiltnet.training.checkpoint import forget_after, load_checkpoint
from quiltnet.training.engine import Callback, TrainState, fit, seed_everything, start_training
from quiltnet.training.finite_check import FiniteCheck
from quiltnet.training.gradcache import check_micro_batch_size, warn_of_batch_statistics
from quiltnet.training.loggers import ConsoleLogger, JsonlLogger, LoggerGroup
from quiltnet.training.objective import Objective
from quiltnet.training.parameter_groups import group_table
from quiltnet.training.patch_dropping import PatchDropping
from quiltnet.training.placement import Placement, check_placement, check_towers
from quiltnet.training.precision import build_accelerator
from quiltnet.training.profiling import Profile

_STEPS_PER_LOG_LINE = 10
_WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Clock:
    """All durations of a run, in pairs over all ranks."""

    total_samples: int
    warmup_samples: int
    log_every_samples: int
    evaluate_every_samples: int | None
    checkpoint_every_samples: int


@dataclass(frozen=True)
class Parts:
    """The objects of a run, made and checked; nothing is written yet."""

    accelerator: Accelerator
    model: ContrastiveModel
    loader: PairLoader
    clock: Clock
    evaluators: dict[str, Evaluator]
    monitor: str | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    objective: Objective
    placement: Placement
    computing: dict[str, Any]
    loggers: list[Any]
    config: dict[str, Any]


def run_train(cfg: DictConfig) -> float | None:  # all ranks
    """One run from its config; everything that can be wrong is found out before anything is written.

    Returns:
        The monitored metric, for a sweep; ``None`` where nothing is monitored.
    """
    parts = make_parts(cfg)
    run = _enter_run_directory(cfg, parts)
    state = _start_training(cfg, parts, run)
    logger = _start_loggers(parts, str(cfg.run_name), run, state)
    callbacks, evaluate = _make_callbacks(cfg, parts, run, logger, state)
    try:
        with closing(logger), closing(parts.loader):
            device = state.accelerator.device
            fit(
                state,
                device_batches(cfg, parts.model, parts.loader, state.samples_seen, device),
                parts.objective,
                callbacks,
                total_samples=parts.clock.total_samples,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size,
            )
    except UserError:
        if state.samples_seen == 0 and is_main():  # found by the first evaluation: nothing was trained
            shutil.rmtree(run.path)
        raise
    if is_main():
        changes = paired_differences(evaluate.last_outcomes, evaluate.start_outcomes)
        intervals = {name: (change.low, change.high) for name, change in changes.items()}
        print_before_and_after(evaluate.start, evaluate.last, intervals)
        print(f"run directory: {run.path}")
    return evaluate.last[parts.monitor] if parts.monitor else None


def _start_training(cfg: DictConfig, parts: Parts, run: RunDirectory) -> TrainState:  # all ranks
    groups = group_table(parts.optimizer.param_groups)  # before they are sharded, and rates moved
    torch.manual_seed(cfg.seed + rank())  # so that dropout differs between ranks
    state = start_training(
        parts.model,
        parts.optimizer,
        parts.schedule,
        global_batch_size=cfg.global_batch_size,
        accelerator=parts.accelerator,
        placement=parts.placement,
    )
    if run.checkpoint is not None:
        state.load_state_dict(load_checkpoint(run.checkpoint))  # all ranks read it: the disk must be shared
    barrier()
    if is_main():
        forget_after(run.checkpoints, state.samples_seen)
        (run.path / "parameter_groups.txt").write_text(groups + "\n", encoding="utf-8")
        _print_plan(run, state, parts.clock, parts.loader)
        print(groups, flush=True)
    return state


def make_parts(cfg: DictConfig) -> Parts:  # all ranks
    """Configs into objects."""
    _check_options(cfg)
    accelerator = build_accelerator(cfg.precision, deterministic=cfg.deterministic)
    placement = _check_step(cfg, accelerator)
    seed_everything(cfg.seed)
    model = instantiate(cfg.model, _convert_="all")
    check_towers(placement, model)
    if cfg.patch_dropout:
        set_patch_dropout(model.clip, cfg.patch_dropout)
    if cfg.micro_batch_size is not None:
        warn_of_batch_statistics(model, cfg.micro_batch_size)
    loader = open_loader(cfg, model)
    clock = plan_clock(cfg, loader.samples_per_epoch)
    objective = make_objective(cfg, model, accelerator)  # before the optimiser: it may thaw the model's bias
    spans = {"total_samples": clock.total_samples, "warmup_samples": clock.warmup_samples}
    monitor = _check_monitor(cfg)
    evaluators = make_evaluators(cfg, first=monitor and monitor.partition("/")[0])
    check_monitored_split(monitor, evaluators)
    return Parts(
        accelerator=accelerator,
        model=model,
        loader=loader,
        clock=clock,
        evaluators=evaluators,
        monitor=monitor,
        optimizer=instantiate(cfg.optim, model, _convert_="all"),
        schedule=instantiate(cfg.schedule, **spans),
        objective=objective,
        placement=placement,
        computing=computing(cfg, model, accelerator.device),
        loggers=[],
        config=_resolved(cfg, clock),
    )


def plan_clock(cfg: DictConfig, samples_per_epoch: int) -> Clock:
    """Epochs and shares become samples; the total is rounded up to whole batches."""
    if (cfg.epochs is None) == (cfg.total_samples is None):
        raise UserError("say how long to train, by one of epochs=10 and total_samples=1000000")
    wanted = cfg.total_samples if cfg.total_samples is not None else cfg.epochs * samples_per_epoch
    if not wanted > 0:
        raise UserError(f"the run would see {wanted} samples; give a positive number of epochs or total_samples")
    total_samples = math.ceil(wanted / cfg.global_batch_size) * cfg.global_batch_size
    warmup_samples = cfg.schedule.get("warmup_samples")
    callbacks = cfg.callbacks
    return Clock(
        total_samples=total_samples,
        warmup_samples=round(_WARMUP_SHARE * total_samples) if warmup_samples is None else warmup_samples,
        log_every_samples=callbacks.log_every_samples or _STEPS_PER_LOG_LINE * cfg.global_batch_size,
        evaluate_every_samples=callbacks.evaluate_every_samples,
        checkpoint_every_samples=callbacks.checkpoint_every_samples or samples_per_epoch,
    )


def _check_options(cfg: DictConfig) -> None:
    if OmegaConf.is_missing(cfg, "run_name"):
        raise UserError("run_name is not set; say run_name=first_try, and results go to outputs/first_try")
    if not re.fullmatch(r"\w[\w.+=,-]*", str(cfg.run_name)):
        raise UserError(f"run_name={cfg.run_name!r} is a folder's name: letters, digits and . _ + = , - only")
    check_options(cfg)


def _check_step(cfg: DictConfig, accelerator: Accelerator) -> Placement:
    """What a step cannot do on this machine is said before the data is touched."""
    if cfg.micro_batch_size is not None:
        check_micro_batch_size(cfg.micro_batch_size, cfg.global_batch_size, world_size())
    placement = instantiate(cfg.placement)
    check_placement(placement, accelerator, cfg.precision)
    return placement


def _check_monitor(cfg: DictConfig) -> str | None:
    monitor = monitored(cfg)
    if monitor is not None and monitor.partition("/")[0] not in cfg.evaluator:
        known = ", ".join(cfg.evaluator) or "none"
        raise UserError(f"monitor={monitor} must be evaluator/metric of one of the run's evaluators ({known})")
    return monitor


def _resolved(cfg: DictConfig, clock: Clock) -> dict[str, Any]:
    """The config as it will be written: everything said, in samples."""
    config = OmegaConf.to_container(cfg, resolve=True)
    spans = asdict(clock)
    config.update(epochs=None, total_samples=spans["total_samples"])
    config["schedule"].update(total_samples=spans["total_samples"], warmup_samples=spans["warmup_samples"])
    config["callbacks"].update({name: spans[name] for name in spans if name in config["callbacks"]})
    return config


def _enter_run_directory(cfg: DictConfig, parts: Parts) -> RunDirectory:  # all ranks
    """Rank 0 decides and makes it; all ranks go on, or stop with the same message."""
    path = trial_directory(cfg) if is_trial() else Path(cfg.output_dir) / str(cfg.run_name)
    data = parts.loader.describe()

    def enter() -> RunDirectory:
        run = check_run_directory(path, parts.config, data, resume=cfg.resume, overwrite=cfg.overwrite)
        parts.loggers.extend(instantiate(entry) for entry in cfg.logger.values())
        create_run_directory(run, parts.config, data)
        write_description(parts.model, run.model)
        return run

    return on_main(enter)


def _start_loggers(parts: Parts, name: str, run: RunDirectory, state: TrainState) -> LoggerGroup:
    if not is_main():
        return LoggerGroup()
    resumed_at = state.samples_seen if run.continues else None
    for logger in parts.loggers:
        logger.start(run.path, name, parts.config, resumed_at)
    console = ConsoleLogger(parts.clock.total_samples, state.samples_seen)
    return LoggerGroup([JsonlLogger(run.metrics, resumed_at), console, *parts.loggers])


def _make_callbacks(
    cfg: DictConfig, parts: Parts, run: RunDirectory, logger: LoggerGroup, state: TrainState
) -> tuple[list[Callback], Evaluate]:
    clock = parts.clock
    statistics = data_statistics(parts.loader, state.samples_seen)
    log = LogMetrics(logger, clock.log_every_samples, parts.loader.samples_per_epoch, statistics, **parts.computing)
    quarantine = Quarantine(
        run.quarantine,
        logger,
        every_samples=(clock.log_every_samples, clock.checkpoint_every_samples),
        max_fraction=cfg.data.max_bad_fraction,
        missing=parts.loader.missing,
    )
    evaluate = Evaluate(
        partial(measure, evaluators=parts.evaluators, time_budget_s=cfg.callbacks.evaluation_budget_s),
        logger,
        every_samples=clock.evaluate_every_samples,
        results=run.results,
        evaluators={name: evaluator.describe() for name, evaluator in parts.evaluators.items()},
        monitor=parts.monitor,
    )
    # Last: when a checkpoint exists, so does all that was logged and measured before it.
    save = SaveCheckpoint(run.checkpoints, clock.checkpoint_every_samples, cfg.callbacks.keep_checkpoints)
    finite = FiniteCheck([clock.log_every_samples, clock.checkpoint_every_samples])
    callbacks = [finite, log, quarantine, evaluate, save]
    if cfg.patch_dropout:
        until = round((1 - cfg.undropped_share) * clock.total_samples)
        callbacks.append(PatchDropping(partial(set_patch_dropout, parts.model.clip), cfg.patch_dropout, until))
    if cfg.profile:
        callbacks.append(Profile(run.path / "profile"))
    return callbacks, evaluate


def _print_plan(run: RunDirectory, state: TrainState, clock: Clock, loader: PairLoader) -> None:
    parameters = sum(p.numel() for p in state.unwrapped.parameters())
    trained = sum(p.numel() for p in state.unwrapped.parameters() if p.requires_grad)
    begins = f"continues {run.checkpoint}" if run.checkpoint else "begins"
    print(
        f"{run.path} {begins}\n"
        f"  model    {parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained\n"
        f"  data     {loader.samples_per_epoch:,} samples an epoch\n"
        f"  clock    {clock.total_samples:,} samples ({clock.total_samples / loader.samples_per_epoch:.2f} epochs, "
        f"{clock.total_samples // state.global_batch_size:,} steps of {state.global_batch_size}), "
        f"warm-up {clock.warmup_samples:,}\n"
        f"  machine  {world_size()} process(es) on {state.accelerator.device.type}, "
        f"{state.accelerator.mixed_precision.replace('no', 'fp32')}",
        flush=True,
    )
