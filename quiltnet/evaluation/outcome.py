"""What an evaluator found of one model, and how sure of it one can be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95  # of every interval here


@dataclass(frozen=True)
class Outcome:
    """Numbers of one model on one set.

    Args:
        scores: metric -> finite value. A metric that is not defined on this set is absent, and ``details["undefined"]``
            says why.
        replicates: metric -> (R,) float64, its values on R bootstrap resamples of the items. Which resamples depends
            on the items alone and not on the model, so those of two models can be subtracted one by one.
        details: whatever else was found, such as a confusion matrix; JSON types only.
        items: hash of what was resampled; only outcomes with the same one can be compared in pairs.
    """

    scores: Mapping[str, float]
    replicates: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    items: str = ""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """metric -> percentile interval (low, high) of its replicates."""
        return {metric: percentile_interval(values) for metric, values in self.replicates.items()}

    def as_json(self) -> dict[str, Any]:
        """Scores, intervals and details; JSON types only, None for what is not finite."""
        intervals = {metric: list(interval) for metric, interval in self.intervals().items()}
        return json_ready({"scores": dict(self.scores), "intervals": intervals, **self.details})


@dataclass(frozen=True)
class Difference:
    """One model's score minus another's on the same items, with its paired bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(outcome: Outcome, baseline: Outcome, metric: str) -> Difference | None:
    """``outcome`` minus ``baseline``; None where the items differ, or one of them has no replicates of the metric."""
    if outcome.items != baseline.items or not (metric in outcome.replicates and metric in baseline.replicates):
        return None
    low, high = percentile_interval(outcome.replicates[metric] - baseline.replicates[metric])
    return Difference(outcome.scores[metric] - baseline.scores[metric], low, high)


def paired_differences(outcomes: Mapping[str, Outcome], baseline: Mapping[str, Outcome]) -> dict[str, Difference]:
    """``evaluator/metric`` -> difference, for all that can be compared."""
    differences = {
        f"{name}/{metric}": paired_difference(outcome, baseline[name], metric)
        for name, outcome in outcomes.items()
        if name in baseline
        for metric in outcome.scores
    }
    return {name: difference for name, difference in differences.items() if difference is not None}


def percentile_interval(values: Tensor) -> tuple[float, float]:
    """The central 95 % of (R,) values, NaN left out: a resample of groups may lack the class that a metric needs."""
    tail = (1 - LEVEL) / 2
    low, high = torch.nanquantile(values.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def json_ready(value: Any) -> Any:
    """The same with None in place of every number that is not finite, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
