from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation import probe as probe_module
from quiltnet.evaluation.probe import Probe, balanced_weights, fit_probes, fit_probes_on_subsets

C_VALUES = [10.0**power for power in range(-6, 6)]


def clusters(rows: int, classes: int, seed: int, width: int = 8) -> tuple[Tensor, Tensor]:
    """Unit features around one centre a class, overlapping."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    return F.normalize(centres[labels] + torch.randn(rows, width, generator=generator), dim=-1), labels


def anisotropic(rows: int, classes: int, width: int = 40) -> tuple[Tensor, Tensor]:
    """Float32 unit features as CLIP's: far from the origin, of falling variance; classes overlap, 5 % are wrong."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.arange(1, width + 1) ** -0.7
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = 0.5 * torch.randn(classes, width, generator=generator)
    features = (centres[labels] + torch.randn(rows, width, generator=generator)) * scale + 2 * scale[0]
    wrong = torch.rand(rows, generator=generator) < 0.05
    return F.normalize(features, dim=-1), torch.where(wrong, (labels + 1) % classes, labels)


def objective(probe: Probe, features: Tensor, labels: Tensor, row_weights: Tensor | None = None) -> float:
    """scikit-learn's, of its own parameters: one vector for two classes, one a class for more."""
    losses = F.cross_entropy(probe.logits(features), labels, reduction="none")
    present = labels.unique()
    weights = probe.weights[present]
    if len(present) == 2:
        weights = weights[1:] - weights[:1]
    total = losses.sum() if row_weights is None else (row_weights * losses).sum()
    return (weights.square().sum() / 2 + probe.c * total).item()


def fit_sklearn(features: Tensor, labels: Tensor, c: float, class_weight: str | None = None) -> Probe:
    """To the optimum, by Newton's method. Of two classes the first has no weights."""
    solver = LogisticRegression(C=c, solver="newton-cg", tol=1e-10, max_iter=10_000, class_weight=class_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it cannot go on: its line search ends at what rounding leaves
        solver.fit(features.double().numpy(), labels.numpy())
    weights, bias = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
    if len(bias) == 1:
        weights, bias = torch.cat([0 * weights, weights]), torch.cat([0 * bias, bias])
    return Probe(c, weights, bias)


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("draw", [clusters, anisotropic])
@pytest.mark.parametrize("classes", [2, 5])
def test_objective_is_at_its_optimum(classes, draw, class_weight):
    features, labels = clusters(600, classes, seed=1, width=40) if draw is clusters else anisotropic(600, classes)
    if class_weight is not None:
        kept = (labels != 0) | (torch.arange(600) < 150)  # unequal classes
        features, labels = features[kept], labels[kept]
    everything = torch.ones(1, len(labels), dtype=torch.bool)
    row_weights = balanced_weights(labels, everything) if class_weight else everything.double()
    (probes,) = fit_probes_on_subsets(features, labels, row_weights, num_classes=classes, c_values=C_VALUES)
    for probe in probes:
        reference = fit_sklearn(features, labels, probe.c, class_weight)
        found, optimum = (objective(one, features, labels, row_weights[0]) for one in (probe, reference))
        assert found <= optimum * (1 + 1e-6), probe.c


@pytest.mark.parametrize("classes", [2, 4])
def test_probes_decide_like_sklearn(classes):
    features, labels = clusters(60, classes, seed=1)
    unseen, _ = clusters(200, classes, seed=2)
    probes = fit_probes(features, labels, num_classes=classes, c_values=[100.0, 0.1])
    assert [probe.c for probe in probes] == [100.0, 0.1]
    for probe in probes:
        expected = fit_sklearn(features, labels, probe.c).logits(unseen).softmax(-1)
        torch.testing.assert_close(probe.logits(unseen).softmax(-1), expected, rtol=0, atol=1e-3)


def test_gradient_vanishes_at_the_solution(monkeypatch):
    monkeypatch.setattr(probe_module, "TOLERANCE", 1e-14)
    features, labels = anisotropic(300, 4)
    for probe in fit_probes(features, labels, num_classes=4, c_values=[0.01, 1.0, 100.0]):
        weights, bias = probe.weights.clone().requires_grad_(), probe.bias.clone().requires_grad_()
        loss = F.cross_entropy(features.double() @ weights.T + bias, labels)
        loss += weights.square().sum() / (2 * probe.c * len(labels))
        loss.backward()
        assert max(weights.grad.abs().max(), bias.grad.abs().max()) < 1e-6 * loss.item()


def test_subsets_together_equal_each_alone(monkeypatch):
    monkeypatch.setattr(probe_module, "TOLERANCE", 1e-14)
    features, labels = anisotropic(200, 3)
    is_in = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    is_in[2] &= labels != 1  # a class is missing in one of them
    c_values = [1e-3, 1.0, 30.0]
    together = fit_probes_on_subsets(features, labels, is_in, num_classes=3, c_values=c_values)
    for probes, rows in zip(together, is_in, strict=True):
        for probe, alone in zip(
            probes, fit_probes(features[rows], labels[rows], num_classes=3, c_values=c_values), strict=True
        ):
            torch.testing.assert_close(
                probe.logits(features).softmax(-1), alone.logits(features).softmax(-1), rtol=0, atol=1e-6
            )


def test_subsets_in_several_chunks(monkeypatch):
    features, labels = anisotropic(100, 3)
    is_in = torch.rand(4, 100, generator=torch.Generator().manual_seed(0)) < 0.7
    whole = fit_probes_on_subsets(features, labels, is_in, num_classes=3, c_values=[1.0])
    monkeypatch.setattr(probe_module, "CHUNK_ELEMENTS", 1)
    for (one,), (other,) in zip(
        whole, fit_probes_on_subsets(features, labels, is_in, num_classes=3, c_values=[1.0]), strict=True
    ):
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-3, atol=1e-3)


