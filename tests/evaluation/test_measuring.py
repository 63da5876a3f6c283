from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from quiltnet.evaluation import measuring
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.measuring import measure
from quiltnet.evaluation.outcome import Outcome


class Module(nn.Module):
    """Just enough of a model to be measured."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 4)


class Product:
    """An evaluator that says in which mode and precision it found the model."""

    split = "val"

    def run(self, encoder: SetEncoder) -> Outcome:
        model = encoder.model
        model.train(not model.training)  # a careless one
        product = model.tower(torch.ones(2, 4))
        return Outcome(
            {"is_bf16": float(product.dtype == torch.bfloat16), "has_grad": float(product.requires_grad)},
            details={"was_training": not model.training, "drawn": torch.rand(()).item()},
        )


def test_mode_gradients_and_random_numbers_are_put_back():
    model = Module().train()
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    outcome = measure(model, {"product": Product()})["product"]
    assert outcome.scores == {"is_bf16": 0.0, "has_grad": 0.0}
    assert outcome.details["was_training"] is False
    assert model.training and torch.is_grad_enabled()
    assert torch.equal(torch.rand(()), expected)


def test_towers_compute_in_the_precision_asked_for():
    outcome = measure(Module(), {"product": Product()}, dtype=torch.bfloat16)["product"]
    assert outcome.scores["is_bf16"] == 1.0
    assert measure(Module(), {"product": Product()})["product"].scores["is_bf16"] == 0.0


def test_what_would_start_too_late_is_left_out_and_said(monkeypatch, caplog):
    clock = iter([0.0, 1.0, 20.0])
    monkeypatch.setattr(measuring.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.WARNING):
        outcomes = measure(Module(), {"first": Product(), "second": Product()}, time_budget_s=10)
    assert list(outcomes) == ["first"]
    assert "second was left out" in caplog.text


def test_the_mode_is_put_back_after_an_error():
    class Failing(Product):
        def run(self, encoder):
            raise RuntimeError("no")

    model = Module().train()
    with pytest.raises(RuntimeError):
        measure(model, {"failing": Failing()})
    assert model.training
