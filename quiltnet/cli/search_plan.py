"""What a search does: its options in one place, and what its trials are started with."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quiltnet.cli.search_space import Parameter, Value, as_text
from quiltnet.redaction import redact_command

DIRECTIONS = ("minimize", "maximize")
SAMPLERS = ("tpe", "random")
PRUNERS = ("hyperband", "none")


@dataclass(frozen=True)
class SearchPlan:
    """One search.

    Attributes:
        name: of the search, which is its run_name.
        folder: of all that it writes; a trial's run directory is ``folder/trial-000``.
        space: what is searched, by option.
        monitor: the metric that trials are compared by.
        options: what all trials share, as on ``quiltnet train``'s command line.
        n_trials: in all, whoever runs them.
        parallel: trials at once.
        nproc_per_trial: processes of a trial.
        first_samples: samples at the first evaluation, below which nothing is pruned; None where there is none.
        total_samples: of a trial; None where they are not known before it runs.
        storage: URL of the database; None: SQLite in ``folder``.
        log_to_wandb: whether trials do, under names that put them into a group of the search's.
    """

    name: str
    folder: Path
    space: Mapping[str, Parameter]
    monitor: str
    direction: str = "minimize"
    options: tuple[str, ...] = ()
    n_trials: int = 20
    parallel: int = 1
    nproc_per_trial: int = 1
    sampler: str = "tpe"
    sampler_seed: int = 0
    pruner: str = "hyperband"
    first_samples: int | None = None
    total_samples: int | None = None
    storage: str | None = None
    log_to_wandb: bool = False

    @property
    def storage_url(self) -> str:
        return self.storage or f"sqlite:///{quote(str(self.folder / 'sweep.db'))}"

    @property
    def prunes(self) -> bool:
        return self.pruner == "hyperband" and self.first_samples is not None

    def definition(self) -> dict[str, Any]:
        """What makes trials comparable: a search that goes on must have the same. It is written down, so no secrets."""
        searched = {f"search.{name}": _describe(parameter) for name, parameter in self.space.items()}
        shared = {}
        for option in redact_command(self.options):
            name, _, value = option.partition("=")
            if not name.startswith(("logger", "hydra.")) and name != "data.train.workers":
                shared[name] = value
        return {"monitor": self.monitor, "direction": self.direction, **searched, **shared}

    def trial_folder(self, number: int) -> Path:
        return self.folder / trial_name(number)

    def trial_options(self, number: int, values: Mapping[str, Value]) -> list[str]:
        """Options of one trial, which goes on where it was interrupted."""
        place = [f"run_name={trial_name(number)}", f"output_dir={as_text(str(self.folder))}", "resume=auto"]
        if self.log_to_wandb:
            place.append(f"logger.wandb.name={as_text(f'{self.name}/{trial_name(number)}')}")
        return [*self.options, *_assignments(values), *place]

    def command_line(self, values: Mapping[str, Value]) -> str:
        """What trains with these values again, in a run directory of its own beside the search's; to be pasted.

        Secrets are to be filled in.
        """
        start = ["quiltnet", "train"]
        if self.nproc_per_trial > 1:
            start = ["torchrun", "--nproc-per-node", str(self.nproc_per_trial), "-m", "quiltnet.cli.app", "train"]
        place = [f"run_name={self.name}-best", f"output_dir={as_text(str(self.folder.parent))}"]
        return shlex.join([*start, *redact_command(self.options), *_assignments(values), *place])


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def trial_command(plan: SearchPlan, number: int, values: Mapping[str, Value]) -> list[str]:
    """The process of a trial: ``quiltnet train``, under torchrun where it has several processes."""
    start = [sys.executable]
    if plan.nproc_per_trial > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.nproc_per_trial)]
    return [*start, "-m", "quiltnet.cli.app", "train", *plan.trial_options(number, values)]


def _assignments(values: Mapping[str, Value]) -> list[str]:
    # Choices are texts of a command line already.
    return [f"{name}={value if isinstance(value, str) else as_text(value)}" for name, value in values.items()]


def _describe(parameter: Parameter) -> str:
    if parameter.choices:
        return f"[{', '.join(parameter.choices)}]"
    log = ", log" if parameter.log else ""
    step = f", step {parameter.step}" if parameter.step is not None else ""
    return f"{parameter.low} to {parameter.high}{log}{step}"
