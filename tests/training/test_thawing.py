"""Towers begin to train at their time: alone and on two ranks, resumed or not, under DDP made anew."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from quiltnet.distributed import rank, world_size
from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning, freeze_waiting, waiting
from quiltnet.model.assembly import build_model
from quiltnet.training.engine import TrainState, fit, start_training
from quiltnet.training.losses import InfoNCE
from quiltnet.training.optim import build_optimizer
from quiltnet.training.placement import Placement
from quiltnet.training.precision import build_accelerator
from quiltnet.training.thawing import Thawing, check_thawing
from tests.model.towers import TINY_IMAGE, TINY_TEXT
from tests.ranks import run_ranks

GRADUAL = Tuning(image="last_n", image_last_n=1, image_thaw_samples=16, text_thaw_samples=24)
TOTAL = 40  # steps of 8


class Pairs:
    """Endless batches of 8, a rank its half, from a place of the stream on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __next__(self) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
        text = torch.randint(1, 8, (8, 12), generator=generator)
        text[:, -1] = 8
        rows = slice(4 * rank(), 4 * rank() + 4) if world_size() > 1 else slice(None)
        return SimpleNamespace(image=image[rows], text=text[rows], second_image=None)


def run(
    tuning: Tuning = GRADUAL,
    *,
    name: str = "adamw",
    placement: Placement | None = None,
    precision: str = "fp32",
    until: int = TOTAL,
    resume: dict[str, Any] | None = None,
) -> TrainState:
    torch.manual_seed(0)
    model = build_model(image={**TINY_IMAGE, "layers": 2}, text=TINY_TEXT, embed_dim=16)
    model.clip.token_embedding = nn.Embedding(9, TINY_TEXT["width"])  # few words: less for the optimiser to do
    apply_tuning(model, tuning)
    optimizer = build_optimizer(model, name=name, lr=1e-3)
    thaw = partial(freeze_waiting, model, waiting(model, tuning))
    thaw(0)
    placement = placement or Placement()
    state = start_training(
        model,
        optimizer,
        lambda seen, step: 1 - seen / 64,
        global_batch_size=8,
        accelerator=build_accelerator(precision, cpu=True),
        placement=placement,
    )
    if resume is not None:
        state.load_state_dict(copy.deepcopy(resume))
    loss = InfoNCE()
    fit(
        state,
        Pairs(state.step),
        lambda features, batch: {"loss": loss(*features[:3])},
        [Thawing(thaw, placement)],
        total_samples=until,
    )
    return state


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.unwrapped.clip.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_tower_trains_from_its_time_on(name):
    begin, image, text, end = (weights(run(name=name, until=until)) for until in (0, 16, 24, TOTAL))
    projections = {"visual.proj", "text_projection", "logit_scale"}
    assert changed(begin, image) == projections  # no weight decay either
    second = changed(image, text)
    assert "visual.ln_post.weight" in second and "token_embedding.weight" not in second
    assert all(".resblocks.1." in n or "ln_post" in n for n in second - projections) and len(second) > 10
    assert changed(begin, end) == {name for name in begin if not name.startswith("visual.")} | second


@pytest.mark.parametrize("stop", [8, 16, 24, 32])
def test_resume_on_either_side_equals_never_stopping(stop):
    straight = run()
    resumed = run(resume=run(until=stop).state_dict())
    assert not changed(weights(straight), weights(resumed))
    ours, theirs = resumed.optimizer.state_dict(), straight.optimizer.state_dict()
    assert [group["lr"] for group in ours["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


def runs_of_a_rank() -> dict[str, Any]:
    straight = run()
    assert isinstance(straight.model, DistributedDataParallel)
    saved = run(until=16).state_dict()
    adapters = Tuning(image="lora", text="lora")
    compressed = Placement(gradient_compression=True)
    return {
        "straight": weights(straight),
        "resumed": weights(run(resume=saved)),
        "compressed": weights(run(placement=compressed)),
        "bf16": weights(run(precision="bf16")),
        "adapters": weights(run(adapters)),
        "sharded adapters": run(adapters, placement=Placement(sharding="fsdp")).state_dict()["weights"],
    }


@pytest.mark.slow
def test_two_ranks_equal_one():
    """Gradients of what thawed are reduced, once: a rank that kept its own would be far off after three steps."""
    first, second = run_ranks(runs_of_a_rank, 2)
    alone, in_bf16 = weights(run()), weights(run(precision="bf16"))
    adapters = weights(run(Tuning(image="lora", text="lora")))
    close = partial(torch.testing.assert_close, rtol=0, atol=2e-5)
    for name in ("straight", "resumed", "compressed", "bf16", "adapters"):
        assert not changed(first[name], second[name]), name
    close(first["straight"], alone)
    assert not changed(first["resumed"], first["straight"])
    close(first["compressed"], alone, atol=2e-3)
    close(first["bf16"], in_bf16, atol=2e-3)
    assert changed(first["bf16"], alone)  # autocast is there after the thaw
    close(first["adapters"], adapters)
    close(first["sharded adapters"], adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": Placement(sharding="fsdp")}, "tuning.image_thaw_samples=16 does not go with placement=fsdp"),
        ({"total_samples": 16}, "tuning.image_thaw_samples=16 is not before the end of the run, at 16 samples"),
    ],
)
def test_what_would_never_thaw_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_thawing({"image": 16, "text": 0}, **{"placement": Placement(), "total_samples": 40, **options})
    check_thawing({"image": 0, "text": 0}, Placement(sharding="fsdp"), 40)
