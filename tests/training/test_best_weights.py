"""The best checkpoint's weights are what the run is judged by."""

from __future__ import annotations

import json

from quiltnet.evaluation.outcome import Outcome
from quiltnet.training.best_weights import RestoreBest
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.checkpoint import load_checkpoint
from quiltnet.training.engine import fit
from quiltnet.training.retention import Retention
from quiltnet.training.saving import SaveCheckpoint
from tests.training.test_callbacks import OBJECTIVE, Recorder, batches, new_state

# By samples seen: the best lies in the middle, and is measured again at the end.
LOSSES = {0: 5.0, 4: 4.0, 8: 3.0, 12: 3.5, 16: 4.5}


def run(folder, resumed_at=None):
    state, measured = new_state(), []
    if resumed_at is not None:
        state.load_state_dict(load_checkpoint(folder / "checkpoints" / f"samples-{resumed_at:012d}"))

    def measure(model):
        scale = model.logit_scale.item()
        at = next((at for at, known in scales.items() if known == scale), state.samples_seen)
        scales.setdefault(at, scale)
        measured.append(at)
        return {"set": Outcome({"loss": LOSSES[at]})}

    scales: dict[int, float] = {}
    evaluate = Evaluate(
        measure, Recorder(), every_samples=4, results=folder / "results.json", evaluators={"set": {}},
        monitor="set/loss",
    )  # fmt: skip
    save = SaveCheckpoint(
        folder / "checkpoints", 16, Retention(1, 1), evaluate=evaluate, monitor="set/loss", lower_is_better=True
    )
    fit(state, batches(), OBJECTIVE, [evaluate, save, RestoreBest(evaluate, save.root)], total_samples=16)
    return state, evaluate, measured


def test_the_best_weights_are_evaluated_at_the_end(tmp_path):
    state, evaluate, measured = run(tmp_path)
    assert measured == [0, 4, 8, 12, 16, 8], "the weights after 8 samples are in the model"
    assert state.samples_seen == 16
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best"] == {"samples_seen": 8, "scores": {"set/loss": 3.0}}
    assert results["last"] == {"set/loss": 4.5} and results["samples_seen"] == 16
    assert evaluate.final == {"set/loss": 3.0} and evaluate.final_outcomes["set"].scores == {"loss": 3.0}

    _, again, measured = run(tmp_path, resumed_at=16)
    assert measured == [], "a complete run that is started again stays as it is"
    assert again.final == {"set/loss": 3.0}
    assert json.loads((tmp_path / "results.json").read_text()) == results
