"""The driver of a search: it starts trials, follows them, ends poor ones, and survives them all."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from quiltnet.cli.search_plan import SearchPlan, trial_command, trial_name
from quiltnet.cli.search_space import Value
from quiltnet.cli.search_study import PATIENCE_S, Claim, SearchStudy
from quiltnet.cli.search_trial import GRACE_S, Metrics, TrialProcess, end_left_behind, planned_samples
from quiltnet.errors import UserError
from quiltnet.release.run_files import METRICS_NAME

Command = Callable[[SearchPlan, int, dict[str, Value]], Sequence[str]]

POLL_S = 1.0


@dataclass
class _Trial:
    """A trial that runs.

    Attributes:
        seconds_before: that it ran under an earlier driver.
        is_pruned: whether it was told to end.
    """

    claim: Claim
    process: TrialProcess
    metrics: Metrics
    seconds_before: float
    began: float = field(default_factory=time.monotonic)
    value: float | None = None
    is_pruned: bool = False

    @property
    def progress(self) -> dict[str, float]:
        seconds = self.seconds_before + time.monotonic() - self.began
        return {"samples": self.metrics.samples_seen, "seconds": round(seconds, 1)}


class SearchDriver:
    """Runs trials of a plan, ``plan.parallel`` at once, until all are taken.

    Args:
        command: what starts a trial, by plan, number and values.
        gpus: as CUDA_VISIBLE_DEVICES names them; none: trials share the CPU.
    """

    def __init__(
        self,
        plan: SearchPlan,
        command: Command = trial_command,
        *,
        gpus: Sequence[str] = (),
        poll_s: float = POLL_S,
        grace_s: float = GRACE_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._plan = plan
        self._is_new = not plan.folder.exists()
        self._discard = False  # a search that was refused before anything was trained
        self._command = command
        self._gpus = list(gpus)
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._running: dict[int, _Trial] = {}  # by slot
        try:
            self.study = SearchStudy(plan, patience_s)
        except UserError:
            self._discard_folder()
            raise

    def run(self) -> None:
        """Until no trial is left to take, and those of this driver have ended.

        Raises:
            UserError: the first trial was refused, or the database cannot be used. Trials that run are ended.
            KeyboardInterrupt: with trials ended; whoever comes next continues them.
        """
        try:
            while self._fill_slots() or self._running:
                time.sleep(self._poll_s)
                for slot, trial in list(self._running.items()):
                    self._follow(trial)
                    code = trial.process.exit_code()
                    if code is not None:
                        self._follow(trial)  # what it wrote last
                        self._conclude(trial, code)
                        del self._running[slot]
        except BaseException:
            self._end_all()
            raise
        finally:
            self.study.close()
            if self._discard and self._is_new:
                self.study.remove()
                self._discard_folder()

    def _discard_folder(self) -> None:
        """What was made here goes, so that the corrected command does not find another search in its place."""
        if self._is_new:
            shutil.rmtree(self._plan.folder, ignore_errors=True)

    def _fill_slots(self) -> bool:
        """Start what there is room for; whether anything was started."""
        started = False
        for slot in range(self._plan.parallel):
            if slot not in self._running and (claim := self.study.claim()) is not None:
                self._running[slot] = self._start(claim, slot)
                started = True
        return started

    def _start(self, claim: Claim, slot: int) -> _Trial:
        name = trial_name(claim.number)
        if "process" in claim.facts:
            _say(f"{name} was left behind: it goes on")
            end_left_behind(claim.facts["process"], self._grace_s)
        else:
            _say(f"{name} begins: {shown(claim.values)}")
        command = self._command(self._plan, claim.number, dict(claim.values))
        metrics = Metrics(self._plan.trial_folder(claim.number) / METRICS_NAME, self._plan.monitor)
        process = TrialProcess(command, self._plan.folder / f"{name}.log", self._environment(slot))
        self.study.note(claim, "process", process.identity)
        return _Trial(claim, process, metrics, claim.facts.get("progress", {}).get("seconds", 0.0))

    def _environment(self, slot: int) -> dict[str, str]:
        ranks = self._plan.nproc_per_trial
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[slot * ranks : (slot + 1) * ranks])
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads // (self._plan.parallel * ranks))))
        return environment

    def _follow(self, trial: _Trial) -> None:
        for samples, value in trial.metrics.new_values():
            trial.value = value
            if math.isnan(value):
                continue
            is_poor = self.study.report(trial.claim, samples, value) and not trial.is_pruned
            self.study.note(trial.claim, "progress", trial.progress)
            planned = planned_samples(self._plan.trial_folder(trial.claim.number))
            if is_poor and trial.process.exit_code() is None and (planned is None or samples < planned):
                trial.is_pruned = True
                trial.process.end(self._grace_s)

    def _conclude(self, trial: _Trial, code: int) -> None:
        name = trial_name(trial.claim.number)
        self.study.note(trial.claim, "progress", trial.progress)
        if trial.is_pruned and code != 0:
            state, words = "PRUNED", f"pruned after {trial.metrics.samples_seen:,} samples, at {trial.value:.4g}"
        elif code == 0 and trial.value is not None and math.isfinite(trial.value):
            state, words = "COMPLETE", f"done, {self._plan.monitor} {trial.value:.4g}"
        else:
            self._leave_if_first_was_refused(trial)
            state, words = "FAIL", self._why(trial, code)
        self.study.finish(trial.claim, state, trial.value, words if state == "FAIL" else "")
        _say(f"{name} {'failed: ' if state == 'FAIL' else ''}{words}")

    def _why(self, trial: _Trial, code: int) -> str:
        if code != 0:
            return trial.process.failure()
        if trial.value is None:
            return f"it has logged no {self._plan.monitor}"
        return f"{self._plan.monitor} is not a number"

    def _leave_if_first_was_refused(self, trial: _Trial) -> None:
        """What the first trial is refused for is as a rule wrong in all."""
        mistake = trial.process.user_mistake()
        others = [other for other in self.study.trials if other.number != trial.claim.number]
        if mistake is None or any(other.state.is_finished() or "progress" in other.user_attrs for other in others):
            return
        self.study.forget(trial.claim)
        self._discard = self.study.is_mine_alone()
        raise UserError(f"{trial_name(trial.claim.number)} ({shown(trial.claim.values)}) was refused: {mistake}")

    def _end_all(self) -> None:
        """End what runs; by force at a second Ctrl-C."""
        trials = list(self._running.values())
        try:
            for trial in trials:
                trial.process.end(self._grace_s)
            while any(trial.process.exit_code() is None for trial in trials):
                time.sleep(0.05)
        except KeyboardInterrupt:
            for trial in trials:
                trial.process.kill()


def shown(values: Mapping[str, Value]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)
