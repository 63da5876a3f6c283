"""The numbers of a model card: what a run measured of the very weights that were exported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quiltnet.release.run_files import RunFiles, by_metric, is_number
from quiltnet.training.averaging import AVERAGE_SUFFIX

_METRIC = re.compile(r"[a-z0-9_]+(@\d+(-shot)?)?")  # recall@5 and accuracy@4-shot, but no corruption of either


@dataclass(frozen=True)
class Score:
    """One number of the trained model, what the start had, and their paired difference (value, low, high).

    Intervals are of 95 %; what is not known is None.
    """

    evaluator: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    start: float | None
    change: tuple[float, float, float] | None


def find_scores(run: RunFiles, samples_seen: int, *, averaged: bool) -> list[Score]:
    """What was measured of the weights after ``samples_seen`` pairs; variants of a metric are left to the report.

    Args:
        averaged: of their moving average.
    """
    results = run.results
    start, found = results.get("start", {}), []
    is_newest = samples_seen == results.get("samples_seen")
    intervals = by_metric(results.get("outcomes", {}), "intervals") if is_newest else {}
    best = results.get("best") or {}
    # The changes are those of the best checkpoint, where the run had one, and else of the last weights.
    of_changes = best.get("samples_seen", results.get("samples_seen"))
    changes = results.get("changes", {}) if samples_seen == of_changes else {}
    for full_name, value in _values(run, samples_seen).items():
        name, _, metric = full_name.rpartition("/")
        if name.endswith(AVERAGE_SUFFIX) != averaged or not (_METRIC.fullmatch(metric) and is_number(value)):
            continue
        evaluator = name.removesuffix(AVERAGE_SUFFIX)
        before = start.get(full_name, start.get(f"{evaluator}/{metric}"))
        interval, change = _finite(intervals.get(full_name)), _finite(changes.get(full_name))
        found.append(Score(evaluator, metric, value, interval, before, change))
    return found


def _values(run: RunFiles, samples_seen: int) -> Mapping[str, Any]:
    """``evaluator/metric`` -> value at that moment, from the results or else from the log."""
    results = run.results
    best = results.get("best") or {}
    if samples_seen == results.get("samples_seen"):
        return by_metric(results.get("outcomes", {}), "scores")
    if samples_seen == best.get("samples_seen"):
        return best["scores"]
    evaluators = results.get("evaluators", {})
    lines = [line for line in run.metrics if line.get("samples_seen") == samples_seen]
    logged = {name: value for line in lines for name, value in line.items()}
    return {name: value for name, value in logged.items() if name.partition("/")[0].partition("@")[0] in evaluators}


def _finite(numbers: list[Any] | None) -> tuple[Any, ...] | None:
    return None if numbers is None or not all(map(is_number, numbers)) else tuple(numbers)
