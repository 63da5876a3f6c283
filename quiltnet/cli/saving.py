"""The options about checkpoints, into the callback that makes them."""

from __future__ import annotations

from omegaconf import DictConfig

from quiltnet.cli.run_directory import RunDirectory
from quiltnet.cli.sweep import run_label
from quiltnet.distributed import is_main
from quiltnet.errors import UserError
from quiltnet.evaluation.comparison import lower_is_better
from quiltnet.release.run_files import CONFIG_NAME, ENVIRONMENT_NAME
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.checkpoint_copies import CheckpointCopies, check_copies_url
from quiltnet.training.retention import Retention
from quiltnet.training.saving import SaveCheckpoint


def check_saving(cfg: DictConfig, monitor: str | None) -> None:
    """Before anything is written.

    Raises:
        UserError: there is nothing to find the best checkpoint by, or copies could not go where they should.
    """
    if cfg.callbacks.keep_best and monitor is None:
        raise UserError(
            f"callbacks.keep_best={cfg.callbacks.keep_best} needs a metric to find the best by: say "
            "monitor=evaluator/metric, or evaluator=[val_pairs] for monitor=val_pairs/loss"
        )
    if cfg.callbacks.copy_checkpoints_to is not None:
        check_copies_url(cfg.callbacks.copy_checkpoints_to)


def make_saving(
    cfg: DictConfig, run: RunDirectory, evaluate: Evaluate, monitor: str | None, every_samples: int
) -> SaveCheckpoint:
    """Args: all as they came out of ``cfg``."""
    options = cfg.callbacks
    return SaveCheckpoint(
        run.checkpoints,
        every_samples,
        Retention(options.keep_checkpoints, options.keep_best, options.keep_every_samples),
        evaluate=evaluate,
        monitor=monitor,
        lower_is_better=monitor is not None and lower_is_better(monitor),
        on_failure=options.on_save_failure,
        copies=_start_copies(cfg, run),
    )


def _start_copies(cfg: DictConfig, run: RunDirectory) -> CheckpointCopies | None:
    """With what a checkpoint needs to be loaded or continued: the copy is a run directory, too."""
    if cfg.callbacks.copy_checkpoints_to is None or not is_main():
        return None
    copies = CheckpointCopies(run.path, f"{cfg.callbacks.copy_checkpoints_to.rstrip('/')}/{run_label(cfg)}")
    for path in (run.path / CONFIG_NAME, run.path / ENVIRONMENT_NAME, run.model):
        copies.copy(path)
    return copies
