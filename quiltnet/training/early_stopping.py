"""Ends a run whose monitored metric has stopped getting better."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from quiltnet.distributed import is_main, on_main
from quiltnet.errors import UserError
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.loggers import logged_lines

log = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Ends training after ``patience`` evaluations in a row that were no better than the best before them.

    The evaluation before the first step counts as the first one. Better means: by more than ``min_delta``; a value that
    is not a number is never better. What was measured before is read from the run's own log, so a resumed run counts
    as one that was never interrupted, and a run that has ended this way is complete.

    Args:
        evaluate: what measures; it comes earlier among the callbacks.
        metrics: the run's ``metrics.jsonl``.
        monitor: ``evaluator/metric``.
        lower_is_better: whether less of the monitor is better.
        min_delta: in the metric's own units.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        metrics: Path,
        monitor: str,
        *,
        lower_is_better: bool,
        patience: int,
        min_delta: float = 0.0,
    ) -> None:
        self.evaluate = evaluate
        self.metrics = metrics
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self._sign = -1.0 if lower_is_better else 1.0

    def fit_start(self, state: TrainState) -> None:  # all ranks
        self._values = on_main(lambda: _logged(self.metrics, self.monitor))
        self._judged = self.evaluate.last
        self._judge(state)

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        if self.evaluate.last is not self._judged:
            self._judged = self.evaluate.last
            self._values.append(self._judged[self.monitor])
            self._judge(state)

    def _judge(self, state: TrainState) -> None:  # all ranks hold the same numbers
        waited, best = evaluations_since_best(self._values, self._sign, self.min_delta)
        if waited < self.patience:
            return
        state.is_complete = True
        if is_main():
            log.warning(
                "early stopping after %s samples: %s has not been better than %.4g for %d evaluations",
                f"{state.samples_seen:,}",
                self.monitor,
                best,
                waited,
            )


def evaluations_since_best(values: Sequence[float], sign: float, min_delta: float) -> tuple[int, float]:
    """How many of the last ``values`` were no better than the best before them, and that best; NaN where there is none.

    Args:
        sign: 1 where more is better, -1 where less is.
    """
    best, at = -math.inf, -1
    for number, value in enumerate(values):
        if sign * value > best + (min_delta if at >= 0 else 0.0):
            best, at = sign * value, number
    return (len(values) - 1 - at, sign * best) if at >= 0 else (len(values), math.nan)


def check_early_stopping(patience: int | None, monitor: str | None, evaluate_every_samples: int | None) -> None:
    """Refuse a patience that could never run out.

    Raises:
        UserError: nothing is monitored, or only at the end.
    """
    if patience is None:
        return
    given = f"callbacks.early_stopping.patience={patience}"
    if monitor is None:
        raise UserError(f"{given} needs a metric to judge by: give evaluator=[…] and monitor=evaluator/metric")
    if evaluate_every_samples is None:
        raise UserError(f"{given} counts evaluations, and there is one at the end only: set evaluate_every_samples")


def _logged(metrics: Path, monitor: str) -> list[float]:
    lines = [line for line in logged_lines(metrics) if monitor in line]
    return [math.nan if line[monitor] is None else line[monitor] for line in lines]
