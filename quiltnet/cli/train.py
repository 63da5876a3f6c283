"""``train.py`` and ``quiltnet train``: a run from its config, in its directory."""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from quiltnet.cli.callbacks import make_callbacks
from quiltnet.cli.clock import Clock
from quiltnet.cli.parts import Parts, make_parts
from quiltnet.cli.run_directory import RunDirectory, check_run_directory, create_run_directory, delete_run_directory
from quiltnet.cli.run_lock import go_on_after_restart, own, run_lock
from quiltnet.cli.sweep import is_trial, run_label, trial_directory
from quiltnet.cli.tables import print_before_and_after
from quiltnet.cli.train_data import device_batches
from quiltnet.data.reading import PairLoader
from quiltnet.distributed import barrier, is_main, on_main, rank, world_size
from quiltnet.errors import UserError
from quiltnet.evaluation.outcome import paired_differences
from quiltnet.model.adapters import freeze_waiting
from quiltnet.model.folder import write_description
from quiltnet.release.run_files import add_changes
from quiltnet.training.checkpoint import forget_after, load_checkpoint, shapes_and_trained
from quiltnet.training.engine import TrainState, fit, start_training
from quiltnet.training.full_state import check_fits, with_settings_of
from quiltnet.training.loggers import ConsoleLogger, JsonlLogger, LoggerGroup
from quiltnet.training.parameter_groups import group_table
from quiltnet.training.stall_watch import StallWatch
from quiltnet.training.stopping import RunStopped, Stopping

log = logging.getLogger(__name__)


def run_train(cfg: DictConfig) -> float | None:  # all ranks
    """One run from its config; everything that can be wrong is found out before anything is written.

    Returns:
        The monitored metric, for a sweep; ``None`` where nothing is monitored.
    """
    parts = make_parts(cfg)
    path = trial_directory(cfg) if is_trial() else Path(cfg.output_dir) / str(cfg.run_name)
    with run_lock(path):
        go_on_after_restart(cfg, path)
        run = _enter_run_directory(cfg, parts, path)
        own(path)
        return _train(cfg, parts, run)


def _train(cfg: DictConfig, parts: Parts, run: RunDirectory) -> float | None:  # all ranks
    state = _start_training(cfg, parts, run)
    logger = _start_loggers(parts, run_label(cfg), run, state)
    stopping = Stopping()
    callbacks, evaluate = make_callbacks(cfg, parts, run, logger, state, stopping)
    watch = StallWatch(cfg.callbacks.stall_timeout_s, lambda: f"step {state.step + 1}")
    try:
        with stopping, closing(logger), closing(parts.loader), watch:
            device = state.accelerator.device
            fit(
                state,
                device_batches(cfg, parts.model, parts.loader, state.samples_seen, device),
                parts.objective,
                callbacks,
                total_samples=parts.clock.total_samples,
                max_grad_norm=cfg.max_grad_norm,
                micro_batch_size=cfg.micro_batch_size,
                stopping=stopping,
            )
    except RunStopped:
        if is_main():
            at = f"{stopping.signal_name} after {state.samples_seen:,} of {parts.clock.total_samples:,} samples"
            print(f"stopped by {at}, saved in {run.path}; resume=auto goes on", file=sys.stderr, flush=True)
        raise
    except UserError:
        if state.samples_seen == 0 and is_main():  # found by the first evaluation: nothing was trained
            delete_run_directory(run.path)
        raise
    if is_main():
        changes = paired_differences(evaluate.final_outcomes, evaluate.start_outcomes)
        intervals = {name: (change.low, change.high) for name, change in changes.items()}
        print_before_and_after(evaluate.start, evaluate.final, intervals)
        if evaluate.best:
            print(f"after: the best checkpoint, of {evaluate.best['samples_seen']:,} samples")
        if changes:
            add_changes(run.results, {name: (change.value, *intervals[name]) for name, change in changes.items()})
        print(f"run directory: {run.path}")
    return evaluate.final[parts.monitor] if parts.monitor else None


def _start_training(cfg: DictConfig, parts: Parts, run: RunDirectory) -> TrainState:  # all ranks
    groups = group_table(parts.optimizer.param_groups, parts.model)  # before they are sharded, and rates moved
    freeze_waiting(parts.model, parts.waiting, 0)  # a resumed run thaws what is due before its first step
    torch.manual_seed(cfg.seed + rank())  # so that dropout differs between ranks
    state = start_training(
        parts.model,
        parts.optimizer,
        parts.schedule,
        global_batch_size=cfg.global_batch_size,
        accelerator=parts.accelerator,
        placement=parts.placement,
        averaging=parts.averaging,
    )
    if run.checkpoint is not None:
        saved = load_checkpoint(run.checkpoint)  # all ranks read it: the disk must be shared
        if cfg.allow_changes:
            saved["optimizer"] = with_settings_of(state.optimizer.optimizer, state.model, saved["optimizer"])
        state.load_state_dict(saved)
    barrier()
    if is_main():
        forget_after(run.checkpoints, state.samples_seen)
        (run.path / "parameter_groups.txt").write_text(groups + "\n", encoding="utf-8")
        _print_plan(run, state, parts.clock, parts.loader)
        print(groups, flush=True)
        for warning in parts.warnings:
            log.warning(warning)
    return state


def _enter_run_directory(cfg: DictConfig, parts: Parts, path: Path) -> RunDirectory:  # all ranks
    """Rank 0 decides and makes it; all ranks go on, or stop with the same message."""
    data = parts.loader.describe()

    def enter() -> RunDirectory:
        run = check_run_directory(
            path, parts.config, data, resume=cfg.resume, overwrite=cfg.overwrite, allow_changes=cfg.allow_changes
        )
        if run.checkpoint is not None:
            check_fits(parts.model, parts.optimizer, *shapes_and_trained(run.checkpoint))
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
