"""Optimisers by name, and steps that are not taken."""

from __future__ import annotations

import math

import pytest
import timm.optim
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import OmegaConf
from timm.optim import kron
from torch import nn

from quiltnet.errors import UserError
from quiltnet.training.optim import build_optimizer, check_sharded, skip_if
from tests.conftest import ROOT
from tests.model.towers import tiny_model
from tests.ranks import run_ranks

CONFIGS = sorted(path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml"))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if parameter.requires_grad else None
    if bad:
        next(model.parameters()).grad.view(-1)[0] = math.nan
    skip_if(optimizer, torch.tensor(bad))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_adamw_has_clips_betas_and_eps_and_is_fused():
    optimizer = build_optimizer(nn.Linear(2, 2), lr=1e-5)
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-6)
    assert all(group["fused"] for group in optimizer.param_groups)
    assert not build_optimizer(nn.Linear(2, 2), lr=1e-5, fused=False).defaults["fused"]


def test_fused_adamw_is_adamw():
    fused, plain = small_model(), small_model()
    optimizers = [build_optimizer(fused, lr=1e-3), build_optimizer(plain, lr=1e-3, fused=False, foreach=False)]
    for _ in range(5):
        for model, optimizer in zip((fused, plain), optimizers, strict=True):
            one_step(model, optimizer)
    torch.testing.assert_close(weights(fused), weights(plain), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_an_optimiser_that_learns(name):
    config = OmegaConf.load(ROOT / "conf" / "optim" / f"{name}.yaml")
    if name == "timm":
        config.update(name="lamb", lr=1e-3)
    model = tiny_model()
    optimizer = instantiate(config, model, _convert_="all")
    before = weights(model)
    one_step(model, optimizer)
    after = weights(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(after["clip.visual.proj"], before["clip.visual.proj"])
    assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == set(model.parameters())


def test_muon_steps_matrices_by_newton_schulz_and_embeddings_as_adam():
    model = tiny_model()
    optimizer = build_optimizer(model, name="muon", lr=1e-3)
    one_step(model, optimizer)
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    assert "momentum_buffer" in state["clip.transformer.resblocks.0.mlp.c_fc.weight"]
    assert "exp_avg_sq" in state["clip.token_embedding.weight"] and "exp_avg_sq" in state["clip.text_projection"]


@pytest.mark.parametrize("name", ["sgd", "adam", "lion", "lamb", "adopt", "nadamw"])
def test_names_are_timms(name):
    theirs = timm.optim.create_optimizer_v2([nn.Parameter(torch.zeros(2, 2))], opt=name, lr=0.1)
    assert type(build_optimizer(nn.Linear(2, 2), name=name, lr=0.1)) is type(theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamww"}, "no optimiser 'adamww'; did you mean .*adamw"),
        ({"name": "qqqqqq"}, "no optimiser 'qqqqqq'; timm.optim.list_optimizers"),
        ({"name": "adahessian"}, "second derivatives"),
        ({"name": "lion", "eps": 1e-8}, "lion has no option eps; the options it has are betas, "),
        ({"beta": (0.9, 0.99)}, "adamw has no option beta; the options it has are amsgrad, betas, "),
        ({"betas": (0.9, 1.5)}, "adamw cannot be built with .*Invalid beta"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        *[({"lr": lr}, "greater than 0") for lr in (0, -1e-3, math.nan)],
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(nn.Linear(2, 2), **{"lr": 1e-3, **options})


def test_an_optimiser_that_needs_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fusedadamw cannot be used here"):
        build_optimizer(nn.Linear(2, 2), name="fusedadamw", lr=1e-3)


def test_a_skipped_adamw_step_changes_nothing():
    """Not the first step, nor one in between; the steps around it are as if it had not been."""
    skipping, straight = small_model(), small_model()
    skipped, taken = build_optimizer(skipping, lr=1e-3), build_optimizer(straight, lr=1e-3)
    start = weights(skipping)
    one_step(skipping, skipped, bad=True)
    torch.testing.assert_close(weights(skipping), start, rtol=0, atol=0)
    for _ in range(2):
        one_step(skipping, skipped)
        one_step(skipping, skipped, bad=True)
        one_step(straight, taken)
        torch.testing.assert_close(weights(skipping), weights(straight), rtol=0, atol=0)
    torch.testing.assert_close(skipped.state_dict()["state"], taken.state_dict()["state"], rtol=0, atol=0)


def test_what_kron_draws_is_the_same_on_every_rank(monkeypatch):
    """Ranks seed torch's generator apart, for dropout."""
    models = [small_model(), small_model()]
    for seed, model in enumerate(models):
        optimizer = build_optimizer(model, name="kron", lr=1e-2)
        for function in ("_calc_A_and_conjB", "_q_terms", "_precond_grad"):
            monkeypatch.setattr(optimizer, function, getattr(kron, function))  # not compiled, which takes a minute
        torch.manual_seed(seed)
        for _ in range(2):
            one_step(model, optimizer)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=0)


def sharded_by(names: list[str]) -> dict[str, str]:
    """What is said of each optimiser that is to update shards."""
    said = {}
    for name in names:
        try:
            check_sharded(build_optimizer(small_model(), name=name, lr=1e-3), torch.device("cpu"))
            said[name] = "nothing"
        except UserError as error:
            said[name] = str(error)
    return said


@pytest.mark.slow
def test_an_optimiser_that_cannot_update_shards_is_refused_on_all_ranks():
    can, cannot = ["adamw", "lion", "sgd", "muon", "laprop"], ["lamb", "cadamw", "kron"]
    first, second = run_ranks(sharded_by, 2, can + cannot)
    assert first == second
    assert [first[name] for name in can] == ["nothing"] * len(can)
    for name in cannot:
        assert "cannot update sharded weights" in first[name] and "use placement=ddp" in first[name]


@pytest.mark.parametrize("name", ["lion", "muon", "sgd", "lamb"])
def test_a_skipped_step_of_others_leaves_all_finite(name):
    model = small_model()
    optimizer = build_optimizer(model, name=name, lr=1e-3)
    for bad in (True, False, True, False):
        one_step(model, optimizer, bad=bad)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    state = optimizer.state_dict()["state"].values()
    assert all(torch.as_tensor(value).isfinite().all() for entry in state for value in entry.values())


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_what_waits_in_a_group_is_left_alone_and_begins_afresh(name):
    """Neither decay nor moments, through skipped steps and taken ones; then as if the optimiser had just been built."""
    model = small_model()
    optimizer = build_optimizer(model, name=name, lr=1e-3)
    waiting = model[2].requires_grad_(False)
    before = weights(waiting)
    for bad in (True, False):
        one_step(model, optimizer, bad=bad)
    torch.testing.assert_close(weights(waiting), before, rtol=0, atol=0)
    assert not any(parameter in optimizer.state for parameter in waiting.parameters())
    waiting.requires_grad_(True)
    one_step(model, optimizer)
    fresh = small_model()
    one_step(fresh, build_optimizer(fresh, name=name, lr=1e-3))
    torch.testing.assert_close(weights(waiting), weights(fresh[2]), rtol=0, atol=0)


def test_a_step_that_is_not_bad_is_taken_unchanged():
    for name in ("adamw", "lion"):
        told, untold = small_model(), small_model()
        one_step(told, build_optimizer(told, name=name, lr=1e-3))
        optimizer = build_optimizer(untold, name=name, lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        for parameter in untold.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        torch.testing.assert_close(weights(told), weights(untold), rtol=0, atol=0)


def test_accelerate_keeps_names_and_fusion():
    model = tiny_model()
    _, wrapped = Accelerator(cpu=True).prepare(model, build_optimizer(model, lr=1e-3, layer_decay=0.5))
    assert all(group["fused"] and group["param_names"] for group in wrapped.param_groups)
    one_step(model, wrapped.optimizer, bad=True)


def test_a_state_of_other_groups_is_refused():
    model = tiny_model()
    saved = build_optimizer(model, lr=1e-3).state_dict()
    build_optimizer(model, lr=1e-3, fused=False).load_state_dict(saved)
    with pytest.raises(UserError, match=r"other parameters or groups of them .* resume with the same model and optim"):
        build_optimizer(model, lr=1e-3, layer_decay=0.5).load_state_dict(saved)
    saved["param_groups"][0]["param_names"].reverse()
    with pytest.raises(UserError, match="other parameters or groups"):
        build_optimizer(model, lr=1e-3).load_state_dict(saved)
    for group in saved["param_groups"]:
        del group["param_names"]  # as written before groups had names
    build_optimizer(model, lr=1e-3).load_state_dict(saved)
