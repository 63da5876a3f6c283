"""What a step refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quiltnet.errors import UserError
from quiltnet.training.engine import start_training, train_step
from quiltnet.training.optim import build_optimizer
from tests.model.towers import tiny_model
from tests.training.test_callbacks import OBJECTIVE, batches, new_state


def test_a_parameter_that_nothing_depends_on_ends_the_run_before_the_first_step():
    model = tiny_model()
    model.clip.visual.idle = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = build_optimizer(model, lr=1e-3)
    state = start_training(model, optimizer, lambda *_: 1.0, global_batch_size=4)
    before = model.clip.text_projection.clone()
    with pytest.raises(UserError, match=r"clip.visual.idle.0.weight, .*idle.1.weight and 1 more.*does not depend"):
        train_step(state, next(batches()), OBJECTIVE)
    assert torch.equal(model.clip.text_projection, before) and state.samples_seen == 0


def test_what_is_thawed_later_is_looked_at_then():
    state, stream = new_state(), batches()
    state.model.clip.idle = nn.Linear(2, 2).requires_grad_(False)
    train_step(state, next(stream), OBJECTIVE)
    state.model.clip.idle.requires_grad_(True)
    with pytest.raises(UserError, match=r"no gradient reaches clip.idle.weight, clip.idle.bias"):
        train_step(state, next(stream), OBJECTIVE)
