"""Whether a classifier is right as often as it says."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_gaps(probabilities: Tensor, is_right: Tensor, bins: int = BINS) -> Tensor:
    """(N, bins) float64 of which ``expected_calibration_error`` needs the means.

    A row is 0 but for the bin of its largest probability, where it is whether the row is right (1 or 0) minus that
    probability. Bins are of equal width and closed above: the first of 15 is [0, 1/15], the second (1/15, 2/15].
    A row with a NaN is one of confidence 1 that is wrong.

    probabilities: (N, C); is_right: (N,) bool.
    """
    confidence = probabilities.double().amax(dim=1)  # (N,); NaN where the row has one
    is_right = is_right & ~confidence.isnan()
    confidence = confidence.nan_to_num(nan=1.0)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    gaps = torch.zeros(len(confidence), bins, dtype=torch.float64)
    gaps[torch.arange(len(gaps)), torch.bucketize(confidence, edges)] = is_right.double() - confidence
    return gaps


def expected_calibration_error(mean_gaps: Tensor) -> Tensor:
    """Of the means (..., bins) of ``calibration_gaps``: (...).

    The distance of accuracy and mean confidence in each bin, weighted by the bin's share of images: 0 is the best
    (Naeini et al. 2015; Guo et al. 2017, "On Calibration of Modern Neural Networks", with 15 bins). Chance in a bin
    only ever adds to it, and more so on resamples: a well calibrated model's interval lies mostly above its value.
    """
    return mean_gaps.abs().sum(dim=-1)
