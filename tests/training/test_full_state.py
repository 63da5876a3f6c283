"""Weights and optimiser state by name, in one process; test_placement.py has those of several."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from quiltnet.errors import UserError
from quiltnet.training.full_state import (
    full_optimizer_state,
    full_weights,
    load_optimizer_state,
    load_weights,
    with_settings_of,
)


class Wrapper(nn.Module):
    """The part of a ``ContrastiveModel`` that is saved: what is under ``clip``."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.clip = nn.ModuleDict({name: nn.Linear(3, 2) for name in names})


def trained(*names: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Wrapper(*names)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {"weights": full_weights(model), "optimizer": full_optimizer_state(model, optimizer)}
    return copy.deepcopy(state)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]


def test_keys_are_names():
    model, optimizer = trained("one", "two")
    assert full_weights(model).keys() == model.clip.state_dict().keys()
    state = full_optimizer_state(model, optimizer)
    assert state["state"].keys() == {name for name, _ in model.named_parameters()}
    assert state["param_groups"][1]["params"] == ["clip.one.bias", "clip.two.bias"]
    assert (state["param_groups"][0]["weight_decay"], state["param_groups"][0]["lr"]) == (0.1, 0.1)


def test_loaded_goes_on_bit_for_bit():
    model, optimizer = trained("one", "two")
    optimizer.param_groups[0]["lr"] = 0.05
    saved = snapshot(model, optimizer)
    again, optimizer_again = trained("one", "two")
    step(again, optimizer_again)
    load_weights(again, saved["weights"])
    load_optimizer_state(again, optimizer_again, saved["optimizer"])
    assert optimizer_again.param_groups[0]["lr"] == 0.05
    step(model, optimizer)
    step(again, optimizer_again)
    assert_same(snapshot(again, optimizer_again), snapshot(model, optimizer))


def test_asking_for_the_state_makes_none():
    model, _ = trained("one")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert not any(full_optimizer_state(model, optimizer)["state"].values())
    load_optimizer_state(model, optimizer, full_optimizer_state(model, optimizer))
    assert not optimizer.state


def test_a_changed_setting_is_taken_and_what_moved_is_kept():
    """Of a rate and a decay that were changed for the continuation, and an estimate that is kept among the settings."""
    model, optimizer = trained("one", "two")
    optimizer.param_groups[0].update(lr=0.05, base_lr=0.1, estimate=7.0)
    saved = snapshot(model, optimizer)["optimizer"]
    again = Wrapper("one", "two")
    changed = torch.optim.AdamW([{"params": list(again.parameters()), "weight_decay": 0.3}], lr=0.2, betas=(0.5, 0.6))
    changed.defaults["estimate"] = changed.param_groups[0]["estimate"] = 1.0
    load_optimizer_state(again, changed, with_settings_of(changed, again, saved))
    (group,) = changed.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["estimate"]) == (0.2, 0.3, (0.5, 0.6), 7.0)
    assert "base_lr" not in group, "or the schedule would go on from the earlier rate"
    torch.testing.assert_close(full_optimizer_state(again, changed)["state"], saved["state"], rtol=0, atol=0)


def test_a_state_of_other_parameters_is_refused():
    model, optimizer = trained("one", "two")
    smaller, optimizer_of_smaller = trained("one")
    with pytest.raises(UserError, match=r"did not train clip\.two\.weight"):
        load_optimizer_state(model, optimizer, full_optimizer_state(smaller, optimizer_of_smaller))
    with pytest.raises(UserError, match=r"did not train clip\.two\.weight"):
        load_optimizer_state(
            model, optimizer, with_settings_of(optimizer, model, full_optimizer_state(smaller, optimizer_of_smaller))
        )
    with pytest.raises(UserError, match=r"of another model than this run's.*Missing key"):
        load_weights(model, full_weights(smaller))
