"""A moving average of the weights, kept beside those that train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from quiltnet.errors import UserError

AVERAGE_SUFFIX = "@ema"  # of an evaluator's name, where the averaged weights are measured


def evaluator_of(metric: str) -> str:
    """The evaluator of ``evaluator/metric``, or of ``evaluator@ema/metric``, which is of the averaged weights."""
    return metric.partition("/")[0].removesuffix(AVERAGE_SUFFIX)


@dataclass(frozen=True)
class Averaging:
    """How the moving average of a run is taken.

    Attributes:
        decay: share of the average that a step leaves, at most; the average looks back over about 1 / (1 - decay)
            steps.
        warmup: the decay begins at 0 and rises as 1 - step ** (-2 / 3), so that the average looks back over
            ``step ** (2 / 3)`` steps until ``decay`` is reached, and soon forgets the weights the run began with.
    """

    decay: float = 0.9998
    warmup: bool = True


def check_averaging(averaging: Averaging, sharding: str) -> None:
    """Refuse what cannot be averaged.

    Raises:
        UserError: the decay is no share, or weights are sharded.
    """
    if not 0 < averaging.decay < 1:
        raise UserError(
            f"a decay of the averaged weights of {averaging.decay} must lie between 0 and 1, such as 0.9998; null "
            "leaves the average out"
        )
    if sharding == "fsdp":
        raise UserError("averaged weights are whole on every rank, which sharding=fsdp is there to avoid; use ddp")


class WeightAverage:
    """timm's ``ModelEmaV3``: the exponential moving average of all parameters and floating-point buffers.

    Integer buffers are copied. ``logit_scale`` is averaged as it is stored, as a logarithm. What does not train stays
    as it is, to the bit. The same updates give the same average on every rank, so nothing is communicated.
    """

    def __init__(self, model: nn.Module, averaging: Averaging) -> None:
        """Args: a ``ContrastiveModel`` before it is placed: what accelerate wraps around ``forward`` is not copied."""
        self._ema = ModelEmaV3(model, decay=averaging.decay, use_warmup=averaging.warmup, foreach=False)
        self._ema.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The averaged model, in eval mode and without gradients."""
        return self._ema.module

    def restart(self, model: nn.Module) -> None:
        """Begin anew, with a copy of the weights of ``model``, on its device."""
        self._ema.to(model.device)
        self._ema.set(model)

    def update(self, model: nn.Module, step: int, taken: Tensor) -> None:
        """Take in the weights after an optimiser's step.

        Args:
            step: the number of the step, from 1 on.
            taken: ``()`` bool, on the device of the model: whether the step was made; if not, the average stays too.
        """
        # A tensor, so that nobody waits for `taken`; torch's foreach kernels take numbers only, hence foreach=False.
        decay = torch.where(taken, self._ema.get_decay(step), 1.0)
        with torch.no_grad():
            self._ema.apply_update_(model, decay)
