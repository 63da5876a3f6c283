"""Steps that are not finite are skipped, counted and named, and a run that makes no others ends."""

from __future__ import annotations

import json

import pytest
import torch

from quiltnet.distributed import rank
from quiltnet.errors import UserError
from quiltnet.training.engine import fit, start_training
from quiltnet.training.finite_check import FiniteCheck
from quiltnet.training.losses import InfoNCE
from quiltnet.training.objective import Objective
from quiltnet.training.optim import build_optimizer
from tests.model.towers import tiny_model
from tests.ranks import run_ranks
from tests.training.test_callbacks import Recorder, batches


class Poisoned(InfoNCE):
    """A loss that is not finite although the features are."""

    def __call__(self, *args, **options):
        return super().__call__(*args, **options) * torch.nan


def train(folder, bad_rank=None, bad_steps=(2,), max_in_a_row=1, micro_batch_size=None, loss=None, steps=8, looks=4):
    """What the run was ended with, its clock, its log, and the weights before the last bad step and at the end."""
    torch.manual_seed(0)
    model = tiny_model()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    state = start_training(model, build_optimizer(model, lr=1e-3), lambda *_: 1.0, global_batch_size=4 * world)
    kept, recorder = {}, Recorder()
    encode = model.encode_image

    def encode_image(image):
        features = encode(image)
        if state.samples_seen // state.global_batch_size + 1 in bad_steps:
            kept.update({name: weight.clone() for name, weight in model.clip.state_dict().items()})
            if rank() == bad_rank:
                features = features * torch.tensor([[torch.inf]]) * 0
        return features

    model.encode_image = encode_image
    check = FiniteCheck(folder / "nonfinite.jsonl", recorder, [4 * world * looks], max_in_a_row=max_in_a_row)
    message = ""
    try:
        fit(
            state, batches(), Objective(loss or InfoNCE()), [check], total_samples=4 * world * steps,
            micro_batch_size=micro_batch_size
        )  # fmt: skip
    except UserError as error:
        message = str(error)
    return message, state.samples_seen, list(recorder), kept, model.clip.state_dict()


def rows(folder):
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_bad_feature_is_reported_and_its_step_changes_nothing(tmp_path, micro_batch_size):
    message, samples_seen, *_ = train(tmp_path, bad_rank=0, micro_batch_size=micro_batch_size)
    assert message.startswith("step 2 (8 samples seen): features of rank 0 are not finite")
    assert "pair-0, pair-1, pair-2" in message and str(tmp_path / "nonfinite.jsonl") in message
    assert samples_seen == 16  # at the next look, not at once: the device is not waited for


def test_weights_stay_as_they_were(tmp_path):
    *_, before, after = train(tmp_path, bad_rank=0, bad_steps=[4])
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
        assert after[name].isfinite().all()


def test_a_bad_loss_is_told_from_bad_features(tmp_path):
    message, *_ = train(tmp_path, loss=Poisoned())
    assert message.startswith("step 1 (4 samples seen): the features are finite, the loss or its gradient is not")


def test_single_steps_are_skipped_and_counted(tmp_path):
    message, samples_seen, logged, _, after = train(tmp_path, bad_rank=0, bad_steps=[2, 3, 5, 7, 8], max_in_a_row=3)
    assert message == "" and samples_seen == 32
    assert logged == [(16, {"train/skipped_steps": 2}), (32, {"train/skipped_steps": 5})]
    assert [row["step"] for row in rows(tmp_path)] == [2, 3, 5, 7, 8]
    assert rows(tmp_path)[0]["keys"] == [["pair-0", "pair-1", "pair-2", "pair-3"]]
    assert all(weight.isfinite().all() for weight in after.values())


def test_a_row_of_them_goes_on_over_looks(tmp_path):
    message, samples_seen, *_ = train(tmp_path, bad_rank=0, bad_steps=[4, 5, 6], max_in_a_row=3)
    assert "3 steps in a row were not finite. The last, step 6 (24 samples seen)" in message
    assert samples_seen == 32
    assert len(rows(tmp_path)) == 3


def test_a_resumed_run_counts_on(tmp_path):
    train(tmp_path, bad_rank=0, bad_steps=[1, 3, 4, 6], max_in_a_row=9)
    check = FiniteCheck(tmp_path / "nonfinite.jsonl", Recorder(), [16], max_in_a_row=9)
    model = tiny_model()
    state = start_training(model, build_optimizer(model, lr=1e-3), lambda *_: 1.0, global_batch_size=4)
    state.samples_seen = 16  # from the checkpoint of the fourth step
    check.fit_start(state)
    assert (check.skipped, check._in_a_row) == (3, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4], "what is done again is counted again"


@pytest.mark.slow
def test_the_rank_is_named(tmp_path):
    for message, _, _, _before, after in run_ranks(train, 2, tmp_path, 1):
        assert message.startswith("step 2 (16 samples seen): features of rank 1 are not finite")
        assert all(weight.isfinite().all() for weight in after.values())
    assert rows(tmp_path)[0]["ranks_with_bad_features"] == [1] and len(rows(tmp_path)[0]["keys"]) == 2
