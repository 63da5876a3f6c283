"""A feature that is not finite ends the run with its step and rank, and leaves the weights as they were."""

from __future__ import annotations

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
from tests.training.test_callbacks import batches


class Poisoned(InfoNCE):
    """A loss that is not finite although the features are."""

    def __call__(self, *args, **options):
        return super().__call__(*args, **options) * torch.nan


def train(bad_rank: int | None = None, bad_step: int = 2, micro_batch_size: int | None = None, loss=None):
    """What the run was ended with, and the largest change of a weight since the last good step."""
    torch.manual_seed(0)
    model = tiny_model()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    state = start_training(model, build_optimizer(model, lr=1e-3), lambda *_: 1.0, global_batch_size=4 * world)
    kept = {}
    encode = model.encode_image

    def encode_image(image):
        features = encode(image)
        step = state.samples_seen // state.global_batch_size + 1
        if step == bad_step:
            kept.update({name: weight.clone() for name, weight in model.clip.state_dict().items()})
            if rank() == bad_rank:
                features = features * torch.tensor([[torch.inf]]) * 0
        return features

    model.encode_image = encode_image
    check = FiniteCheck([4 * world * 4])
    with pytest.raises(UserError) as raised:
        fit(
            state, batches(), Objective(loss or InfoNCE()), [check], total_samples=4 * world * 8,
            micro_batch_size=micro_batch_size
        )  # fmt: skip
    return str(raised.value), state.samples_seen, kept, model.clip.state_dict()


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_bad_feature_is_reported_and_its_step_changes_nothing(micro_batch_size):
    message, samples_seen, *_ = train(bad_rank=0, micro_batch_size=micro_batch_size)
    assert "step 2 (4 samples seen): features of rank 0 are not finite" in message
    assert "pair-0, pair-1, pair-2" in message
    assert samples_seen == 16  # at the next look, not at once: the device is not waited for


def test_weights_stay_as_they_were():
    _, _, before, after = train(bad_rank=0, bad_step=4)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
        assert after[name].isfinite().all()


def test_a_bad_loss_is_told_from_bad_features():
    message, *_ = train(loss=Poisoned())
    assert message.startswith("step 1 (0 samples seen): the features are finite, the loss or its gradient is not")


@pytest.mark.slow
def test_the_rank_is_named():
    for message, _, _before, after in run_ranks(train, 2, 1):
        assert "step 2 (8 samples seen): features of rank 1 are not finite" in message
        assert all(weight.isfinite().all() for weight in after.values())
