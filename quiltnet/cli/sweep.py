"""The table at the end of ``python train.py -m …``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from quiltnet.cli.tables import print_trials
from quiltnet.errors import UserError, first_line
from quiltnet.redaction import redact, redact_command

DEFAULT_MONITOR = "val_pairs/loss"
_OUTCOMES = "trial-[0-9]*.json"


def is_trial() -> bool:
    """Whether this run is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def trial_directory(cfg: DictConfig) -> Path:
    """``outputs/<run_name>/trial-000``: a directory for each trial, below that of the sweep."""
    return Path(cfg.output_dir) / str(cfg.run_name) / f"trial-{HydraConfig.get().job.num:03d}"


def run_label(cfg: DictConfig) -> str:
    """What trackers call the run: its name; of a trial ``rates/trial-000``, the sweep's before it."""
    return "/".join(trial_directory(cfg).parts[-2:]) if is_trial() else str(cfg.run_name)


def refuse_search(cfg: DictConfig) -> None:
    """Raises UserError for a run that was given what only ``quiltnet sweep`` understands."""
    if "search" in cfg:
        raise UserError("a sweep file with `search:`, such as sweep=optuna, is for `quiltnet sweep`, not for one run")


def become_ranks() -> None:
    """Where a launcher's job has several tasks, they are the ranks of one trial: say so as torchrun would."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit.helpers import TorchDistributedEnvironment

    job = TorchDistributedEnvironment()
    if job.world_size > 1:
        job.export(set_cuda_visible_devices=False)


def monitored(cfg: DictConfig) -> str | None:
    """The metric that trials are compared by: ``monitor``, or the held-out loss where it is measured."""
    return cfg.monitor or (DEFAULT_MONITOR if "val_pairs" in cfg.evaluator else None)


def check_monitor(monitor: str, cfg: DictConfig, *, names_metric: bool = False) -> None:
    """Raises UserError where it is of none of the run's evaluators.

    Args:
        names_metric: also where it says no metric; a run says later, and better, which there are.
    """
    from quiltnet.training.averaging import evaluator_of

    if evaluator_of(monitor) not in cfg.evaluator or (names_metric and "/" not in monitor):
        known = ", ".join(cfg.evaluator) or "none"
        raise UserError(f"monitor={monitor} must be evaluator/metric of one of the run's evaluators ({known})")


class SweepStart(Callback):
    """Where Hydra's sweep begins, in the process that launches its trials: they may run in others."""

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if OmegaConf.is_missing(config, "run_name"):  # forgotten; or swept over, and each trial has its own folder
            return
        SweepStart.folder = Path(config.output_dir) / str(config.run_name)
        for earlier in SweepStart.folder.glob(_OUTCOMES):
            earlier.unlink()


class Trials:
    """What came of each trial, as a file beside its directory; one that failed is a row that says so."""

    def __init__(self) -> None:
        self._files: list[Path] = []

    def add(self, cfg: DictConfig, outcome: float | Exception | None) -> None:
        if isinstance(outcome, Exception):
            text = f"failed: {redact(_cause(outcome))}"
        else:
            text = "done" if outcome is None else f"{outcome:.4f}"
        trial = trial_directory(cfg)
        file = trial.with_name(f"{trial.name}.json")
        row = {
            "trial": str(trial),
            "overrides": redact_command(list(HydraConfig.get().overrides.task)),
            "outcome": text,
            "monitor": monitored(cfg) or "outcome",
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        self._files.append(file)

    def print(self) -> None:
        """A row a trial, with what it changed beside the others."""
        files = self._files or (sorted(SweepStart.folder.glob(_OUTCOMES)) if SweepStart.folder else [])
        trials = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if not trials:
            return
        shared = set.intersection(*(set(trial["overrides"]) for trial in trials))
        rows = [
            (trial["trial"], " ".join(o for o in trial["overrides"] if o not in shared), trial["outcome"])
            for trial in trials
        ]
        print_trials(rows, trials[-1]["monitor"])


def _cause(error: BaseException) -> str:
    """First line of what a constructor raised, below Hydra's wrapping."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
