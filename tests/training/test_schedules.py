"""Schedules against their definitions and against transformers', timm's and open_clip's of the same name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from open_clip_train.scheduler import cosine_lr
from timm.scheduler import CosineLRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from quiltnet.errors import UserError
from quiltnet.training.schedules import WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay

STEPS, WARMUP, BATCH = 60, 7, 16
SPAN = {"total_samples": STEPS * BATCH, "warmup_samples": WARMUP * BATCH}


def ours(schedule: Any) -> list[float]:
    return [schedule(step * BATCH, BATCH) for step in range(STEPS)]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)


def wsd(optimizer: torch.optim.Optimizer, warmup: int, steps: int, shape: str) -> Any:
    return get_wsd_schedule(optimizer, warmup, 12, steps, decay_type=shape, min_lr_ratio=0.1)


PEERS = {
    "cosine": (WarmupCosine(**SPAN), get_cosine_schedule_with_warmup),
    "linear": (WarmupLinear(**SPAN), get_linear_schedule_with_warmup),
    "constant": (
        WarmupConstant(**SPAN),
        lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
    ),
    **{
        f"wsd {shape}": (
            WarmupStableDecay(**SPAN, decay_share=0.2, decay_shape=shape, final_factor=0.1),
            lambda optimizer, warmup, steps, shape=shape: wsd(optimizer, warmup, steps, shape),
        )
        for shape in ("linear", "cosine", "1-sqrt")
    },
}


@pytest.mark.parametrize("name", PEERS)
def test_every_step_is_transformers(name):
    """Whose warm-up begins with a step at rate 0; ours is one step ahead there."""
    schedule, build_peer = PEERS[name]
    moved = optimizer()
    peer = build_peer(moved, WARMUP, STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(moved.param_groups[0]["lr"])
        moved.step()
        peer.step()
    factors = ours(schedule)
    if "wsd" in name:  # transformers' warm-up begins at the lowest rate, not at 0
        expected[:WARMUP] = [step / WARMUP for step in range(WARMUP)]
    assert factors[:WARMUP] == pytest.approx([*expected[1:WARMUP], 1.0])
    assert factors[WARMUP:] == pytest.approx(expected[WARMUP:], abs=1e-12)


def test_cosine_is_open_clips_and_timms():
    moved = optimizer()
    open_clips, timms = (
        cosine_lr(moved, 1.0, WARMUP, STEPS),
        CosineLRScheduler(optimizer(), STEPS - WARMUP, lr_min=0.0, warmup_t=WARMUP, warmup_prefix=True),
    )
    factors = ours(WarmupCosine(**SPAN))
    assert factors == pytest.approx([open_clips(step) for step in range(STEPS)])
    assert factors[WARMUP:] == pytest.approx([timms._get_lr(step)[0] for step in range(WARMUP, STEPS)])


def test_final_factor_is_reached_and_kept():
    for schedule in (WarmupCosine(**SPAN, final_factor=0.1), WarmupLinear(**SPAN, final_factor=0.1)):
        assert schedule(SPAN["total_samples"], BATCH) == pytest.approx(0.1)
        assert schedule(2 * SPAN["total_samples"], BATCH) == pytest.approx(0.1)
        halfway = (SPAN["total_samples"] + SPAN["warmup_samples"]) // 2
        assert schedule(halfway, BATCH) == pytest.approx(0.55)


def test_without_warmup_the_first_step_has_the_full_rate():
    for build in (WarmupCosine, WarmupLinear, WarmupConstant, WarmupStableDecay):
        assert build(total_samples=100, warmup_samples=0)(0, 10) == 1.0


def test_the_step_that_crosses_the_end_of_the_warmup_has_the_full_rate():
    assert WarmupCosine(total_samples=100, warmup_samples=15)(10, 10) == 1.0


def test_before_its_decay_wsd_does_not_know_the_end():
    short = WarmupStableDecay(total_samples=1000, warmup_samples=100)
    long = WarmupStableDecay(total_samples=5000, warmup_samples=100)
    assert [short(seen, 10) for seen in range(0, 810, 10)] == [long(seen, 10) for seen in range(0, 810, 10)]
    assert short(900, 10) == pytest.approx(1 - math.sqrt(0.5))


@pytest.mark.parametrize("build", [WarmupCosine, WarmupLinear, WarmupConstant, WarmupStableDecay])
def test_warmup_longer_than_the_run_is_refused(build):
    with pytest.raises(UserError, match="less than total_samples"):
        build(total_samples=100, warmup_samples=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_share": 0.0}, "decay_share=0.0 must be greater than 0"),
        ({"decay_share": 0.95}, "leave the warm-up alone"),
        ({"decay_shape": "sqrt"}, "decay_shape='sqrt': choose one of linear, cosine, 1-sqrt"),
    ],
)
def test_a_decay_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        WarmupStableDecay(total_samples=1000, warmup_samples=100, **options)
