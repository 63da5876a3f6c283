"""What happens beside training: log and evaluate."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from quiltnet.distributed import is_main, mean_over_ranks, on_main, world_size
from quiltnet.errors import UserError
from quiltnet.training.averaging import AVERAGE_SUFFIX
from quiltnet.training.data_statistics import DataStatistics
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.flops import peak_memory_gib
from quiltnet.training.loggers import LoggerGroup
from quiltnet.training.stopping import EvaluationCut
from quiltnet.whole_files import write_whole

log = logging.getLogger(__name__)


class Outcome(Protocol):
    """What an evaluator found of a model."""

    @property
    def scores(self) -> Mapping[str, float]: ...

    def as_json(self) -> dict[str, Any]: ...


Measure = Callable[[nn.Module], Mapping[str, Outcome]]


class LogMetrics(Callback):
    """Means since the last line, over steps and ranks; training waits for the device here, and at these clocks only.

    Args:
        data: what is told of the pairs.
        flops: of a pair, by the length of its batch's texts; None to leave rates of computing out.
        peak: FLOP/s of a device at most, where that is known.
    """

    def __init__(
        self,
        logger: LoggerGroup,
        every_samples: int,
        samples_per_epoch: int,
        data: DataStatistics | None = None,
        *,
        flops: Mapping[int, float] | None = None,
        peak: float | None = None,
    ) -> None:
        self.logger = logger
        self.every_samples = every_samples
        self.samples_per_epoch = samples_per_epoch
        self.data = data
        self.flops = flops
        self.peak = peak

    def fit_start(self, state: TrainState) -> None:
        self._steps: list[dict[str, Tensor]] = []

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        if not self._steps:
            # From the asking for the first batch: what other callbacks did in between is not training time.
            self._start = time.perf_counter() - metrics["step_s"].item()
        if self.flops is not None:
            metrics = {**metrics, "flops": torch.tensor(self.flops[batch.text.shape[1]])}
        self._steps.append(metrics)
        if self.data is not None:
            self.data.add(batch)
        if state.passed(self.every_samples):
            self._log(state)

    def fit_end(self, state: TrainState) -> None:
        if self._steps:
            self._log(state)

    def _log(self, state: TrainState) -> None:  # all ranks
        device = state.accelerator.device
        names = sorted(self._steps[0])
        window = torch.stack([torch.stack([step[name].to(device).float() for name in names]) for step in self._steps])
        # A step that was skipped for a loss that is not finite has no part in the mean.
        means_of_rank = torch.where(window.isfinite(), window, torch.nan).nanmean(0)
        means = dict(zip(names, mean_over_ranks(means_of_rank).tolist(), strict=True))  # waits for the device
        elapsed_s = time.perf_counter() - self._start
        samples = len(self._steps) * state.global_batch_size
        waited_s = means.pop("data_wait_s") * len(self._steps)
        for name in ("step_s", "finite_features", "finite_step"):
            del means[name]
        flops = means.pop("flops", None)
        line = {f"train/{name}": value for name, value in means.items()}
        line["train/learning_rate"] = max(group["lr"] for group in state.optimizer.param_groups)
        line["train/samples_per_s"] = samples / elapsed_s
        if flops is not None:  # of each device, and useful ones: what is computed again does not count
            per_s = flops * samples / elapsed_s / world_size()
            line["train/tflops_per_s"] = per_s / 1e12
            if self.peak is not None:
                line["train/mfu"] = per_s / self.peak
        line["train/peak_memory_gib"] = peak_memory_gib(device)
        line["train/epoch"] = state.samples_seen / self.samples_per_epoch
        line["data/wait_share"] = waited_s / elapsed_s
        if self.data is not None:
            line.update(self.data.collect(state.samples_seen))
        self.logger.log(line, state.samples_seen)
        self._steps = []


class Evaluate(Callback):
    """Measures the model before the first step, every so many samples, and at the end.

    Metric names are ``evaluator/metric``. Where the run keeps an average of its weights, that is measured too, at the
    same cost again, as ``evaluator@ema/metric``. ``results.json`` keeps the first and the newest numbers side by side,
    the newest outcomes whole, and what each evaluator says of its data; also the numbers of the best weights, where
    ``measure_best`` was called.

    An evaluation that was cut short, because the run is to stop, leaves no trace; the run that goes on from the
    checkpoint of that moment makes it first (``was_owed``).

    Args:
        measure: model -> outcome of each evaluator, the same on all ranks; called by all of them. It may raise
            ``EvaluationCut``.
        evaluators: what each evaluator says of its data and choices, by name.
        monitor: ``evaluator/metric`` that has to be among the numbers.
    """

    stage: ClassVar[str] = "evaluation"

    def __init__(
        self,
        measure: Measure,
        logger: LoggerGroup,
        *,
        every_samples: int | None,
        results: Path,
        evaluators: Mapping[str, Mapping[str, Any]],
        monitor: str | None = None,
    ) -> None:
        self.measure = measure
        self.logger = logger
        self.every_samples = every_samples
        self.results = results
        self.evaluators = dict(evaluators)
        self.monitor = monitor
        self.start: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.start_outcomes: Mapping[str, Outcome] = {}  # empty in a run that was resumed
        self.last_outcomes: Mapping[str, Outcome] = {}
        self.best: dict[str, Any] = {}  # samples_seen and scores of the best checkpoint, once the run has ended
        self.best_outcomes: Mapping[str, Outcome] = {}
        self.was_owed = False
        self._evaluated_at = -1
        self._outcomes_as_json: dict[str, Any] = {}

    def fit_start(self, state: TrainState) -> None:
        if state.samples_seen == 0:
            self._evaluate(state)
            self.start_outcomes = self.last_outcomes
            return
        kept = on_main(lambda: _read_json(self.results))
        self.start, self.last, self.best = (kept.get(name, {}) for name in ("start", "last", "best"))
        if not self.start:  # continues from another run's checkpoint
            self._evaluate(state)
        elif kept["samples_seen"] == state.samples_seen:
            self._evaluated_at, self._outcomes_as_json = state.samples_seen, kept.get("outcomes", {})
        elif kept["samples_seen"] < state.samples_seen and self._is_due(state):
            self.was_owed = True
            self._evaluate(state)

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        if self._is_due(state):
            self._evaluate(state)

    def fit_end(self, state: TrainState) -> None:
        if self._evaluated_at != state.samples_seen:
            self._evaluate(state)

    @property
    def final(self) -> dict[str, float]:
        """The numbers that the run is judged by: the best weights' where they were measured, else the newest."""
        return self.best["scores"] if self.best else self.last

    @property
    def final_outcomes(self) -> Mapping[str, Outcome]:
        return self.best_outcomes if self.best else self.last_outcomes

    def measure_best(self, state: TrainState, samples_seen: int) -> None:  # all ranks
        """Put the numbers of the weights that the model holds now, those of ``samples_seen``, into the results."""
        try:
            self.best_outcomes = self._measure(state)
        except EvaluationCut:
            return
        self.best = {"samples_seen": samples_seen, "scores": flat_scores(self.best_outcomes)}
        self._write()

    def _is_due(self, state: TrainState) -> bool:
        return self.every_samples is not None and state.passed(self.every_samples)

    def _measure(self, state: TrainState) -> dict[str, Outcome]:  # all ranks
        outcomes = dict(self.measure(state.unwrapped))
        if state.average is not None:
            averaged = self.measure(state.average.module)
            outcomes |= {f"{name}{AVERAGE_SUFFIX}": outcome for name, outcome in averaged.items()}
        return outcomes

    def _evaluate(self, state: TrainState) -> None:  # all ranks
        if not self.evaluators:
            return
        try:
            outcomes = self._measure(state)
        except EvaluationCut:
            return
        numbers = flat_scores(outcomes)
        if self.monitor is not None and self.monitor not in numbers:
            raise UserError(f"monitor={self.monitor} is not among what the evaluators measure: {', '.join(numbers)}")
        self.start, self.last, self.last_outcomes = self.start or numbers, numbers, outcomes
        self.best = {}  # training has gone on
        self._evaluated_at = state.samples_seen
        self._outcomes_as_json = {name: outcome.as_json() for name, outcome in outcomes.items()}
        self.logger.log(numbers, state.samples_seen)
        self._write()

    def _write(self) -> None:
        if not is_main():
            return
        content = {
            "samples_seen": self._evaluated_at,
            "start": self.start,
            "last": self.last,
            **({"best": self.best} if self.best else {}),
            "outcomes": self._outcomes_as_json,
            "evaluators": self.evaluators,
        }
        try:
            write_whole(self.results, json.dumps(content, indent=2) + "\n")
        except OSError as error:  # a full disk: whether training goes on is for the saving of checkpoints to say
            log.warning("%s could not be written (%s); the numbers are in the log", self.results, error)


def flat_scores(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """``{"evaluator/metric": value}``."""
    return {
        f"{name}/{metric}": float(value)
        for name, outcome in outcomes.items()
        for metric, value in outcome.scores.items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
