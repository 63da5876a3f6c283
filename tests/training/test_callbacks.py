"""Callbacks account for what happens and leave the course of training alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import PatchDropout

from quiltnet.errors import UserError
from quiltnet.evaluation.measuring import measure
from quiltnet.evaluation.outcome import Outcome
from quiltnet.training.averaging import Averaging
from quiltnet.training.callbacks import Evaluate, LogMetrics
from quiltnet.training.engine import TrainState, fit, start_training
from quiltnet.training.loggers import LoggerGroup
from quiltnet.training.losses import InfoNCE
from quiltnet.training.objective import Objective
from quiltnet.training.optim import build_optimizer
from quiltnet.training.quarantine import Quarantine
from tests.model.towers import tiny_model

OBJECTIVE = Objective(InfoNCE())


class Recorder(list):
    def log(self, metrics, samples_seen):
        self.append((samples_seen, dict(metrics)))

    def close(self):
        self.append("closed")


class Noise:
    """An evaluator that would disturb training if it could: it draws, and leaves the model's mode changed."""

    split = "val"

    def run(self, encoder):
        assert not encoder.model.training and not torch.is_grad_enabled()
        encoder.model.train()
        return Outcome({"value": torch.rand(()).item()}, details={"drawn": 1})


def measure_noise(model):
    return measure(model, {"noise": Noise()})


def evaluate_noise(recorder, folder, monitor=None, every_samples=None):
    return Evaluate(
        measure_noise,
        recorder,
        every_samples=every_samples,
        results=folder / "results.json",
        evaluators={"noise": {"of": "noise"}},
        monitor=monitor,
    )


def batches(batch_size=4, rejected=()):
    generator = torch.Generator().manual_seed(0)
    while True:
        image = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        text = torch.randint(1, 1000, (batch_size, 12), generator=generator)
        ids = torch.arange(batch_size)
        yield SimpleNamespace(
            image=image,
            text=text,
            second_image=None,
            image_id=ids,
            caption_id=ids,
            key=[f"pair-{number}" for number in range(batch_size)],
            rejected=list(rejected),
        )


def new_state(averaging: Averaging | None = None, **options) -> TrainState:
    model = tiny_model(**options)
    optimizer = build_optimizer(model, lr=1e-3)
    return start_training(model, optimizer, lambda *_: 1.0, global_batch_size=4, averaging=averaging)


def train(callbacks, steps=4, rejected=()) -> TrainState:
    torch.manual_seed(5)
    state = new_state()
    state.model.clip.visual.patch_dropout = PatchDropout(0.5)
    fit(state, batches(rejected=rejected), OBJECTIVE, callbacks, total_samples=4 * steps)
    return state


def test_evaluation_does_not_change_training(tmp_path):
    silent = train([])
    recorder = Recorder()
    watched = train([evaluate_noise(recorder, tmp_path, every_samples=4)])
    torch.testing.assert_close(watched.state_dict()["weights"], silent.state_dict()["weights"], rtol=0, atol=0)
    assert [samples for samples, _ in recorder] == [0, 4, 8, 12, 16], "start, every step, and the end once"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["start"] == recorder[0][1] and results["last"] == recorder[-1][1]
    assert results["evaluators"] == {"noise": {"of": "noise"}}
    assert results["outcomes"]["noise"]["drawn"] == 1


def test_averaged_weights_are_measured_beside_the_others(tmp_path):
    class Scale:
        split = "val"

        def run(self, encoder):
            return Outcome({"value": encoder.model.logit_scale.item()})

    recorder, state = Recorder(), new_state(Averaging(decay=0.9))
    evaluate = Evaluate(
        lambda model: measure(model, {"scale": Scale()}),
        recorder,
        every_samples=8,
        results=tmp_path / "results.json",
        evaluators={"scale": {}},
        monitor="scale@ema/value",
    )
    fit(state, batches(), OBJECTIVE, [evaluate], total_samples=16)
    raw, averaged = state.model.logit_scale.item(), state.average.module.logit_scale.item()
    assert evaluate.last == {"scale/value": raw, "scale@ema/value": averaged} and raw != averaged
    assert evaluate.start["scale/value"] == evaluate.start["scale@ema/value"]
    assert evaluate.last_outcomes["scale@ema"].scores == {"value": averaged}
    assert [list(line) for _, line in recorder] == [["scale/value", "scale@ema/value"]] * 3
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["last"] == evaluate.last and list(results["outcomes"]) == ["scale", "scale@ema"]
    assert state.model.training and not state.average.module.training


