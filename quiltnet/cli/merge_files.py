"""What a merge is chosen by, and the folder it leaves: merge.json, tables, the curve."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quiltnet.cli.run_directory import describe_environment
from quiltnet.errors import UserError
from quiltnet.evaluation.comparison import lower_is_better
from quiltnet.evaluation.outcome import Outcome, json_ready
from quiltnet.release.charts import line_chart, save_chart
from quiltnet.release.curves import trade_off_chart
from quiltnet.training.callbacks import flat_scores

RESULTS_NAME = "merge.json"
CURVE_NAME = "curve"


@dataclass(frozen=True)
class Merged:
    """One set of weights and what the evaluators found of it.

    Attributes:
        name: the alpha, or which model or soup it is.
        mark: what became of it: ``exported``, ``in the soup``, or nothing.
    """

    name: str
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    mark: str = ""

    @property
    def scores(self) -> dict[str, float]:
        """``evaluator/metric`` -> value."""
        return flat_scores(self.outcomes)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """``evaluator/metric`` -> 95 % interval, of those that have one."""
        found = self.outcomes.items()
        return {f"{name}/{metric}": ends for name, outcome in found for metric, ends in outcome.intervals().items()}

    def marked(self, mark: str) -> Merged:
        return replace(self, mark=mark)


@dataclass(frozen=True)
class Goal:
    """What a merge is chosen by: the mean of a target and a general metric, or the target alone.

    Attributes:
        splits: evaluator -> ``train``, ``val`` or ``test``.

    Raises:
        UserError: one of the two gets better as it rises, the other as it falls.
    """

    target: str
    general: str | None
    splits: Mapping[str, str]

    def __post_init__(self) -> None:
        if len({lower_is_better(metric) for metric in self.metrics}) > 1:
            raise UserError(
                f"of {self.target} and {self.general} one gets better as it rises and one as it falls, so that their "
                "mean says nothing; name two of a kind"
            )

    @property
    def metrics(self) -> list[str]:
        return [metric for metric in (self.target, self.general) if metric is not None]

    @property
    def test_metrics(self) -> list[str]:
        """Those of test sets, which nothing may be chosen by."""
        return [metric for metric in self.metrics if self.splits[metric.partition("/")[0]] == "test"]

    def check(self, merged: Merged) -> None:
        """Raises UserError where a metric was not measured."""
        for metric in self.metrics:
            if metric not in merged.scores:
                raise UserError(f"{metric} is not measured; what the evaluators measure: {', '.join(merged.scores)}")

    def mean(self, merged: Merged) -> float:
        return sum(merged.scores[metric] for metric in self.metrics) / len(self.metrics)

    def value(self, merged: Merged) -> float:
        """Higher is better, whatever the metrics are."""
        return -self.mean(merged) if lower_is_better(self.target) else self.mean(merged)


@dataclass(frozen=True)
class MergeResult:
    """All merges of one command.

    Attributes:
        by_alpha: whether their names are places between two models.
        facts: whatever else ``merge.json`` has to say.
    """

    sources: Sequence[str]
    merged: Sequence[Merged]
    goal: Goal | None
    by_alpha: bool
    facts: Mapping[str, Any]

    def table(self) -> list[list[str]]:
        """A row a merge, the header first: the goal's metrics and their mean, or all metrics where there is no goal."""
        metrics = list(self.merged[-1].scores) if self.goal is None else self.goal.metrics
        means = len(metrics) == 2 and self.goal is not None
        rows = [["alpha" if self.by_alpha else "model", *metrics, *(["mean"] if means else []), ""]]
        for merged in self.merged:
            cells = [_cell(merged, metric) for metric in metrics]
            mean = [f"{self.goal.mean(merged):.4f}"] if means else []
            rows.append([merged.name, *cells, *mean, merged.mark])
        return rows

    def as_json(self) -> dict[str, Any]:
        exported = [merged.name for merged in self.merged if merged.mark == "exported"]
        return json_ready(
            {
                "sources": list(self.sources),
                "exported": exported[0] if exported else None,
                "target": self.goal.target if self.goal else None,
                "general": self.goal.general if self.goal else None,
                **self.facts,
                "merged": [
                    {"name": merged.name, "mark": merged.mark, "scores": merged.scores, "intervals": merged.intervals}
                    for merged in self.merged
                ],
                "environment": describe_environment(),
            }
        )


def write_merge(folder: Path, result: MergeResult) -> None:
    """merge.json; where something was measured also merge.csv (all metrics), merge.md, and the curve of the alphas."""
    if result.merged[-1].scores:
        _write_csv(folder / "merge.csv", result)
        (folder / "merge.md").write_text(_markdown(result.table()), encoding="utf-8")
    if result.by_alpha and result.goal is not None and len(result.merged) > 1:
        save_chart(_curve(result), folder / CURVE_NAME)
    text = json.dumps(result.as_json(), indent=2, allow_nan=False)
    (folder / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")


def _curve(result: MergeResult) -> Any:
    goal = result.goal
    if goal.general is None:
        points = {float(merged.name): merged.scores[goal.target] for merged in result.merged}
        x_label = "alpha (0: base, 1: tuned)"
        return line_chart({goal.target: points}, x_label=x_label, y_label=goal.target, log_x=False)
    points = {merged.name: (merged.scores[goal.general], merged.scores[goal.target]) for merged in result.merged}
    exported = next((merged.name for merged in result.merged if merged.mark == "exported"), None)
    return trade_off_chart(points, x_label=goal.general, y_label=goal.target, chosen=exported)


def _write_csv(path: Path, result: MergeResult) -> None:
    metrics = list(dict.fromkeys(metric for merged in result.merged for metric in merged.scores))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["alpha" if result.by_alpha else "model", "mark", *metrics])
        for merged in result.merged:
            writer.writerow([merged.name, merged.mark, *(merged.scores.get(metric, "") for metric in metrics)])


def _markdown(table: Sequence[Sequence[str]]) -> str:
    header, *rows = ([cell.replace("|", r"\|") for cell in row] for row in table)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(merged: Merged, metric: str) -> str:
    if metric not in merged.scores:
        return "-"
    interval = "({:.3f} to {:.3f})".format(*merged.intervals[metric]) if metric in merged.intervals else ""
    return f"{merged.scores[metric]:.4f} {interval}".strip()
