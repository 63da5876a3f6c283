"""BatchNorm's statistics of the training images: by a slow definition, on two ranks, before the first step only."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quiltnet.distributed import rank, world_size
from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training import batchnorm
from quiltnet.training.averaging import Averaging
from quiltnet.training.batchnorm import AdaptBatchNorm, adapt_statistics, check_adapting, first_images
from quiltnet.training.checkpoint import load_checkpoint
from quiltnet.training.engine import TrainState, start_training
from quiltnet.training.optim import build_optimizer
from quiltnet.training.placement import Placement
from quiltnet.training.precision import build_accelerator
from tests.conftest import ROOT
from tests.model.towers import TINY_TEXT, tiny_model
from tests.ranks import run_ranks

CNN = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 32}
IMAGES = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cnn() -> ContrastiveModel:
    """With statistics that are far from those of any images."""
    torch.manual_seed(0)
    model = build_model(image=CNN, text=TINY_TEXT, embed_dim=16, batchnorm="adapted")
    for norm in norms(model):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.1, 3)
    return model


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def statistics(model: nn.Module) -> Tensor:
    """All means, then all variances."""
    return torch.cat([norm.running_mean for norm in norms(model)] + [norm.running_var for norm in norms(model)])


def measured_slowly(model: ContrastiveModel) -> Tensor:
    """A pass over single images for each layer, in the order of depth; moments as they are defined, in float64."""
    model = copy.deepcopy(model).double().eval()
    for norm in norms(model):
        seen: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        for image in IMAGES:
            with torch.no_grad():
                model.clip.encode_image(image[None].double().div(255).sub(model._mean).div(model._std))
        hook.remove()
        values = torch.cat(seen).transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_(((values - values.mean(1, keepdim=True)) ** 2).mean(1))
    return statistics(model)


def state_of(model: ContrastiveModel, placement: Placement | None = None, **options: object) -> TrainState:
    return start_training(
        model.train(),
        build_optimizer(model, lr=1e-3),
        lambda seen, step: 1.0,
        global_batch_size=16,
        accelerator=build_accelerator("fp32", cpu=True),
        placement=placement,
        **options,
    )


def test_statistics_are_those_of_all_images_layer_by_layer():
    model = cnn()
    expected = measured_slowly(model)
    assert (statistics(model) - expected).abs().max() > 1
    adapt_statistics(model, IMAGES)
    torch.testing.assert_close(statistics(model).double(), expected, rtol=1e-4, atol=1e-5)
    once = statistics(model)
    adapt_statistics(model, IMAGES)
    assert torch.equal(statistics(model), once)
    # What BatchNorm itself does with one batch of them all.
    features = model.encode_image(IMAGES)
    model.batchnorm = "train"
    torch.testing.assert_close(model.train().encode_image(IMAGES), features, rtol=1e-4, atol=1e-5)


def adapted_on_ranks() -> dict[str, Tensor]:
    """Uneven shares: 5 images on one rank and 8 on the other."""
    rows = slice(None) if world_size() == 1 else (slice(0, 5), slice(5, None))[rank()]
    placements = {"ddp": Placement(), "fsdp": Placement(sharding="fsdp")} if world_size() > 1 else {"one": Placement()}
    found = {}
    for name, placement in placements.items():
        state = state_of(cnn(), placement)
        adapt_statistics(state.unwrapped, IMAGES[rows])
        found[name] = statistics(state.unwrapped)
    return found


@pytest.mark.slow
def test_two_ranks_equal_one():
    one = adapted_on_ranks()["one"]
    first, second = run_ranks(adapted_on_ranks, 2)
    for name in ("ddp", "fsdp"):
        torch.testing.assert_close(first[name], one, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize(("global_batch_size", "count"), [(16, 256), (96, 288), (600, 300), (1024, 256)])
def test_the_images_are_the_same_on_however_many_ranks(monkeypatch, global_batch_size, count):
    def images(ranks: int) -> list[int]:
        found = []
        for number in range(ranks):
            monkeypatch.setattr(batchnorm, "rank", lambda number=number: number)
            size = global_batch_size // ranks
            stream = (
                SimpleNamespace(image=torch.arange(start, start + size).view(-1, 1, 1, 1))
                for start in range(number * size, 10_000, global_batch_size)
            )
            found += first_images(stream, global_batch_size).flatten().tolist()
        return sorted(found)

    one = images(1)
    assert len(one) == count == len(set(one)) and one[0] == 0
    assert all(images(ranks) == one for ranks in (2, 4, 8))


def test_before_the_first_step_only_and_in_the_average_too():
    state = state_of(cnn(), averaging=Averaging(0.9))
    before = statistics(state.unwrapped)
    callback = AdaptBatchNorm(lambda: iter([SimpleNamespace(image=IMAGES)] * 16))
    state.samples_seen = 16
    callback.fit_start(state)
    assert torch.equal(statistics(state.unwrapped), before)
    state.samples_seen = 0
    callback.fit_start(state)
    assert not torch.equal(statistics(state.unwrapped), before)
    assert torch.equal(statistics(state.average.module), statistics(state.unwrapped))
    assert state.unwrapped.training and not any(norm.training for norm in norms(state.unwrapped))


def test_a_tower_without_batchnorm_is_refused():
    with pytest.raises(UserError, match="the image tower has none; leave it out"):
        check_adapting(tiny_model())


@pytest.mark.slow
def test_a_run_measures_once_and_resumes_as_if_never_stopped(drawn_shards, work):
    from quiltnet.cli.hydra_main import train_main  # here, so that the ranks above do not wait for it

    def run(name: str, *more: str) -> None:
        image = ",".join(f"{key}:{value}" for key, value in CNN.items())
        train_main(
            ["model=tiny", "debug=fast", f"run_name={name}", f"data.train.shards={drawn_shards}/train",
             f"data.val.shards={drawn_shards}/val", "evaluator=[val_pairs]", "~model.image",
             f"+model.image={{{image}}}", "callbacks.checkpoint_every_samples=8", "optim.lr=1e-2", *more],
            conf=str(ROOT / "conf"),
        )  # fmt: skip

    def at(name: str, samples: int) -> dict[str, Tensor]:
        return load_checkpoint(work / f"outputs/{name}/checkpoints/samples-{samples:012d}")["weights"]

    run("frozen")
    run("adapted", "model.batchnorm=adapted")
    start = [json.loads((work / f"outputs/{name}/results.json").read_text())["start"] for name in ("frozen", "adapted")]
    assert start[0] == start[1], "the scores of the start are of the model as it was given"
    means = [name for name in at("adapted", 8) if name.endswith("running_mean")]
    moved = [(at("adapted", 8)[name] - at("frozen", 8)[name]).abs().max() for name in means]
    assert means and all(distance > 0 for distance in moved)
    end = at("adapted", 16)
    assert all(torch.equal(end[name], at("adapted", 8)[name]) for name in means), "they are frozen from then on"
    shutil.rmtree(work / "outputs/adapted/checkpoints/samples-000000000016")
    run("adapted", "model.batchnorm=adapted", "resume=auto")
    torch.testing.assert_close(at("adapted", 16), end, rtol=0, atol=0)
