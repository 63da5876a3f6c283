"""How much of an embedding is needed: the same measurement on its first dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.features import HeldOutPairs, ImageSamples, PairImages, SetEncoder
from quiltnet.evaluation.measuring import Evaluator
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.variants import check_is_measured, gather_variants

SMALLEST = 8  # where halving ends


@dataclass
class TruncationCurve:
    """An evaluator's metric on the first dimensions of the features, brought to unit length again.

    Features of a model trained for it (Matryoshka, Kusupati et al. 2022) lose little; of others, an index of half the
    size costs what this shows. The set is encoded once.

    Args:
        evaluator: of features in the joint space, such as zero-shot or k nearest neighbours.
        dims: how many dimensions; by default half of the model's, a quarter, and so on down to 8.
        metric: one of the evaluator's.

    Raises:
        UserError: a number of dimensions is below 1; when it runs, one is not below the model's, the evaluator has no
            such metric, or it asks for features before the projection.
    """

    evaluator: Evaluator
    dims: Sequence[int] | None = None
    metric: str = "balanced_accuracy"

    def __post_init__(self) -> None:
        if self.dims is not None and (not self.dims or min(self.dims) < 1):
            raise UserError(f"dims={list(self.dims)}: give at least one number of dimensions, each 1 or more")

    @property
    def split(self) -> str:
        return self.evaluator.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """The metric of all dimensions, and as ``balanced_accuracy@dim=256`` of fewer."""
        whole = self.evaluator.run(encoder)
        check_is_measured(self.metric, whole)
        width = encoder.texts(["image"], batch_size=1).shape[-1]
        return gather_variants(
            whole,
            {f"dim={dim}": self.evaluator.run(_truncated(encoder, dim)) for dim in self._dims(width)},
            self.metric,
        )

    def describe(self) -> dict[str, Any]:
        """The evaluator's, and what is cut; JSON types only."""
        dims = None if self.dims is None else list(self.dims)
        return {"evaluator": self.evaluator.describe(), "dims": dims, "metric": self.metric}

    def _dims(self, width: int) -> list[int]:
        """Descending."""
        if self.dims is None:
            halves = [width >> times for times in range(1, width.bit_length())]
            return [dim for dim in halves if dim >= SMALLEST]
        if max(self.dims) >= width:
            raise UserError(f"dims={list(self.dims)}, but features have {width} dimensions; give numbers below {width}")
        return sorted(set(self.dims), reverse=True)


@dataclass(frozen=True)
class TruncatedEncoder:
    """What a ``SetEncoder`` gives, cut to the first ``dim`` dimensions, unit length."""

    encoder: SetEncoder
    dim: int

    @property
    def logit_scale(self) -> Tensor:
        return self.encoder.logit_scale

    def images(
        self, samples: ImageSamples, *, batch_size: int, workers: int = 0, projected: bool = True
    ) -> Tensor:  # all ranks
        """(N, dim).

        Raises:
            UserError: features before the projection are asked for.
        """
        if not projected:
            raise UserError("features before the projection are not what is stored and cut; say projected: true")
        return self._cut(self.encoder.images(samples, batch_size=batch_size, workers=workers))

    def pairs(self, pairs: HeldOutPairs, *, batch_size: int, workers: int = 0) -> PairImages:  # all ranks
        found = self.encoder.pairs(pairs, batch_size=batch_size, workers=workers)
        return found._replace(image_features=self._cut(found.image_features))

    def texts(self, captions: Sequence[str], *, batch_size: int) -> Tensor:  # all ranks
        """(N, dim)."""
        return self._cut(self.encoder.texts(captions, batch_size=batch_size))

    def _cut(self, features: Tensor) -> Tensor:
        return F.normalize(features[:, : self.dim], dim=-1)


def _truncated(encoder: SetEncoder, dim: int) -> SetEncoder:
    # It has all that evaluators use of one, and no weights to inherit.
    return cast(SetEncoder, TruncatedEncoder(encoder, dim))
