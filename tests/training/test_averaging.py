"""The moving average is its definition, resumes exactly, and moves with steps that were taken alone."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning
from quiltnet.training.averaging import Averaging, WeightAverage, check_averaging
from quiltnet.training.checkpoint import load_checkpoint, save_checkpoint
from quiltnet.training.engine import TrainState, fit, start_training, train_step
from quiltnet.training.optim import build_optimizer
from tests.model.towers import tiny_model
from tests.ranks import run_ranks
from tests.training.test_callbacks import OBJECTIVE, batches

AVERAGING = Averaging(decay=0.6)


def new_state(averaging=AVERAGING, model=None) -> TrainState:
    model = model or tiny_model()
    optimizer = build_optimizer(model, lr=1e-3)
    return start_training(model, optimizer, lambda *_: 1.0, global_batch_size=4, averaging=averaging)


def copied(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


def expected(course: list[dict[str, torch.Tensor]], averaging: Averaging) -> dict[str, torch.Tensor]:
    """The definition, in float64: of the weights after each step."""
    average = {name: tensor.double() for name, tensor in course[0].items()}
    for step, weights in enumerate(course[1:], start=2):
        decay = min(averaging.decay, 1 - step ** (-2 / 3)) if averaging.warmup else averaging.decay
        average = {name: decay * average[name] + (1 - decay) * tensor.double() for name, tensor in weights.items()}
    return average


@pytest.mark.parametrize("averaging", [AVERAGING, Averaging(decay=0.6, warmup=False)])
def test_the_average_is_its_definition(averaging):
    state, course, stream = new_state(averaging), [], batches()
    for _ in range(5):
        train_step(state, next(stream), OBJECTIVE)
        course.append(copied(state.model.clip))
    average = {name: tensor.double() for name, tensor in state.average.module.clip.state_dict().items()}
    torch.testing.assert_close(average, expected(course, averaging), rtol=1e-6, atol=1e-7)
    assert not torch.equal(average["logit_scale"], course[-1]["logit_scale"].double())
    assert not state.average.module.training
    assert not any(parameter.requires_grad for parameter in state.average.module.parameters())


def test_a_step_that_was_not_taken_moves_nothing():
    def broken(features, batch):
        return {"loss": OBJECTIVE(features, batch)["loss"] * float("nan")}

    state, stream = new_state(), batches()
    for _ in range(2):
        train_step(state, next(stream), OBJECTIVE)
    before = copied(state.average.module.clip)
    assert not train_step(state, next(stream), broken)["finite_step"]
    torch.testing.assert_close(dict(state.average.module.clip.state_dict()), before, rtol=0, atol=0)
    train_step(state, next(stream), OBJECTIVE)
    assert not torch.equal(state.average.module.clip.logit_scale, before["logit_scale"])


def test_what_does_not_train_stays_and_counts_are_copied():
    model = tiny_model()
    model.clip.visual.requires_grad_(False)
    model.clip.counts = nn.BatchNorm1d(3)
    model.clip.counts.requires_grad_(False)
    frozen = copied(model.clip.visual)
    state, stream = new_state(model=model), batches()
    for _ in range(3):
        model.clip.counts.num_batches_tracked += 7
        train_step(state, next(stream), OBJECTIVE)
    average = state.average.module.clip
    torch.testing.assert_close(copied(average.visual), frozen, rtol=0, atol=0)
    assert average.counts.num_batches_tracked == 21


def test_adapters_are_averaged_and_what_they_adapt_stays():
    model = tiny_model()
    apply_tuning(model, Tuning(image="lora", text="lora", lora_rank=2))
    before = copied(model.clip)
    state, stream = new_state(model=model), batches()
    for _ in range(3):
        train_step(state, next(stream), OBJECTIVE)
    trained = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    assert any("lora" in name for name in trained)
    for name, tensor in state.average.module.clip.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_resumed_equals_unbroken_bit_for_bit(tmp_path):
    straight = new_state()
    fit(straight, batches(), OBJECTIVE, [], total_samples=24)
    first, stream = new_state(), batches()
    fit(first, stream, OBJECTIVE, [], total_samples=12)
    folder = save_checkpoint(tmp_path, first.state_dict())
    resumed = new_state(model=shaken(tiny_model()))
    resumed.load_state_dict(load_checkpoint(folder))
    fit(resumed, stream, OBJECTIVE, [], total_samples=24)
    ends = [state.state_dict() for state in (resumed, straight)]
    for part in ("weights", "average"):
        torch.testing.assert_close(*(end[part] for end in ends), rtol=0, atol=0)
    torch.testing.assert_close(*(end["optimizer"]["state"] for end in ends), rtol=0, atol=0)


def test_an_average_can_begin_and_end_at_a_checkpoint(caplog):
    plain, averaged = new_state(averaging=None), new_state()
    fit(plain, batches(), OBJECTIVE, [], total_samples=8)
    fit(averaged, batches(), OBJECTIVE, [], total_samples=8)
    with caplog.at_level(logging.WARNING):
        averaged.load_state_dict(plain.state_dict())
        plain.load_state_dict(averaged.state_dict())
    assert "the average begins with its weights" in caplog.text and "left behind" in caplog.text
    torch.testing.assert_close(copied(averaged.average.module.clip), copied(plain.model.clip), rtol=0, atol=0)


@pytest.mark.parametrize(
    "averaging, sharding, message",
    [(Averaging(1.0), "ddp", "1.0 must lie between 0 and 1"), (Averaging(), "fsdp", "use ddp")],
)
def test_what_cannot_be_averaged_is_refused(averaging, sharding, message):
    with pytest.raises(UserError, match=message):
        check_averaging(averaging, sharding)


def test_the_copy_is_of_its_own():
    model = tiny_model()
    average = WeightAverage(model, AVERAGING)
    average.restart(model)
    with torch.no_grad():
        model.clip.logit_scale.fill_(1.0)
    assert average.module.clip.logit_scale != 1.0


@pytest.mark.slow  # starts two processes
def test_ranks_have_the_same_average_as_one_process():
    one = _average_of_halves()
    first, second = run_ranks(_average_of_halves, 2)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)


def _average_of_halves() -> dict[str, torch.Tensor]:
    """Three steps over four pairs, this rank's share of them two at a time through GradCache."""
    from quiltnet.distributed import rank, world_size

    state, stream = new_state(), batches()
    share = slice(4 // world_size() * rank(), 4 // world_size() * (rank() + 1))
    for _ in range(3):
        batch = next(stream)
        for name in ("image", "text", "image_id", "caption_id"):
            setattr(batch, name, getattr(batch, name)[share])
        train_step(state, batch, OBJECTIVE, micro_batch_size=2)
    return copied(state.average.module.clip)
