"""Weights between and among models of one architecture: interpolation (WiSE-FT) and soups.

All arithmetic is in float64, rounded once to the type of the weights. ``logit_scale`` is averaged as it is stored, as a
logarithm. Integer buffers (a BatchNorm's count of batches) cannot be averaged: the later model's are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quiltnet.errors import UserError

Weights = Mapping[str, Tensor]  # a state dict, on the CPU

_SHOWN = 3


def check_same_architecture(weights: Weights, other: Weights, names: tuple[str, str] = ("one", "the other")) -> None:
    """Raises UserError with the first tensors whose names or shapes differ, if any do."""
    shapes, others = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (weights, other))
    differing = [name for name in shapes | others if shapes.get(name) != others.get(name)]
    if not differing:
        return
    lines = [
        f"- {name}: {_shape(shapes.get(name))} in {names[0]}, {_shape(others.get(name))} in {names[1]}"
        for name in differing[:_SHOWN]
    ]
    raise UserError(
        f"{names[0]} and {names[1]} are of different architectures, {len(differing)} tensors differ; only models that "
        "began from the same weights can be merged. The first:\n" + "\n".join(lines)
    )


def interpolate(base: Weights, tuned: Weights, alpha: float) -> dict[str, Tensor]:
    """``(1 - alpha) * base + alpha * tuned``; ``alpha`` of 0 and 1 give copies of the ends, bit for bit.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903).

    Raises:
        UserError: the architectures differ, or ``alpha`` is not between 0 and 1.
    """
    check_alpha(alpha)
    check_same_architecture(base, tuned, ("the base", "the tuned model"))
    if alpha in (0, 1):  # apart: 0 * (tuned - base) turns a base of -0.0 into 0.0
        return {name: tensor.clone() for name, tensor in (tuned if alpha else base).items()}
    return {name: _between(tensor, tuned[name], alpha) for name, tensor in base.items()}


def uniform_soup(ingredients: Iterable[Weights]) -> dict[str, Tensor]:
    """The mean of several models' weights; one at a time is held beside it.

    Wortsman et al. 2022, "Model soups" (arXiv 2203.05482).

    Raises:
        UserError: there is none, or the architectures differ.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    for weights in ingredients:
        if totals:
            check_same_architecture(totals, weights, ("the first model", f"model {count + 1}"))
        for name, tensor in weights.items():
            is_number = tensor.is_floating_point() and name in totals
            totals[name] = totals[name] + tensor.double() if is_number else _widened(tensor)
        dtypes = {name: tensor.dtype for name, tensor in weights.items()}
        count += 1
    if not count:
        raise UserError("a soup needs a model at least")
    return {n: (t / count).to(dtypes[n]) if t.is_floating_point() else t.clone() for n, t in totals.items()}


@dataclass(frozen=True)
class GreedySoup:
    """What a greedy soup came to.

    Attributes:
        scores: of each model alone, by name.
        kept: names of those in the soup, in the order they were taken in.
        score: of the soup.
    """

    weights: dict[str, Tensor]
    scores: dict[str, float]
    kept: list[str]
    score: float


def greedy_soup(
    names: Sequence[str], load: Callable[[str], Weights], score: Callable[[str, Weights], float]
) -> GreedySoup:
    """Take in one model after another, the best first, and keep each that does not make the mean worse.

    Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), recipe 1. Two models are held at once.

    Args:
        load: the weights of a model, by its name.
        score: higher is better; what is scored is named: a model, or ``soup with`` the one that is tried.
    """
    scores = {name: score(name, load(name)) for name in names}
    best, *others = sorted(names, key=lambda name: -scores[name])
    kept, soup, soup_score = [best], dict(load(best)), scores[best]
    for name in others:
        tried = interpolate(soup, load(name), 1 / (len(kept) + 1))  # the mean of all that are then in it
        tried_score = score(f"soup with {name}", tried)
        if tried_score >= soup_score:
            kept, soup, soup_score = [*kept, name], tried, tried_score
    return GreedySoup(soup, scores, kept, soup_score)


def check_alpha(alpha: float) -> None:
    """Raises UserError where ``alpha`` is no share."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha:g} must be between 0, the base, and 1, the tuned model")


def _between(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    if not base.is_floating_point():
        return tuned.clone()
    return torch.lerp(base.double(), tuned.double(), alpha).to(base.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(shape)
