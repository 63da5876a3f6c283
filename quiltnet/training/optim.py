"""Parameter groups, the optimiser, and the learning rate as a function of samples seen."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quiltnet.errors import UserError


def parameter_groups(
    model: nn.Module, weight_decay: float, no_weight_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Two groups, ``decay`` and ``no_decay``.

    Weight decay pulls towards zero, which means nothing for a norm's gain, a bias, ``logit_scale`` or a position
    embedding: vectors, scalars and the names in ``no_weight_decay`` are left alone, whatever they are called.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name in no_weight_decay
            groups["no_decay" if exempt else "decay"].append(parameter)
    decays = {"decay": weight_decay, "no_decay": 0.0}
    return [{"name": name, "params": params, "weight_decay": decays[name]} for name, params in groups.items() if params]


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.2,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """AdamW with CLIP's betas and eps (Radford et al. 2021, table 19)."""
    if not lr > 0:
        raise UserError(f"lr={lr} must be greater than 0; 1e-5 to 5e-5 suits full fine-tuning of a pretrained model")
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = parameter_groups(model, weight_decay, exempt)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps)


@dataclass(frozen=True)
class WarmupCosine:
    """Factor of the base learning rate: linear warm-up, then half a cosine down to ``final_factor``.

    A function of the clock alone, so a resumed run needs no scheduler state. Steps are drawn as open_clip draws them:
    the first one trains, with ``step_samples / warmup_samples``.
    """

    total_samples: int
    warmup_samples: int
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_samples < self.total_samples:
            raise UserError(
                f"warmup_samples={self.warmup_samples} must be less than total_samples={self.total_samples}; "
                "5 to 10 % of the run is usual"
            )

    def __call__(self, samples_seen: int, step_samples: int) -> float:
        """Args: samples before the step, and the samples of the step (the global batch)."""
        if samples_seen + step_samples <= self.warmup_samples:
            return (samples_seen + step_samples) / self.warmup_samples
        progress = (samples_seen - self.warmup_samples) / (self.total_samples - self.warmup_samples)
        cosine = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
        return self.final_factor + (1 - self.final_factor) * cosine
