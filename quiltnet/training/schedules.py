"""The learning rate over a run, as functions of samples seen.

Each is called as ``schedule(samples_seen, step_samples) -> factor`` with the samples before a step and those of the
step (the global batch); the factor multiplies the rate of every parameter group. Functions of the clock alone, so a
resumed run needs no scheduler state. Warm-up steps are drawn as open_clip draws them: the first one trains, with
``step_samples / warmup_samples``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quiltnet.errors import UserError

DecayShape = Literal["linear", "cosine", "1-sqrt"]

# From 1 down to 0 as progress goes from 0 to 1.
_SHAPES = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine down to ``final_factor`` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    total_samples: int
    warmup_samples: int
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.total_samples, self.warmup_samples)

    def __call__(self, samples_seen: int, step_samples: int) -> float:
        falling = _fall("cosine", samples_seen, self.warmup_samples, self.total_samples, self.final_factor)
        return _rise(samples_seen, step_samples, self.warmup_samples) * falling


@dataclass(frozen=True)
class WarmupLinear:
    """Linear warm-up, then a straight line down to ``final_factor``."""

    total_samples: int
    warmup_samples: int
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.total_samples, self.warmup_samples)

    def __call__(self, samples_seen: int, step_samples: int) -> float:
        falling = _fall("linear", samples_seen, self.warmup_samples, self.total_samples, self.final_factor)
        return _rise(samples_seen, step_samples, self.warmup_samples) * falling


@dataclass(frozen=True)
class WarmupConstant:
    """Linear warm-up, then the full rate to the end."""

    total_samples: int
    warmup_samples: int

    def __post_init__(self) -> None:
        _check_warmup(self.total_samples, self.warmup_samples)

    def __call__(self, samples_seen: int, step_samples: int) -> float:
        return _rise(samples_seen, step_samples, self.warmup_samples)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, the full rate, and a decay over the last share of the run.

    Before the decay the course does not depend on ``total_samples``, so a run may be prolonged from there. Hägele et
    al. 2024 (arXiv 2405.18392) match a cosine with a decay over the last 10 to 20 %, best with the shape ``1-sqrt``.
    """

    total_samples: int
    warmup_samples: int
    decay_share: float = 0.2
    decay_shape: DecayShape = "1-sqrt"
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.total_samples, self.warmup_samples)
        if self.decay_shape not in _SHAPES:
            raise UserError(f"decay_shape={self.decay_shape!r}: choose one of {', '.join(_SHAPES)}")
        if not 0 < self.decay_share <= 1 - self.warmup_samples / self.total_samples:
            raise UserError(
                f"decay_share={self.decay_share} must be greater than 0 and leave the warm-up alone "
                f"({self.warmup_samples} of {self.total_samples} samples); 0.1 to 0.2 is usual"
            )

    def __call__(self, samples_seen: int, step_samples: int) -> float:
        decay_start = self.total_samples * (1 - self.decay_share)
        falling = _fall(self.decay_shape, samples_seen, decay_start, self.total_samples, self.final_factor)
        return _rise(samples_seen, step_samples, self.warmup_samples) * falling


def _check_warmup(total_samples: int, warmup_samples: int) -> None:
    if not 0 <= warmup_samples < total_samples:
        raise UserError(
            f"warmup_samples={warmup_samples} must be less than total_samples={total_samples}; "
            "5 to 10 % of the run is usual"
        )


def _rise(samples_seen: int, step_samples: int, warmup_samples: int) -> float:
    return min(1.0, (samples_seen + step_samples) / warmup_samples) if warmup_samples else 1.0


def _fall(shape: str, samples_seen: int, start: float, end: int, final_factor: float) -> float:
    """1 until ``start``, ``final_factor`` from ``end`` on."""
    progress = min(max((samples_seen - start) / (end - start), 0.0), 1.0)
    return final_factor + (1 - final_factor) * _SHAPES[shape](progress)
