from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.outcome import (
    Difference,
    Outcome,
    paired_difference,
    paired_differences,
    percentile_interval,
)


def outcome_of(
    is_right: torch.Tensor, groups: list[str] | None = None, items: str = "set", resamples: int = 1000
) -> Outcome:
    """Accuracy of (N,) bools."""
    replicates = Resamples(len(is_right), groups=groups, count=resamples).means(is_right[:, None])[:, 0]
    return Outcome({"accuracy": is_right.double().mean().item()}, {"accuracy": replicates}, items=items)


def draw_right(share: float, count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share


def test_interval_one_can_check_by_eye():
    assert percentile_interval(torch.arange(201.0).flip(0)) == pytest.approx((5, 195))
    assert percentile_interval(torch.tensor([3.0])) == (3.0, 3.0)


def test_interval_is_of_the_values_that_are_numbers():
    values = torch.cat([torch.arange(201.0), torch.full((50,), torch.nan)])
    assert percentile_interval(values) == pytest.approx((5, 195))


def test_intervals_have_the_width_of_theory():
    accuracy = outcome_of(draw_right(0.7, 400, seed=0))
    low, high = accuracy.intervals()["accuracy"]
    share = accuracy.scores["accuracy"]
    standard_error = np.sqrt(share * (1 - share) / 400)
    assert (low - share) / standard_error == pytest.approx(-1.96, abs=0.25)
    assert (high - share) / standard_error == pytest.approx(1.96, abs=0.25)


def test_intervals_cover_what_they_should():
    covered = []
    for seed in range(200):
        low, high = outcome_of(draw_right(0.7, 150, seed), resamples=200).intervals()["accuracy"]
        covered.append(low <= 0.7 <= high)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_tiles_of_few_patients_are_less_sure_than_as_many_patients():
    by_patient = draw_right(0.5, 40, seed=0)
    is_right = by_patient.repeat_interleave(10)  # a patient's tiles are all right or all wrong
    groups = [f"patient {index // 10}" for index in range(400)]

    def width(outcome: Outcome) -> float:
        low, high = outcome.intervals()["accuracy"]
        return high - low

    assert width(outcome_of(is_right, groups)) == pytest.approx(width(outcome_of(by_patient)), rel=0.15)
    assert width(outcome_of(is_right)) < 0.4 * width(outcome_of(is_right, groups))


def test_paired_difference_one_can_check_by_eye():
    better = Outcome({"f1": 0.75}, {"f1": torch.tensor([0.5, 0.75, 1.0])}, items="set")
    worse = Outcome({"f1": 0.5}, {"f1": torch.tensor([0.25, 0.5, 0.75])}, items="set")
    assert paired_difference(better, worse, "f1") == Difference(0.25, 0.25, 0.25)
    assert paired_difference(better, worse, "f1").is_clear
    assert paired_difference(worse, better, "f1") == Difference(-0.25, -0.25, -0.25)


def test_a_model_does_not_differ_from_itself():
    one, other = (outcome_of(draw_right(0.7, 300, seed=0)) for _ in range(2))
    difference = paired_difference(one, other, "accuracy")
    assert difference == Difference(0, 0, 0)
    assert not difference.is_clear


def test_pairing_finds_a_difference_that_two_intervals_hide():
    worse = draw_right(0.7, 300, seed=0)
    better = worse.clone()
    better[(~worse).nonzero().squeeze(1)[:12]] = True  # four points more, of the same items
    of_better, of_worse = outcome_of(better), outcome_of(worse)
    assert of_better.intervals()["accuracy"][0] < of_worse.intervals()["accuracy"][1]
    difference = paired_difference(of_better, of_worse, "accuracy")
    assert difference.value == pytest.approx(0.04)
    assert difference.is_clear and 0 < difference.low < 0.04 < difference.high


def test_models_that_err_alike_often_do_not_differ_clearly():
    difference = paired_difference(
        outcome_of(draw_right(0.7, 300, seed=0)), outcome_of(draw_right(0.7, 300, seed=1)), "accuracy"
    )
    assert not difference.is_clear


def test_only_the_same_items_are_paired():
    right = draw_right(0.7, 50, seed=0)
    assert paired_difference(outcome_of(right), outcome_of(right, items="other set"), "accuracy") is None
    without_replicates = Outcome({"accuracy": 0.5}, items="set")
    assert paired_difference(outcome_of(right), without_replicates, "accuracy") is None
    outcomes = {"a": outcome_of(right), "b": outcome_of(right), "c": outcome_of(right)}
    baseline = {"a": outcome_of(right), "b": outcome_of(right, items="other set")}
    assert list(paired_differences(outcomes, baseline)) == ["a/accuracy"]


def test_json_has_scores_intervals_and_details():
    outcome = Outcome({"f1": 0.5}, {"f1": torch.tensor([0.25, 0.25])}, {"undefined": {"auroc": "why"}}, items="set")
    expected = {"scores": {"f1": 0.5}, "intervals": {"f1": [0.25, 0.25]}, "undefined": {"auroc": "why"}}
    assert json.loads(json.dumps(outcome.as_json())) == expected


def test_json_has_no_numbers_that_it_cannot_say():
    outcome = Outcome({"loss": math.inf}, {"loss": torch.full((3,), math.nan)}, {"table": [{"auroc": math.nan}, 1.5]})
    found = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert found == {"scores": {"loss": None}, "intervals": {"loss": [None, None]}, "table": [{"auroc": None}, 1.5]}
