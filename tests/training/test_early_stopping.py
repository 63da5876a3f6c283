"""A run whose monitor gets no better ends, and is complete."""

from __future__ import annotations

import json
import math

import pytest

from quiltnet.errors import UserError
from quiltnet.evaluation.outcome import Outcome
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.early_stopping import EarlyStopping, check_early_stopping, evaluations_since_best
from quiltnet.training.engine import fit
from quiltnet.training.loggers import JsonlLogger
from tests.training.test_callbacks import OBJECTIVE, batches, new_state


@pytest.mark.parametrize(
    ("values", "sign", "min_delta", "expected"),
    [
        ([], 1, 0, (0, math.nan)),
        ([0.5], 1, 0, (0, 0.5)),
        ([0.5, 0.6, 0.6, 0.55], 1, 0, (2, 0.6)),
        ([0.5, 0.6, 0.6, 0.55], -1, 0, (3, 0.5)),
        ([0.5, 0.55, 0.58, 0.7], 1, 0.1, (0, 0.7)),
        ([0.5, 0.55, 0.58], 1, 0.1, (2, 0.5)),
        ([math.nan, 0.5, math.nan], 1, 0, (1, 0.5)),
        ([math.nan, math.nan], 1, 0, (2, math.nan)),
    ],
)
def test_evaluations_since_the_best(values, sign, min_delta, expected):
    assert evaluations_since_best(values, sign, min_delta) == pytest.approx(expected, nan_ok=True)


def run(folder, values, *, patience=2, samples_seen=0, total_samples=40):
    """A run of 10 steps that is evaluated after each; ``values`` are what its evaluations give."""
    state, given = new_state(), iter(values)
    state.samples_seen = samples_seen
    logger = JsonlLogger(folder / "metrics.jsonl", samples_seen or None)
    evaluate = Evaluate(
        lambda model: {"set": Outcome({"loss": next(given)})},
        logger,
        every_samples=4,
        results=folder / "results.json",
        evaluators={"set": {}},
        monitor="set/loss",
    )
    stop = EarlyStopping(evaluate, folder / "metrics.jsonl", "set/loss", lower_is_better=True, patience=patience)
    fit(state, batches(), OBJECTIVE, [evaluate, stop], total_samples=total_samples)
    logger.close()
    return state


def test_the_run_ends_and_stays_ended(tmp_path):
    state = run(tmp_path, [5.0, 4.0, 4.5, 4.0, "not reached"])
    assert state.samples_seen == 12 and state.is_complete
    again = run(tmp_path, [], samples_seen=12)
    assert again.samples_seen == 12, "resumed, it trains no further"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["set/loss"] for line in lines] == [5.0, 4.0, 4.5, 4.0]
    assert run(tmp_path, [4.1, 4.2, 4.3], samples_seen=12, patience=5).samples_seen == 24


def test_an_interrupted_run_counts_what_it_had_counted(tmp_path):
    assert run(tmp_path, [5.0, 4.0, 4.5], total_samples=8).is_complete is False
    assert run(tmp_path, [4.0, "not reached"], samples_seen=8).samples_seen == 12


@pytest.mark.parametrize(
    ("monitor", "every", "message"), [(None, 8, "needs a metric"), ("a/b", None, "at the end only")]
)
def test_a_patience_that_cannot_run_out_is_refused(monitor, every, message):
    with pytest.raises(UserError, match=message):
        check_early_stopping(3, monitor, every)
    check_early_stopping(None, monitor, every)
