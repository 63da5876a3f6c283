"""The alarm for what fine-tuning breaks: a model that was good at something else before."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from quiltnet.distributed import is_main
from quiltnet.errors import UserError
from quiltnet.training.averaging import evaluator_of
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.loggers import LoggerGroup

log = logging.getLogger(__name__)

ADVICE = (
    "the model is forgetting: a lower optim.lr, fewer epochs, or training less of it (tuning=lora) forget less; "
    "averaging with the start (quiltnet merge) gives much of it back without training again"
)


class RegressionAlarm(Callback):
    """Says it when a metric is worse than before the first step by more than a margin; once an evaluation.

    Stands after ``Evaluate`` among the callbacks, and reads what that measured. Each alarm is a line of the log and a
    metric ``alarm/<metric>``: how far the metric is on the wrong side of its start, in its own units. A metric that a
    time budget left out of an evaluation is not judged there.

    Args:
        evaluate: what measures; it comes earlier among the callbacks.
        metrics: ``evaluator/metric``, or ``evaluator@ema/metric`` of the averaged weights.
        lower_is_better: whether less of ``evaluator/metric`` is better.
        margin: in the metric's own units: 0.02 is two points of an accuracy, 0.02 nats of a loss.
        stop: end the run at an alarm, but for that of the last evaluation, after which there is nothing to stop.

    Raises:
        UserError: by ``fit_start``, a metric that the first evaluation did not measure; by ``step_end``, an alarm
            where the run is to stop. The newest checkpoint is then the one before it.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        logger: LoggerGroup,
        *,
        metrics: Sequence[str],
        lower_is_better: Callable[[str], bool],
        margin: float = 0.02,
        stop: bool = False,
    ) -> None:
        self.evaluate = evaluate
        self.logger = logger
        self.metrics = list(metrics)
        self.lower_is_better = lower_is_better
        self.margin = margin
        self.stop = stop

    def fit_start(self, state: TrainState) -> None:
        measured = self.evaluate.start
        for metric in self.metrics:
            if metric not in measured:
                raise UserError(
                    f"callbacks.alarm.metrics names {metric}, which was not measured at the start of the run; "
                    f"measured were {', '.join(measured) or 'no metrics: choose evaluators with evaluator=[…]'}"
                )
        if self.evaluate.was_owed:
            self._judged = None
            self._end_at(self._judge(state), state)
        else:
            self._judged = self.evaluate.last  # by the part of the run that this one continues

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        self._end_at(self._judge(state), state)

    def fit_end(self, state: TrainState) -> None:
        self._judge(state)

    def _end_at(self, alarms: Sequence[str], state: TrainState) -> None:
        if alarms and self.stop:
            raise UserError(
                f"stopped by callbacks.alarm after {state.samples_seen:,} samples: {'; '.join(alarms)}; {ADVICE}. "
                "The checkpoints up to here are kept, and resume=auto goes on from the newest"
            )

    def _judge(self, state: TrainState) -> list[str]:  # all ranks: they hold the same numbers
        """What is worse than it was, if there was an evaluation since the last call."""
        now = self.evaluate.last
        if now is self._judged:
            return []
        self._judged = now
        worse = {metric: by for metric in self.metrics if (by := self._decline(metric)) > self.margin}
        alarms = [
            f"{metric} is {now[metric]:.4g}, {by:.4g} worse than the {self.evaluate.start[metric]:.4g} of the start"
            for metric, by in worse.items()
        ]
        if worse:
            self.logger.log({f"alarm/{metric}": by for metric, by in worse.items()}, state.samples_seen)
            if is_main():
                log.warning("ALARM after %s samples: %s; %s", f"{state.samples_seen:,}", "; ".join(alarms), ADVICE)
        return alarms

    def _decline(self, metric: str) -> float:
        """How much worse than at the start; all, where it became NaN; nothing, where it was not measured."""
        if metric not in self.evaluate.last:
            return 0.0
        sign = -1 if self.lower_is_better(metric) else 1
        decline = sign * (self.evaluate.start[metric] - self.evaluate.last[metric])
        return math.inf if math.isnan(decline) else decline


def check_alarm(metrics: Sequence[str], evaluators: Collection[str]) -> None:
    """Before anything is measured: that each metric is of an evaluator of the run.

    Raises:
        UserError: one is of none.
    """
    for metric in metrics:
        if evaluator_of(metric) not in evaluators:
            raise UserError(
                f"callbacks.alarm.metrics: {metric} must be evaluator/metric of one of the run's evaluators "
                f"({', '.join(evaluators) or 'none'})"
            )
