"""What happens beside training: log, save, evaluate, account for broken samples."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quiltnet.distributed import all_gather_object, is_main, mean_over_ranks, on_main, world_size
from quiltnet.errors import UserError
from quiltnet.training.checkpoint import checkpoint_path, save_checkpoint
from quiltnet.training.data_statistics import DataStatistics
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.flops import peak_memory_gib
from quiltnet.training.loggers import LoggerGroup, cut_after

# Below this many samples one broken file is no statistic.
_SAMPLES_BEFORE_JUDGING = 1000


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
        means = dict(zip(names, mean_over_ranks(window.mean(0)).tolist(), strict=True))  # waits for the device
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


class Quarantine(Callback):
    """Counts broken samples by reason, lists their keys, and ends the run when they are too many.

    Args:
        every_samples: clocks at which to write down what was found; the checkpoint's must be among them, or a resumed
            run would forget what lay in between.
        max_fraction: of the samples seen; judged against 1,000 samples at least.
        missing: number of samples that the manifest promised and a shard lacks, by shard.
    """

    def __init__(
        self,
        path: Path,
        logger: LoggerGroup,
        *,
        every_samples: Sequence[int],
        max_fraction: float,
        missing: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self.logger = logger
        self.every_samples = every_samples
        self.max_fraction = max_fraction
        self.missing = dict(missing or {})
        self.counts: Counter[str] = Counter()  # by reason, of samples that were drawn
        self._pending: list[tuple[str, str]] = []

    def fit_start(self, state: TrainState) -> None:
        if state.samples_seen and is_main():
            cut_after(self.path, state.samples_seen)
        self.counts = on_main(self._recount)
        recorded = self.counts.pop("missing_from_tar", 0)  # by the run that this one continues
        if self.missing and not recorded:
            self.logger.log({"data/missing_samples": sum(self.missing.values())}, state.samples_seen)
            self._write(
                [(shard, "missing_from_tar", count) for shard, count in self.missing.items()], state.samples_seen
            )

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        self._pending += batch.rejected
        if any(state.passed(every) for every in self.every_samples):
            self._flush(state)

    def fit_end(self, state: TrainState) -> None:
        self._flush(state)

    def _flush(self, state: TrainState) -> None:  # all ranks
        found = [(key, reason, 1) for of_rank in all_gather_object(self._pending) for key, reason in of_rank]
        self.counts.update(reason for _, reason, _ in found)
        self._pending = []
        self._write(found, state.samples_seen)
        if not self.counts:
            return
        bad = sum(self.counts.values())
        by_reason = {f"data/bad_samples_{reason}": n for reason, n in sorted(self.counts.items())}
        self.logger.log({"data/bad_samples": bad, **by_reason}, state.samples_seen)
        if bad > self.max_fraction * max(state.samples_seen, _SAMPLES_BEFORE_JUDGING):
            raise UserError(
                f"{bad} of {state.samples_seen} samples were broken ({dict(self.counts)}), more than "
                f"max_bad_fraction={self.max_fraction}; their keys are in {self.path}"
            )

    def _write(self, found: Sequence[tuple[str, str, int]], samples_seen: int) -> None:
        if not found or not is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            for key, reason, count in found:
                row = {"samples_seen": samples_seen, "key": key, "reason": reason, "samples": count}
                file.write(json.dumps(row) + "\n")

    def _recount(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                counts[json.loads(line)["reason"]] += 1
        return counts


class SaveCheckpoint(Callback):
    """A checkpoint every so many samples and at the end; the newest ``keep`` stay."""

    def __init__(self, root: Path, every_samples: int, keep: int = 2) -> None:
        self.root = root
        self.every_samples = every_samples
        self.keep = keep
        self._saved_at = -1

    def fit_start(self, state: TrainState) -> None:
        if on_main(lambda: checkpoint_path(self.root, state.samples_seen).exists()):  # a finished run, resumed
            self._saved_at = state.samples_seen

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        if state.passed(self.every_samples):
            self._save(state)

    def fit_end(self, state: TrainState) -> None:
        if self._saved_at != state.samples_seen:
            self._save(state)

    def _save(self, state: TrainState) -> None:  # all ranks
        saved = state.state_dict()
        if is_main():
            save_checkpoint(self.root, saved, keep=self.keep)
        self._saved_at = state.samples_seen


class Evaluate(Callback):
    """Measures the model before the first step, every so many samples, and at the end.

    Metric names are ``evaluator/metric``. ``results.json`` keeps the first and the newest numbers side by side, the
    newest outcomes whole, and what each evaluator says of its data.

    Args:
        measure: model -> outcome of each evaluator, the same on all ranks; called by all of them.
        evaluators: what each evaluator says of its data and choices, by name.
        monitor: ``evaluator/metric`` that has to be among the numbers.
    """

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
        self._evaluated_at = -1

    def fit_start(self, state: TrainState) -> None:
        if state.samples_seen == 0:
            self._evaluate(state)
            self.start_outcomes = self.last_outcomes
            return
        kept = on_main(lambda: _read_json(self.results))
        self.start, self.last = kept.get("start", {}), kept.get("last", {})
        if not self.start:  # continues from another run's checkpoint
            self._evaluate(state)
        elif kept["samples_seen"] == state.samples_seen:
            self._evaluated_at = state.samples_seen

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        if self.every_samples is not None and state.passed(self.every_samples):
            self._evaluate(state)

    def fit_end(self, state: TrainState) -> None:
        if self._evaluated_at != state.samples_seen:
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:  # all ranks
        if not self.evaluators:
            return
        outcomes = self.measure(state.unwrapped)
        numbers = flat_scores(outcomes)
        if self.monitor is not None and self.monitor not in numbers:
            raise UserError(f"monitor={self.monitor} is not among what the evaluators measure: {', '.join(numbers)}")
        self.start, self.last, self.last_outcomes = self.start or numbers, numbers, outcomes
        self._evaluated_at = state.samples_seen
        self.logger.log(numbers, state.samples_seen)
        if is_main():
            content = {
                "samples_seen": state.samples_seen,
                "start": self.start,
                "last": self.last,
                "outcomes": {name: outcome.as_json() for name, outcome in outcomes.items()},
                "evaluators": self.evaluators,
            }
            temporary = self.results.with_suffix(".tmp")
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary.rename(self.results)


def flat_scores(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """``{"evaluator/metric": value}``."""
    return {
        f"{name}/{metric}": float(value)
        for name, outcome in outcomes.items()
        for metric, value in outcome.scores.items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
