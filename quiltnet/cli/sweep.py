"""The table at the end of ``python train.py -m …``."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from quiltnet.cli.tables import print_trials

DEFAULT_MONITOR = "val_pairs/loss"


def is_trial() -> bool:
    """Whether this run is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def trial_directory(cfg: DictConfig) -> Path:
    """``outputs/<run_name>/trial-000``: a directory for each trial, below that of the sweep."""
    return Path(cfg.output_dir) / str(cfg.run_name) / f"trial-{HydraConfig.get().job.num:03d}"


def monitored(cfg: DictConfig) -> str | None:
    """The metric that trials are compared by: ``monitor``, or the held-out loss where it is measured."""
    return cfg.monitor or (DEFAULT_MONITOR if "val_pairs" in cfg.evaluator else None)


class Trials:
    """What came of each trial; one that failed is a row that says so, not the end of the others."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, list[str], str]] = []
        self._monitor = ""

    def add(self, cfg: DictConfig, outcome: float | Exception | None) -> None:
        if isinstance(outcome, Exception):
            text = f"failed: {_cause(outcome)}"
        else:
            text = "done" if outcome is None else f"{outcome:.4f}"
        self._rows.append((str(trial_directory(cfg)), list(HydraConfig.get().overrides.task), text))
        self._monitor = monitored(cfg) or "outcome"

    def print(self) -> None:
        """A row a trial, with what it changed beside the others."""
        if not self._rows:
            return
        shared = set.intersection(*(set(overrides) for _, overrides, _ in self._rows))
        rows = [(name, " ".join(o for o in overrides if o not in shared), text) for name, overrides, text in self._rows]
        print_trials(rows, self._monitor)


def _cause(error: BaseException) -> str:
    """First line of what a constructor raised, below Hydra's wrapping."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