def test_balanced_weights_are_sklearns():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    is_in = torch.tensor([[True] * 7, [True, False, False, True, True, False, False]])
    expected = torch.tensor([[7 / 12] * 4 + [7 / 6] * 2 + [7 / 3], [3 / 4, 0, 0, 3 / 4, 3 / 2, 0, 0]])
    torch.testing.assert_close(balanced_weights(labels, is_in), expected.double())


@pytest.mark.parametrize("present", [[0, 2, 4], [1, 4]])
def test_a_class_without_rows_is_never_predicted(present):
    features, labels = clusters(60, len(present), seed=1)
    (probe,) = fit_probes(features, torch.tensor(present)[labels], num_classes=5, c_values=[10.0])
    logits = probe.logits(clusters(100, 5, seed=2)[0])
    assert logits.shape == (100, 5)
    assert set(logits.argmax(-1).tolist()) <= set(present)
    assert (probe.logits(features).argmax(-1) == torch.tensor(present)[labels]).double().mean() > 0.8


def test_the_same_is_found_again():
    features, labels = anisotropic(200, 3)
    first, again = (fit_probes(features, labels, num_classes=3, c_values=C_VALUES) for _ in range(2))
    assert all(torch.equal(one.weights, other.weights) for one, other in zip(first, again, strict=True))


def test_uneven_and_repeated_c():
    features, labels = anisotropic(200, 3)
    c_values = [1e4, 1.0, 1.0000001, 1e-5, 1e4]
    probes = fit_probes(features, labels, num_classes=3, c_values=c_values)
    assert [probe.c for probe in probes] == c_values
    assert torch.equal(probes[0].weights, probes[-1].weights)
    for probe in probes:
        (alone,) = fit_probes(features, labels, num_classes=3, c_values=[probe.c])
        assert objective(probe, features, labels) == pytest.approx(objective(alone, features, labels), rel=1e-6)


def test_under_autocast_and_with_gradients():
    features, labels = anisotropic(100, 3)
    (expected,) = fit_probes(features, labels, num_classes=3, c_values=[10.0])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = fit_probes(features.requires_grad_(), labels, num_classes=3, c_values=[10.0])
    assert torch.equal(found.weights, expected.weights) and not found.weights.requires_grad


def degenerate(kind: str) -> tuple[Tensor, Tensor]:
    features, labels = clusters(40, 2, seed=1)
    return {
        "two rows": (features[:2], labels[:2]),
        "twins": (features[:4].repeat(30, 1), labels[:4].repeat(30)),
        "twins that differ in label": (features[:1].repeat(40, 1), labels),
        "constant columns": (torch.cat([features, torch.full((40, 3), 0.1)], dim=1), labels),
        "wide": clusters(20, 2, seed=1, width=300),
        "large numbers": (1e3 * features, labels),
        "small numbers": (1e-3 * features, labels),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["two rows", "twins", "twins that differ in label", "constant columns", "wide", "large numbers", "small numbers"],
)
def test_degenerate_rows(kind, caplog):
    features, labels = degenerate(kind)
    with caplog.at_level(logging.WARNING):
        probes = fit_probes(features, labels, num_classes=2, c_values=C_VALUES)
    assert not caplog.messages
    for probe in probes:
        reference = fit_sklearn(features, labels, probe.c)
        assert objective(probe, features, labels) <= objective(reference, features, labels) * (1 + 1e-6), probe.c


def test_equal_features_tie():
    labels = torch.arange(30) % 3
    for probe in fit_probes(torch.full((30, 8), 0.35), labels, num_classes=3, c_values=C_VALUES):
        assert len(probe.logits(torch.full((1, 8), 0.35)).unique()) == 1


def test_a_thousand_classes(caplog):
    labels = torch.arange(2000) % 1000
    features = F.normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    (probe,) = fit_probes(features, labels, num_classes=1000, c_values=[1.0])
    weights = probe.weights.clone().requires_grad_()
    loss = F.cross_entropy(features.double() @ weights.T + probe.bias, labels, reduction="sum")
    total = loss + weights.square().sum() / 2
    (gradient,) = torch.autograd.grad(total, weights)
    # The objective is 1-strongly convex in the weights, so this bounds its gap.
    assert gradient.square().sum() / 2 <= 1e-6 * total


def test_an_end_before_the_optimum_is_told(monkeypatch, caplog):
    monkeypatch.setattr(probe_module, "MAX_STEPS", 2)
    features, labels = anisotropic(200, 3)
    with caplog.at_level(logging.WARNING):
        fit_probes(features, labels, num_classes=3, c_values=[1e4])
    assert "above the optimum" in caplog.text


def test_door():
    features, labels = clusters(20, 2, seed=1)
    with pytest.raises(UserError, match="two classes"):
        fit_probes(features, torch.zeros_like(labels), num_classes=2, c_values=[1.0])
    for value in (np.nan, np.inf):
        features[3, 2] = value
        with pytest.raises(UserError, match="finite"):
            fit_probes(features, labels, num_classes=2, c_values=[1.0])
