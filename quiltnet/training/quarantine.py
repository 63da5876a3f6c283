"""The account of broken samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from quiltnet.distributed import all_gather_object, is_main, on_main
from quiltnet.errors import UserError
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.loggers import LoggerGroup, cut_after, logged_lines

# Below this many samples one broken file is no statistic.
_SAMPLES_BEFORE_JUDGING = 1000


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

    def run_stopped(self, state: TrainState) -> None:
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
        return Counter(line["reason"] for line in logged_lines(self.path))
