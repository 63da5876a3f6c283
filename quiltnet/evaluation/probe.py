"""A linear classifier on fixed features: features and labels in, the exact optimum out.

What is minimised is scikit-learn's objective of ``LogisticRegression(C=c)``, for each C and each choice of rows:

    |weights|^2 / 2 + C * sum over rows of row_weight * cross_entropy(features @ weights.T + bias, label)

The bias is free. For two classes scikit-learn has a single vector w and penalises |w|^2 / 2; of two vectors that differ
by w, |weights|^2 / 2 is at least |w|^2 / 4. So with two classes the objective above is taken with C / 2: then C means
the same here and there, and so do the probabilities.

How: features are centred (which the free bias takes up) and turned into the eigenbasis of their covariance, where the
Hessian is nearly diagonal; L-BFGS (Nocedal & Wright 2006, algorithm 7.4) with that diagonal for its initial Hessian
needs 2 to 15 steps for most C. C ascends, and each solution starts from the parabola through the last three in log C.
All choices of rows go side by side through one matrix product: five of 20,000 x 512 take 22 CPU seconds where one by
one they take 44, because a product with 9 columns mostly waits for memory. Everything is in float64, on CUDA if there
is any.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError

log = logging.getLogger(__name__)

# A problem is solved when the objective is estimated to be this share of itself above its optimum. The estimate comes
# from the gradient and the Hessian that L-BFGS has in mind; measured gaps were up to 80 times larger.
TOLERANCE = 1e-9
# Above this a user is warned.
LARGEST_GAP = 1e-6
MEMORY, MAX_STEPS, MAX_HALVINGS = 10, 10_000, 30
# Logits at a time: 0.5 GiB of float64, of which there are about four.
CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Probe:
    """Logistic regression of C classes on features of width D.

    Args:
        c: inverse strength of the L2 penalty on weights, as scikit-learn defines it.
        weights: (C, D) float64.
        bias: (C,) float64, minus infinity for a class that had no row to learn from.
    """

    c: float
    weights: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, C)."""
        return features.double() @ self.weights.T + self.bias


def fit_probes(features: Tensor, labels: Tensor, *, num_classes: int, c_values: Sequence[float]) -> list[Probe]:
    """One probe for each C, all on the same rows, in the order of c_values. See ``fit_probes_on_subsets``."""
    everything = torch.ones(1, len(labels), dtype=torch.float64)
    (probes,) = fit_probes_on_subsets(features, labels, everything, num_classes=num_classes, c_values=c_values)
    return probes


