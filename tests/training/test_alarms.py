"""The alarm rings when a model gets worse at what it could, once an evaluation, and changes nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.comparison import lower_is_better
from quiltnet.evaluation.outcome import Outcome
from quiltnet.training.alarms import RegressionAlarm, check_alarm
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.retention import Retention
from quiltnet.training.saving import SaveCheckpoint
from tests.training.test_callbacks import OBJECTIVE, Recorder, batches, fit, new_state

ACCURACY, LOSS = "general/accuracy", "general/loss"
FALLING = [(0.9, 1.0), (0.89, 1.0), (0.5, 1.5), (0.5, 1.01), (0.95, 0.5)]  # before the first step, after each


def run(folder, scores=FALLING, recorder=None, metrics=(ACCURACY, LOSS), every_samples=4, steps=4, **options):
    """A run of 4 steps whose evaluations find ``scores``, (accuracy, loss) each."""
    recorder = Recorder() if recorder is None else recorder
    left = iter(scores)

    def measure(model):
        scores = dict(zip(("accuracy", "loss"), next(left), strict=False))
        return {"general": Outcome(scores)}

    evaluate = Evaluate(
        measure, recorder, every_samples=every_samples, results=folder / "results.json", evaluators={"general": {}}
    )
    alarm = RegressionAlarm(evaluate, recorder, metrics=metrics, lower_is_better=lower_is_better, **options)
    state = new_state()
    torch.manual_seed(5)
    callbacks = [evaluate, alarm, SaveCheckpoint(folder / "checkpoints", 4, Retention(newest=9))]
    fit(state, batches(), OBJECTIVE, callbacks, total_samples=4 * steps)
    return state


def alarms(recorder) -> list[tuple[int, dict[str, float]]]:
    return [(samples, line) for samples, line in recorder if any(name.startswith("alarm/") for name in line)]


def test_a_fall_below_the_start_is_told_once_an_evaluation(tmp_path, caplog):
    recorder = Recorder()
    run(tmp_path, recorder=recorder)
    assert alarms(recorder) == [
        (8, {f"alarm/{ACCURACY}": pytest.approx(0.4), f"alarm/{LOSS}": pytest.approx(0.5)}),
        (12, {f"alarm/{ACCURACY}": pytest.approx(0.4)}),
    ]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "general/accuracy is 0.5, 0.4 worse than the 0.9 of the start" in said[0]
    assert "quiltnet merge" in said[0] and "optim.lr" in said[0]


def test_between_evaluations_nothing_is_said(tmp_path):
    recorder = Recorder()
    run(tmp_path, [(0.9, 1.0), (0.1, 9.0), (0.85, 1.0)], recorder, every_samples=8, steps=3, margin=0.1)
    assert [samples for samples, _ in alarms(recorder)] == [8]


def test_nan_is_worse_than_anything_and_what_was_left_out_is_not_judged(tmp_path):
    recorder = Recorder()
    run(tmp_path, [(0.9, 1.0), (float("nan"), 1.0), (0.9,), (0.1,), (0.9, 1.0)], recorder)
    assert [(samples, list(line)) for samples, line in alarms(recorder)] == [
        (4, [f"alarm/{ACCURACY}"]), (12, [f"alarm/{ACCURACY}"])
    ]  # fmt: skip


def test_it_can_stop_the_run(tmp_path):
    with pytest.raises(UserError, match=r"stopped by callbacks\.alarm after 8 samples: general/accuracy is 0.5"):
        run(tmp_path, stop=True)
    assert [path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()] == ["04"]
    assert json.loads((tmp_path / "results.json").read_text())["last"][ACCURACY] == 0.5


def test_the_end_is_not_stopped(tmp_path):
    state = run(tmp_path, [(0.9, 1.0), (0.1, 1.0)], every_samples=None, stop=True)
    assert state.samples_seen == 16 and (tmp_path / "checkpoints" / "samples-000000000016").exists()


def test_it_leaves_training_alone(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    watched, other = run(tmp_path / "a"), run(tmp_path / "b", metrics=())
    weights = [state.state_dict()["weights"] for state in (watched, other)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_what_an_earlier_part_of_the_run_was_told_is_not_told_again(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps({"samples_seen": 4, "start": {ACCURACY: 0.9}, "last": {ACCURACY: 0.1}})
    )
    recorder = Recorder()
    evaluate = Evaluate(None, recorder, every_samples=4, results=tmp_path / "results.json", evaluators={"general": {}})
    alarm = RegressionAlarm(evaluate, recorder, metrics=[ACCURACY], lower_is_better=lower_is_better)
    state = new_state()
    state.samples_seen = 4
    for callback in (evaluate, alarm):
        callback.fit_start(state)
    alarm.step_end(state, None, {})
    assert recorder == []


def test_a_metric_that_nobody_measures(tmp_path):
    with pytest.raises(UserError, match=r"names general/acc, .* measured were general/accuracy, general/loss"):
        run(tmp_path, metrics=["general/acc"])
    check_alarm(["general/accuracy", "general@ema/loss"], {"general": None})
    with pytest.raises(UserError, match=r"other/loss must be evaluator/metric .* \(general\)"):
        check_alarm(["other/loss"], ["general"])
