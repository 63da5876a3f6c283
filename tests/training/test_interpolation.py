"""Ends of an interpolation are bit for bit, soups are means, and what cannot be merged is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.training.interpolation import greedy_soup, interpolate, uniform_soup


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(5, 4, generator=generator)
    matrix[0] = torch.tensor([-0.0, 0.0, 1e-42, 3e38])  # what arithmetic would change
    return {"matrix": matrix, "logit_scale": torch.tensor(1.0 + seed), "num_batches_tracked": torch.tensor(10 * seed)}


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def test_both_ends_are_reproduced_bit_for_bit():
    base, tuned = weights(1), weights(2)
    tuned["matrix"][0] = -tuned["matrix"][0]
    assert bits(interpolate(base, tuned, 0)) == bits(base)
    assert bits(interpolate(base, tuned, 1)) == bits(tuned)
    assert interpolate(base, tuned, 0.0)["matrix"].data_ptr() != base["matrix"].data_ptr()


def test_between_the_ends_is_the_mean_in_double_precision():
    base, tuned = weights(1), weights(2)
    middle = interpolate(base, tuned, 0.3)
    expected = (0.7 * base["matrix"].double() + 0.3 * tuned["matrix"].double()).float()
    torch.testing.assert_close(middle["matrix"], expected, rtol=1e-7, atol=0)
    assert middle["logit_scale"] == pytest.approx(2.3), "as a logarithm"
    assert middle["num_batches_tracked"] == 20, "the tuned model's"
    assert bits(interpolate(base, base, 0.3))["matrix"][4:] == bits(base)["matrix"][4:], "what they share stays"


def test_a_uniform_soup_is_the_mean():
    states = [weights(seed) for seed in (1, 2, 5)]
    soup = uniform_soup(iter(states))
    torch.testing.assert_close(soup["matrix"], torch.stack([s["matrix"].double() for s in states]).mean(0).float())
    assert soup["matrix"].dtype == torch.float32 and soup["num_batches_tracked"] == 50
    assert bits(uniform_soup([states[0]])) == bits(states[0])


def test_a_greedy_soup_keeps_what_does_not_hurt():
    states = {"far": 9.0, "best": 1.0, "good": -1.5, "equal": -0.5}  # the nearer the mean is to 0, the better
    asked = []

    def score(name: str, state: dict[str, Tensor]) -> float:
        asked.append(name)
        return -abs(round(state["a"].item(), 6))

    def load(name: str) -> dict[str, Tensor]:
        return {"a": torch.tensor(states[name])}

    soup = greedy_soup(list(states), load, score)
    # In order: equal (-0.5), best (1.0), good (-1.5), far: means 0.25, then -1/3, which is worse, then 9.5 / 3.
    assert soup.kept == ["equal", "best"] and soup.weights["a"] == 0.25 and soup.score == -0.25
    assert soup.scores == {"far": -9.0, "best": -1.0, "good": -1.5, "equal": -0.5}
    assert asked == [*states, "soup with best", "soup with good", "soup with far"]
    alike = greedy_soup(["a", "b"], lambda name: {"a": torch.tensor(2.0)}, lambda name, state: 1.0)
    assert alike.kept == ["a", "b"], "what changes nothing is not worse"


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_an_alpha_outside_is_refused(alpha):
    with pytest.raises(UserError, match="must be between 0, the base, and 1"):
        interpolate(weights(1), weights(2), alpha)


def test_other_architectures_are_refused_with_what_differs():
    other = {**weights(2), "matrix": torch.zeros(5, 3), "more": torch.zeros(2)}
    message = (
        r"2 tensors differ(?s:.*)matrix: \(5, 4\) in the base, \(5, 3\) in the tuned(?s:.*)more: absent in the base"
    )
    with pytest.raises(UserError, match=message):
        interpolate(weights(1), other, 0.5)
    with pytest.raises(UserError, match="the first model and model 2 are of different architectures"):
        uniform_soup([weights(1), other])
