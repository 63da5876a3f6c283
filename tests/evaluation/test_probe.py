from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from quiltnet.evaluation.probe import fit_probes, hold_out


def clusters(rows: int, classes: int, seed: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features around one centre a class, overlapping."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    return F.normalize(centres[labels] + torch.randn(rows, width, generator=generator), dim=-1), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_probes_decide_like_sklearn(classes):
    features, labels = clusters(60, classes, seed=1)
    unseen, _ = clusters(200, classes, seed=2)
    probes = fit_probes(features, labels, num_classes=classes, c_values=[0.1, 100.0])
    assert [probe.c for probe in probes] == [0.1, 100.0]
    for probe in probes:
        reference = LogisticRegression(C=probe.c, tol=1e-6, max_iter=10_000)
        reference.fit(features.double().numpy(), labels.numpy())
        expected = reference.predict_proba(unseen.double().numpy())
        np.testing.assert_allclose(probe.logits(unseen).softmax(-1).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("present", [[0, 2, 4], [1, 4]])
def test_a_class_without_rows_is_never_predicted(present):
    features, labels = clusters(60, len(present), seed=1)
    (probe,) = fit_probes(features, torch.tensor(present)[labels], num_classes=5, c_values=[10.0])
    logits = probe.logits(clusters(100, 5, seed=2)[0])
    assert logits.shape == (100, 5)
    assert set(logits.argmax(-1).tolist()) <= set(present)
    assert (probe.logits(features).argmax(-1) == torch.tensor(present)[labels]).double().mean() > 0.8


def test_hold_out_takes_a_fraction_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3])
    held_out = hold_out(labels, None, fraction=0.2, seed=0)
    assert Counter(labels[held_out].tolist()) == {
        0: 10,
        1: 2,
        2: 1,
    }  # the single row of class 3 is trained on


def test_hold_out_keeps_groups_whole():
    labels = torch.arange(120) % 4
    groups = [f"case {index // 6 % 20}" for index in range(120)]  # 20 cases, each of all classes
    held_out = hold_out(labels, groups, fraction=0.2, seed=3).tolist()
    cases = {case: {out for out, of in zip(held_out, groups, strict=True) if of == case} for case in groups}
    assert all(len(sides) == 1 for sides in cases.values())
    assert 0.15 <= sum(held_out) / 120 <= 0.4


def test_hold_out_is_seeded():
    labels = torch.arange(100) % 2
    first, again, other = (hold_out(labels, None, fraction=0.2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
