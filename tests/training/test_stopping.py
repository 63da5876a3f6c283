"""Signals end a run after a step, on all ranks at the same one; what was cut short is made up for."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from quiltnet.distributed import rank, world_size
from quiltnet.evaluation.outcome import Outcome
from quiltnet.training import stopping as module
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.engine import Callback, fit
from quiltnet.training.loggers import JsonlLogger, LoggerGroup
from quiltnet.training.stopping import RunStopped, Stopping
from tests.ranks import run_ranks
from tests.training.test_callbacks import OBJECTIVE, Recorder, batches, new_state


class Send(Callback):
    """Sends signals to its own process after a step."""

    def __init__(self, *signals: signal.Signals, step: int = 2, of_rank: int = 0) -> None:
        self.signals, self.step, self.of_rank = signals, step, of_rank
        self.saved_at: int | None = None

    def step_end(self, state, batch, metrics):
        if state.step == self.step and rank() == self.of_rank:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def run_stopped(self, state):
        self.saved_at = state.samples_seen


def train(callbacks, stopping, *, samples_seen=0, steps=8):
    """Where the run was when it ended, and with which code; None where it was not stopped."""
    state = new_state()
    state.global_batch_size = 4 * world_size()
    state.samples_seen = samples_seen
    code = None
    with stopping:
        try:
            fit(
                state, batches(), OBJECTIVE, callbacks, total_samples=state.global_batch_size * steps, stopping=stopping
            )
        except RunStopped as stopped:
            code = stopped.code
    return state.samples_seen, code


@pytest.mark.parametrize(
    ("signals", "name", "code"),
    [
        ([signal.SIGTERM], "SIGTERM", 75),
        ([signal.SIGUSR1], "SIGUSR1", 75),
        ([signal.SIGINT], "Ctrl-C", 130),
        ([signal.SIGINT, signal.SIGINT], "Ctrl-C", 130),  # from the terminal, and once more from torchrun
        ([signal.SIGTERM, signal.SIGTERM], "SIGTERM", 75),
    ],
)
def test_a_signal_ends_the_run_after_its_step(capfd, signals, name, code):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    stopping, send = Stopping(), Send(*signals)
    assert train([send], stopping) == (8, code)
    assert send.saved_at == 8 and stopping.signal_name == name
    assert "saving" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_second_interrupt_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(module, "_SAME_INTERRUPT_S", -1.0)
    send = Send(signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train([send], Stopping())
    assert send.saved_at is None


def test_a_signal_in_the_last_step_changes_nothing():
    assert train([Send(signal.SIGTERM, step=8)], Stopping()) == (32, None)


def test_a_thread_trains_without_hearing_signals():
    results = []
    thread = threading.Thread(target=lambda: results.append(train([], Stopping(), steps=2)))
    thread.start()
    thread.join()
    assert results == [(8, None)]


def evaluating(folder: Path, stopping: Stopping, resumed_at: int | None, asked_at: int | None):
    """Evaluates every 8 samples; a SIGTERM comes within the evaluation that is the ``asked_at``-th of this start."""
    made = []

    def measure(model):
        made.append(None)
        for _ in range(3):  # batches
            if len(made) == asked_at:
                os.kill(os.getpid(), signal.SIGTERM)
            stopping.cut_evaluation()
        return {"set": Outcome({"scale": model.logit_scale.item()})}

    logger = LoggerGroup([JsonlLogger(folder / "metrics.jsonl", resumed_at)])
    return Evaluate(measure, logger, every_samples=8, results=folder / "results.json", evaluators={"set": {}})


@pytest.mark.parametrize(("asked_at", "stopped_at"), [(1, 0), (2, 8), (5, 32)], ids=["first", "middle", "last"])
def test_an_evaluation_that_was_cut_short_is_made_by_the_run_that_goes_on(tmp_path, asked_at, stopped_at):
    stopping = Stopping()
    cut = evaluating(tmp_path, stopping, None, asked_at)
    assert train([cut], stopping) == (stopped_at, 75)
    assert stopping.owes_evaluation
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples_seen"] for line in lines] == list(range(0, stopped_at, 8)), "it left no trace"

    stopping = Stopping()
    again = evaluating(tmp_path, stopping, stopped_at, None)
    assert train([again], stopping, samples_seen=stopped_at) == (32, None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples_seen"] for line in lines] == [0, 8, 16, 24, 32]
    assert again.was_owed is (stopped_at > 0)
    assert json.loads((tmp_path / "results.json").read_text())["samples_seen"] == 32


def stop_on_ranks(folder: str):
    """Only rank 1 is told; and then, in another run, only rank 0 within an evaluation."""
    stopping = Stopping()
    at_step = train([Send(signal.SIGUSR1, of_rank=1)], stopping)
    name, stopping = stopping.signal_name, Stopping()
    evaluate = evaluating(Path(folder), stopping, None, 2 if rank() == 0 else None)
    evaluate.logger = Recorder()
    return at_step, name, train([evaluate], stopping), len(evaluate.logger)


@pytest.mark.slow
def test_ranks_stop_at_the_same_step(tmp_path):
    first, second = run_ranks(stop_on_ranks, 2, str(tmp_path))
    assert first == second
    at_step, name, in_evaluation, evaluations = first
    assert at_step == (24, 75) and name == "SIGUSR1", "a step after the one that the signal fell into"
    assert in_evaluation == (8, 75) and evaluations == 1, "that of step 1 was cut"
