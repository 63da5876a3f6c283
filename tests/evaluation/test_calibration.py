from __future__ import annotations

import numpy as np
import pytest
import torch

from quiltnet.evaluation.calibration import BINS, calibration_gaps, expected_calibration_error


def error_of(probabilities: torch.Tensor, is_right: torch.Tensor) -> float:
    return expected_calibration_error(calibration_gaps(probabilities, is_right).mean(dim=0)).item()


def test_error_one_can_check_by_eye():
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    # Four of confidence 0.9, half of them right, and one of 0.6 that is right.
    is_right = torch.tensor([True, True, False, False, True])
    assert error_of(probabilities, is_right) == pytest.approx(0.8 * abs(0.5 - 0.9) + 0.2 * abs(1 - 0.6))


@pytest.mark.parametrize("seed", range(3))
def test_error_is_that_of_torchmetrics(seed):
    calibration_error = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(300, 5, generator=generator, dtype=torch.float64)).softmax(dim=1)
    labels = torch.randint(5, (300,), generator=generator)
    expected = calibration_error(probabilities.float(), labels, num_classes=5, n_bins=BINS, norm="l1").item()
    assert error_of(probabilities, probabilities.argmax(dim=1) == labels) == pytest.approx(expected, abs=1e-6)


def test_weighted_means_give_the_error_of_a_resample():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(50, 3, generator=generator).softmax(dim=1)
    is_right = torch.rand(50, generator=generator) < 0.5
    counts = torch.randint(4, (50,), generator=generator)
    of_resample = error_of(probabilities.repeat_interleave(counts, dim=0), is_right.repeat_interleave(counts))
    means = counts.double() @ calibration_gaps(probabilities, is_right) / counts.sum()
    assert expected_calibration_error(means).item() == pytest.approx(of_resample, abs=1e-12)


def test_bins_are_closed_above():
    edges = torch.tensor([index / BINS for index in range(1, BINS + 1)], dtype=torch.float64)
    bins = calibration_gaps(edges[:, None], torch.zeros(BINS, dtype=torch.bool)).nonzero()[:, 1]
    assert bins.tolist() == list(range(BINS))
    just_above = calibration_gaps(edges[:-1, None] + 1e-9, torch.zeros(BINS - 1, dtype=torch.bool)).nonzero()[:, 1]
    assert just_above.tolist() == list(range(1, BINS))


def test_right_and_sure_is_without_error_and_nan_is_sure_and_wrong():
    sure = torch.eye(2)
    assert error_of(sure, torch.tensor([True, True])) == 0
    assert error_of(sure, torch.tensor([False, False])) == 1
    nan = torch.full((4, 2), np.nan)
    nan[2:] = torch.tensor([0.3, np.nan])
    assert error_of(nan, torch.ones(4, dtype=torch.bool)) == 1
