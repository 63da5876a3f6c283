"""What comes of a search: a table of all trials, pictures, and the command line of the best."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quiltnet.cli.search_plan import DIRECTIONS, SearchPlan
from quiltnet.cli.search_study import SearchStudy
from quiltnet.cli.tables import print_rows
from quiltnet.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_STATES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class TrialRow:
    """Outcome of one trial.

    Attributes:
        state: done | pruned | failed | running (in another driver).
        value: of the monitored metric at its last evaluation; None where there was none.
        values: of the options that were searched.
        seconds: that its process ran.
        reason: of a failure.
    """

    number: int
    state: str
    value: float | None
    values: dict[str, Any]
    samples: int
    seconds: float
    reason: str


def list_trials(study: SearchStudy) -> list[TrialRow]:
    return [_row(trial) for trial in study.trials]


def best_trial(rows: Sequence[TrialRow], direction: str) -> TrialRow | None:
    """Of those that are done; the first of equals."""
    done = [row for row in rows if row.state == "done"]
    best = min if direction == DIRECTIONS[0] else max
    return best(done, key=lambda row: row.value, default=None)


def print_results(plan: SearchPlan, study: SearchStudy) -> bool:
    """Table, ``trials.csv``, pictures, and the best trial's command line; whether there is a best.

    Raises:
        UserError: the folder cannot be written.
    """
    rows = list_trials(study)
    names = list(plan.space)
    header = ["trial", "state", plan.monitor, *names, "samples", "seconds", "reason"]
    print_rows([header, *([_shown(cell) for cell in _cells(row, names)] for row in rows)])
    try:
        _write_csv(plan.folder / "trials.csv", header, rows, names)
        pictures = _draw(plan, study, rows)
    except OSError as error:
        raise UserError(f"results cannot be written to {plan.folder} ({error})") from error
    for path in (plan.folder / "trials.csv", *pictures):
        print(path)
    best = best_trial(rows, plan.direction)
    if best is None:
        print(f"no trial was completed; what each printed is in {plan.folder}/trial-….log", file=sys.stderr)
        return False
    print(f"\nbest: {plan.trial_folder(best.number)}, {plan.monitor} {best.value:.4g}; to train it again:")
    print(f"  {plan.command_line(best.values)}")
    return True


def _row(trial: FrozenTrial) -> TrialRow:
    progress = trial.user_attrs.get("progress", {})
    value = trial.value
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[trial.last_step]
    return TrialRow(
        number=trial.number,
        state=_STATES[trial.state.name],
        value=value,
        values=trial.params,
        samples=progress.get("samples", 0),
        seconds=progress.get("seconds", 0.0),
        reason=trial.user_attrs.get("reason", ""),
    )


def _cells(row: TrialRow, names: Sequence[str]) -> list[Any]:
    values = [row.values.get(name) for name in names]
    return [row.number, row.state, row.value, *values, row.samples, row.seconds, row.reason]


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[TrialRow], names: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(_cells(row, names) for row in rows)


def _draw(plan: SearchPlan, study: SearchStudy, rows: Sequence[TrialRow]) -> list[Path]:
    done = [row for row in rows if row.state == "done"]
    if len(done) < 2:
        print(f"note: pictures need two completed trials; there are {len(done)}", file=sys.stderr)
        return []
    import optuna

    from quiltnet.release.charts import save_chart
    from quiltnet.release.sweep_plots import Scale, TrialLine, importance_chart, parallel_chart, write_pages

    importances = optuna.importance.get_param_importances(study.study)
    scales = {
        name: Scale(choices=parameter.choices)
        if parameter.choices
        else Scale(float(parameter.low), float(parameter.high), parameter.log)
        for name, parameter in plan.space.items()
    }
    ended = [row for row in rows if row.state in ("done", "pruned") and row.value is not None]
    lines = [TrialLine(row.values, row.value, row.state == "done") for row in ended]
    title = f"{plan.name}: the best purple, those ended early dashed"
    parallel = parallel_chart(
        lines, scales, outcome=plan.monitor, lower_is_better=plan.direction == DIRECTIONS[0], title=title
    )
    return [
        *save_chart(importance_chart(importances, title=plan.name), plan.folder / "importance"),
        *save_chart(parallel, plan.folder / "parallel_coordinates"),
        *write_pages(study.study, plan.folder),
    ]
