"""The table at the end of ``python train.py -m …``."""

from __future__ import annotations

from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table


class SweepTable(Callback):
    """Collects what each trial returned; one that failed is a row that says so, not the end of the others."""

    def __init__(self) -> None:
        self.trials: list[tuple[str, str]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        overrides = [override for override in job_return.overrides or [] if not override.startswith("run_name=")]
        if job_return.status == JobStatus.COMPLETED:
            value = job_return.return_value
            outcome = "done" if value is None else f"{value:.4f}"
        else:
            outcome = f"failed: {job_return._return_value}".splitlines()[0]
        self.trials.append((" ".join(overrides), outcome))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        table = Table("trial", "overrides", config.get("monitor") or "outcome")
        for number, (overrides, outcome) in enumerate(self.trials):
            table.add_row(f"{config.output_dir}/{config.run_name}/trial-{number:03d}", overrides, outcome)
        Console().print(table)
