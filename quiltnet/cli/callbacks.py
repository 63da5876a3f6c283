"""What happens beside a run's steps, in the order in which it has to."""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig

from quiltnet.cli.parts import Parts
from quiltnet.cli.run_directory import RunDirectory
from quiltnet.cli.saving import make_saving
from quiltnet.cli.train_data import data_statistics, device_batches
from quiltnet.evaluation.comparison import lower_is_better
from quiltnet.evaluation.measuring import measure
from quiltnet.model.adapters import freeze_waiting
from quiltnet.model.patch_dropout import set_patch_dropout
from quiltnet.training.alarms import RegressionAlarm
from quiltnet.training.batchnorm import AdaptBatchNorm
from quiltnet.training.best_weights import RestoreBest
from quiltnet.training.callbacks import Evaluate, LogMetrics
from quiltnet.training.early_stopping import EarlyStopping
from quiltnet.training.engine import Callback, TrainState
from quiltnet.training.finite_check import FiniteCheck
from quiltnet.training.loggers import LoggerGroup
from quiltnet.training.patch_dropping import PatchDropping
from quiltnet.training.profiling import Profile
from quiltnet.training.quarantine import Quarantine
from quiltnet.training.stage import stage
from quiltnet.training.stopping import Stopping
from quiltnet.training.thawing import Thawing


def make_callbacks(
    cfg: DictConfig, parts: Parts, run: RunDirectory, logger: LoggerGroup, state: TrainState, stopping: Stopping
) -> tuple[list[Callback], Evaluate]:
    clock = parts.clock
    statistics = data_statistics(parts.loader, state.samples_seen, cfg.loss.get("duplicates"))
    log = LogMetrics(logger, clock.log_every_samples, parts.loader.samples_per_epoch, statistics, **parts.computing)
    quarantine = Quarantine(
        run.quarantine,
        logger,
        every_samples=(clock.log_every_samples, clock.checkpoint_every_samples),
        max_fraction=cfg.data.max_bad_fraction,
        missing=parts.loader.missing,
    )
    evaluate = Evaluate(
        partial(
            measure,
            evaluators=parts.evaluators,
            time_budget_s=cfg.callbacks.evaluation_budget_s,
            between=stopping.cut_evaluation,
            waiting=partial(stage, "evaluation data"),
        ),
        logger,
        every_samples=clock.evaluate_every_samples,
        results=run.results,
        evaluators={name: evaluator.describe() for name, evaluator in parts.evaluators.items()},
        monitor=parts.monitor,
    )
    # Last: when a checkpoint exists, so does all that was logged and measured before it.
    save = make_saving(cfg, run, evaluate, parts.monitor, clock.checkpoint_every_samples)
    finite = FiniteCheck(
        run.path / "nonfinite.jsonl",
        logger,
        [clock.log_every_samples, clock.checkpoint_every_samples],
        max_in_a_row=cfg.callbacks.max_nonfinite_steps,
    )
    callbacks = [finite, log, quarantine, evaluate]
    if parts.model.batchnorm == "adapted":
        first = partial(device_batches, cfg, parts.model, parts.loader, 0, state.accelerator.device)
        callbacks.append(AdaptBatchNorm(first))
    if cfg.callbacks.alarm.metrics:
        callbacks.append(RegressionAlarm(evaluate, logger, lower_is_better=lower_is_better, **cfg.callbacks.alarm))
    if cfg.callbacks.early_stopping.patience is not None:
        callbacks.append(_early_stopping(cfg, parts, run, evaluate))
    callbacks.append(save)
    if cfg.patch_dropout:
        until = round((1 - cfg.undropped_share) * clock.total_samples)
        callbacks.append(PatchDropping(partial(set_patch_dropout, parts.model.clip), cfg.patch_dropout, until))
    if parts.waiting:
        callbacks.append(Thawing(partial(freeze_waiting, parts.model, parts.waiting), parts.placement))
    if cfg.profile:
        callbacks.append(Profile(run.path / "profile"))
    if cfg.callbacks.keep_best:
        callbacks.append(RestoreBest(evaluate, run.checkpoints))
    return callbacks, evaluate


def _early_stopping(cfg: DictConfig, parts: Parts, run: RunDirectory, evaluate: Evaluate) -> EarlyStopping:
    options, is_lower = cfg.callbacks.early_stopping, lower_is_better(parts.monitor)
    return EarlyStopping(evaluate, run.metrics, parts.monitor, lower_is_better=is_lower, **options)