def fit_probes_on_subsets(
    features: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    *,
    num_classes: int,
    c_values: Sequence[float],
    device: torch.device | None = None,
) -> list[list[Probe]]:
    """One probe for each subset of rows and each C.

    Meant for subsets that share most of their rows, as the folds of a cross-validation do: every subset costs as much
    as all rows together. The objective of each is at most 1e-6 of itself above its optimum, or a warning is logged.

    Args:
        features: (N, D), finite, of any scale.
        labels: (N,) int64 below num_classes.
        row_weights: (S, N), 0 where a row is not in a subset, 1 where it is, or how much it counts.
        c_values: any order, all above 0.
        device: to compute on; CUDA if there is any.

    Returns:
        S lists in the order of c_values, on the CPU.

    Raises:
        UserError: a feature is not finite, or a subset has rows of fewer than two classes.
    """
    assert min(c_values) > 0 and row_weights.shape[1:] == labels.shape == features.shape[:1]
    if not features.isfinite().all():
        raise UserError("features to fit a probe to must be finite; look for a model that diverged")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes, labels = labels.unique(return_inverse=True)  # those without any row cost nothing
    basis = _Eigenbasis(features.detach().to(device))
    ascending = sorted(set(c_values))
    probes: list[list[Probe]] = []
    for weights in row_weights.double().split(max(1, CHUNK_ELEMENTS // (len(labels) * len(classes)))):
        objective = _Objective(basis, labels.to(device), weights.to(device), len(classes))
        found = [_back(basis, objective, solution, classes, num_classes) for solution in _path(objective, ascending)]
        for subset in range(len(weights)):
            of_c = {c: Probe(float(c), w[subset], b[subset]) for c, (w, b) in zip(ascending, found, strict=True)}
            probes.append([of_c[c] for c in c_values])
    return probes


def balanced_weights(labels: Tensor, is_in: Tensor) -> Tensor:
    """Row weights with which all classes of a subset count the same: scikit-learn's ``class_weight="balanced"``.

    labels: (N,); is_in: (S, N) bool. Returns (S, N) float64, 0 outside, whose sums are the subsets' sizes.
    """
    is_in = is_in.double()
    rows = is_in @ F.one_hot(labels).double()  # (S, C)
    of_class = is_in.sum(dim=1, keepdim=True) / ((rows > 0).sum(dim=1, keepdim=True) * rows)  # (S, C)
    return torch.where(is_in > 0, of_class[:, labels], 0)


class _Eigenbasis:
    """Features (N, D) as coordinates (N, R) along the eigenvectors of their covariance, R = min(N, D).

    Attributes:
        coordinates: (N, R) float64, centred.
        variance: (R,), their mean squares.
        directions: (D, R), orthonormal: none is dropped, so the optimum, which lies in their span, is kept.
        mean: (D,).
    """

    def __init__(self, features: Tensor) -> None:
        features = features.double()
        self.mean = features.mean(dim=0)
        coordinates = features - self.mean
        span = None
        if len(features) < features.shape[1]:
            span, triangle = torch.linalg.qr(coordinates.T)  # (D, N), (N, N)
            coordinates = triangle.T
        variance, rotation = torch.linalg.eigh(coordinates.T @ coordinates / len(features))
        self.variance = variance.clamp(min=0)
        self.coordinates = coordinates @ rotation
        self.directions = rotation if span is None else span @ rotation


class _Point(NamedTuple):
    """Parameters (S, C, R + 1), the bias last, and there the objective.

    Attributes:
        value: (S,).
        gradient: (S, C, R + 1).
        residual: (S, C, N), row weight times (probability minus 1 for the row's class, minus 0 for others).
    """

    parameters: Tensor
    value: Tensor
    gradient: Tensor
    residual: Tensor


class _Objective:
    """S weighted mean losses on the same coordinates, and their penalty; row weights of each sum to 1."""

    def __init__(self, basis: _Eigenbasis, labels: Tensor, row_weights: Tensor, num_classes: int) -> None:
        self.basis = basis
        self.labels = labels.expand(len(row_weights), 1, -1)  # (S, 1, N)
        self.size = row_weights.sum(dim=1)  # (S,)
        self.row_weights = (row_weights / self.size[:, None])[:, None]  # (S, 1, N)
        self.shares = row_weights.new_zeros(len(row_weights), num_classes)  # (S, C)
        self.shares.scatter_add_(1, self.labels[:, 0], self.row_weights[:, 0])
        present = self.shares > 0
        if (present.sum(dim=1) < 2).any():
            raise UserError("a probe needs rows of at least two classes; give more rows, or fewer classes")
        self.is_binary = present.sum(dim=1) == 2  # (S,)
        # Classes without a row in a subset take no part in it.
        self.offset = None if present.all() else torch.where(present, 0, -torch.inf).to(row_weights)[..., None]

    def penalty(self, c: float) -> Tensor:
        """(S,): what half of the squared weights is multiplied with."""
        return torch.where(self.is_binary, 2, 1) / (c * self.size)

    def start(self) -> Tensor:
        """(S, C, R + 1): the optimum without features."""
        parameters = self.shares.new_zeros(*self.shares.shape, len(self.basis.variance) + 1)
        parameters[..., -1] = torch.where(self.shares > 0, self.shares.log(), 0)
        return parameters

    def at(self, parameters: Tensor, penalty: Tensor) -> _Point:
        coordinates = self.basis.coordinates
        weights, bias = parameters[..., :-1], parameters[..., -1:]
        logits = (weights.flatten(0, 1) @ coordinates.T).unflatten(0, bias.shape[:2])  # (S, C, N)
        logits += bias if self.offset is None else bias + self.offset
        logits -= logits.amax(dim=1, keepdim=True)  # the loss of a row is then small where its class is sure
        of_label = logits.gather(1, self.labels)  # (S, 1, N)
        residual = logits.exp_()
        total = residual.sum(dim=1, keepdim=True)
        # A row outside of a subset may be of a class that the subset lacks, whose loss is infinite.
        loss = torch.where(self.row_weights > 0, (total.log() - of_label) * self.row_weights, 0).sum(dim=(1, 2))
        residual *= self.row_weights / total
        residual.scatter_add_(1, self.labels, -self.row_weights)
        gradient = (residual.flatten(0, 1) @ coordinates).unflatten(0, bias.shape[:2])
        gradient += penalty[:, None, None] * weights
        gradient = torch.cat([gradient, residual.sum(dim=-1, keepdim=True)], dim=-1)
        value = loss + penalty / 2 * weights.square().sum(dim=(1, 2))
        return _Point(parameters, value, gradient, residual)

    def inverse_diagonal(self, point: _Point, penalty: Tensor) -> Tensor:
        """(S, 1, R + 1): the inverse Hessian, as if it were diagonal and the rows' p (1 - p) the same for all classes.

        The mean over classes: one for each class saves some steps (a third at most), but where classes are rare the
        estimate of the gap that comes of it was 600 times too low, with the mean 80 times.
        """
        size = point.residual.abs()  # row weight times p or 1 - p, so that size (1 - size / row weight) is p (1 - p)
        spread = size - size.square() / self.row_weights.clamp(min=1e-300)  # (S, C, N)
        variance = torch.cat([self.basis.variance, self.basis.variance.new_ones(1)])
        diagonal = spread.sum(dim=(1, 2))[:, None, None] / spread.shape[1] * variance
        diagonal[..., :-1] += penalty[:, None, None]
        return 1 / diagonal.clamp(min=1e-12)


def _path(objective: _Objective, ascending: Sequence[float]) -> list[Tensor]:
    """Solutions (S, C, R + 1), one for each C."""
    solutions: list[Tensor] = []
    for number, c in enumerate(ascending):
        start = _extrapolated(solutions[-3:], ascending[max(0, number - 3) : number], c) if solutions else None
        solutions.append(_minimise(objective, objective.start() if start is None else start, c))
    return solutions


def _extrapolated(solutions: Sequence[Tensor], c_values: Sequence[float], c: float) -> Tensor:
    """At c, the polynomial in log C through the solutions; the last one where their C lie too unevenly for that."""
    places = [math.log(value) for value in c_values]
    factors = [
        math.prod((math.log(c) - other) / (place - other) for other in places if other != place) for place in places
    ]
    if max(map(abs, factors)) > 4:  # 3 for three C at equal distances
        return solutions[-1]
    return sum(factor * solution for factor, solution in zip(factors, solutions, strict=True))


def _minimise(objective: _Objective, start: Tensor, c: float) -> Tensor:
    """Parameters (S, C, R + 1) at the optimum, by L-BFGS; subsets that are there wait for the others."""
    penalty = objective.penalty(c)
    point = objective.at(start, penalty)
    inverse_diagonal = objective.inverse_diagonal(point, penalty)
    memory: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
    stuck = torch.zeros_like(point.value, dtype=torch.bool)  # (S,)
    for _ in range(MAX_STEPS):
        direction = _direction(point.gradient, memory, inverse_diagonal)
        slope = _dot(point.gradient, direction)  # (S,); half of it is the estimated gap
        # One step at least: only then is the scale of the diagonal known.
        moving = (slope > (2 * TOLERANCE * point.value if memory else 0)) & ~stuck
        if not moving.any():
            break
        reached, stuck_now = _line_search(objective, point, direction, slope, moving, penalty)
        stuck |= stuck_now
        change = reached.parameters - point.parameters
        gradient_change = reached.gradient - point.gradient
        memory.append((change, gradient_change, _inverse(_dot(change, gradient_change))))
        point = reached
    gap = (slope / 2 / point.value).max().item()
    if gap > LARGEST_GAP:
        log.warning("a probe of C=%g ended %.1e of its objective above the optimum", c, gap)
    return point.parameters


def _line_search(
    objective: _Objective, point: _Point, direction: Tensor, slope: Tensor, moving: Tensor, penalty: Tensor
) -> tuple[_Point, Tensor]:
    """Where enough is gained (Armijo), halving the step; and which subsets (S,) gain nothing by any step."""
    step = moving.double()
    slack = TOLERANCE / 10 * point.value  # what rounding may take
    for _ in range(MAX_HALVINGS):
        reached = objective.at(point.parameters - step[:, None, None] * direction, penalty)
        is_enough = reached.value <= point.value - 1e-4 * step * slope + slack
        if is_enough.all():
            return reached, ~is_enough
        step = torch.where(is_enough, step, step / 2)
    return objective.at(point.parameters - (step * is_enough)[:, None, None] * direction, penalty), ~is_enough


def _direction(gradient: Tensor, memory: Sequence[tuple[Tensor, Tensor, Tensor]], inverse_diagonal: Tensor) -> Tensor:
    """(S, C, R + 1): the estimated inverse Hessian times the gradient (two-loop recursion)."""
    direction = gradient
    factors = []
    for change, gradient_change, inverse in reversed(memory):
        factors.append(inverse * _dot(change, direction))
        direction = direction - factors[-1][:, None, None] * gradient_change
    if memory:
        change, gradient_change, _ = memory[-1]
        scale = _dot(change, gradient_change) * _inverse(_dot(gradient_change, inverse_diagonal * gradient_change))
        direction = torch.where(scale > 0, scale, 1)[:, None, None] * inverse_diagonal * direction
    else:
        direction = inverse_diagonal * direction
    for (change, gradient_change, inverse), factor in zip(memory, reversed(factors), strict=True):
        direction = direction + (factor - inverse * _dot(gradient_change, direction))[:, None, None] * change
    return direction


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=(1, 2))


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where they are not positive: a subset that did not move has nothing to remember."""
    return torch.where(values > 0, 1 / values, 0)


def _back(
    basis: _Eigenbasis, objective: _Objective, solution: Tensor, classes: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Weights (S, C, D) and bias (S, C) for all classes and features as they came, of a solution in the eigenbasis."""
    weights = torch.zeros(len(solution), num_classes, len(basis.mean), dtype=torch.float64)
    bias = torch.full(weights.shape[:2], -torch.inf, dtype=torch.float64)
    turned = solution[..., :-1] @ basis.directions.T
    weights[:, classes] = turned.cpu()
    shifted = solution[..., -1] - turned @ basis.mean
    bias[:, classes] = torch.where(objective.shares > 0, shifted, -torch.inf).cpu()
    return weights, bias