def test_a_monitor_that_nobody_measures_ends_the_run_at_its_start(tmp_path):
    callback = evaluate_noise(Recorder(), tmp_path, monitor="noise/accuracy")
    with pytest.raises(UserError, match="noise/accuracy is not among what the evaluators measure: noise/value"):
        callback.fit_start(new_state())


def test_log_means_over_the_window():
    recorder = Recorder()
    train([LogMetrics(LoggerGroup([recorder]), every_samples=8, samples_per_epoch=10)], steps=5)
    assert [samples for samples, _ in recorder] == [8, 16, 20]
    line = recorder[0][1]
    assert line["train/epoch"] == pytest.approx(0.8)
    assert line["train/learning_rate"] == pytest.approx(1e-3)
    assert 0 <= line["data/wait_share"] <= 1
    assert {"train/loss", "train/logit_scale", "train/grad_norm", "train/samples_per_s"} <= line.keys()


def test_quarantine_counts_by_reason_and_lists_keys(tmp_path):
    recorder, path = Recorder(), tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, recorder, every_samples=[8], max_fraction=0.5, missing={"a.tar": 3})
    train([quarantine], rejected=[("key1", "broken_image"), ("key2", "no_caption")])
    assert recorder[0] == (0, {"data/missing_samples": 3})
    assert recorder[-1][1] == {
        "data/bad_samples": 8,
        "data/bad_samples_broken_image": 4,
        "data/bad_samples_no_caption": 4,
    }
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"samples_seen": 0, "key": "a.tar", "reason": "missing_from_tar", "samples": 3}
    assert [row["key"] for row in rows[1:]] == ["key1", "key2"] * 4


def test_too_many_broken_samples_end_the_run(tmp_path):
    rejected = [(f"key{i}", "broken_image") for i in range(4)]
    quarantine = Quarantine(tmp_path / "q.jsonl", Recorder(), every_samples=[4], max_fraction=0.01)
    with pytest.raises(UserError, match=r"12 of 12 samples were broken.*max_bad_fraction=0.01"):
        train([quarantine], rejected=rejected)


def test_results_that_cannot_be_written_are_told_and_training_goes_on(tmp_path, caplog):
    recorder, folder = Recorder(), tmp_path / "gone"
    train([evaluate_noise(recorder, folder, every_samples=8)])
    assert [at for at, _ in recorder] == [0, 8, 16]
    assert caplog.text.count("results.json could not be written") == 3
    folder.mkdir()
    train([evaluate_noise(recorder, folder)])
    assert json.loads((folder / "results.json").read_text())["samples_seen"] == 16


def test_a_resumed_quarantine_goes_on_counting(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    train([Quarantine(path, Recorder(), every_samples=[4], max_fraction=1)], rejected=[("k", "no_image")])
    recorder, state = Recorder(), new_state()
    state.samples_seen = 8  # the checkpoint was made there, the run went on to 16
    again = Quarantine(path, recorder, every_samples=[4], max_fraction=1)
    fit(state, batches(rejected=[("k", "no_image")]), OBJECTIVE, [again], total_samples=16)
    assert recorder[-1] == (16, {"data/bad_samples": 4, "data/bad_samples_no_image": 4})


def test_missing_samples_are_written_down_once(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    for samples_seen, lines in ((0, 1), (8, 0)):
        recorder, state = Recorder(), new_state()
        state.samples_seen = samples_seen
        quarantine = Quarantine(path, recorder, every_samples=[4], max_fraction=1, missing={"a.tar": 3})
        quarantine.fit_start(state)
        assert len(recorder) == lines and not quarantine.counts
    assert len(path.read_text().splitlines()) == 1


def test_scale_is_clamped_and_gradients_are_clipped():
    state = new_state()
    state.model.clip.logit_scale.data.fill_(8.0)
    fit(state, batches(), OBJECTIVE, [], total_samples=4, max_grad_norm=1e-3)
    assert state.model.logit_scale.item() == pytest.approx(100)
    assert state.step == 1
