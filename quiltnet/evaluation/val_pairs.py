"""The training objective on held-out pairs: what to watch where there are no labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.features import HeldOutPairs, SetEncoder
from quiltnet.evaluation.gallery import build_gallery
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.retrieval import check_pairs, describe_pairs

KS = (1, 5)


@dataclass
class ValPairs:
    """Symmetric InfoNCE loss and recall@1 and @5 of held-out pairs, each image with its first caption.

    The loss is the mean over consecutive batches of ``batch_size`` pairs, in the set's order and whatever the
    number of ranks. A smaller last batch, whose loss is lower for having fewer wrong answers, is left out
    unless it is the only one. It has no interval: batches are not drawn again.

    For the health of one run: the loss depends on ``batch_size`` and on how often a batch repeats a caption
    (d equal ones cannot get below ln d), so do not compare it across sets.
    """

    pairs: HeldOutPairs
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        check_pairs(self.pairs)
        if self.batch_size < 2:
            raise UserError(f"batch_size={self.batch_size}: a pair has nothing to be confused with; give at least 2")

    @property
    def split(self) -> str:
        return self.pairs.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """loss, image_to_text_recall@k and text_to_image_recall@k."""
        pairs = encoder.pairs(self.pairs, batch_size=self.batch_size, workers=self.workers)
        gallery = build_gallery(pairs.image_ids, [in_row[:1] for in_row in pairs.captions])
        caption_features = encoder.texts(gallery.captions, batch_size=self.batch_size)  # (U, D)
        found = gallery.outcome(pairs.image_features, caption_features, KS)
        recalls = [metric for metric in found.scores if "recall" in metric]

        first_caption = [indices[0] for indices in gallery.caption_of_row]  # N
        loss = self._loss(pairs.image_features, caption_features[first_caption], encoder.logit_scale)
        scores = {"loss": loss} if math.isfinite(loss) else {}
        undefined = {} if scores else {"loss": f"it is {loss}, as of features that are NaN"}
        return Outcome(
            scores=scores | {metric: found.scores[metric] for metric in recalls},
            replicates={metric: found.replicates[metric] for metric in recalls},
            details={**found.details, "undefined": {**found.details["undefined"], **undefined}},
            items=found.items,
        )

    def describe(self) -> dict[str, Any]:
        """Data and choices; JSON types only. The gallery's sizes are in the outcome's details."""
        return {**describe_pairs(self.pairs), "ks": list(KS), "batch_size": self.batch_size}

    def _loss(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> float:
        """image_features, text_features: (N, D), a row a pair; logit_scale: ()."""
        size = min(self.batch_size, len(image_features))
        batches = len(image_features) // size
        losses = [
            symmetric_info_nce(image, text, logit_scale)
            for image, text in zip(
                image_features.split(size)[:batches], text_features.split(size)[:batches], strict=True
            )
        ]
        return torch.tensor(losses, dtype=torch.float64).mean().item()


def symmetric_info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> float:
    """CLIP's loss of one batch (arXiv:2103.00020): both directions' cross-entropy, pair i being right for i, averaged.

    image_features, text_features: (B, D), unit length; logit_scale: ().
    """
    logits_per_image = logit_scale * (image_features.double() @ text_features.double().T)  # (B, B)
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)  # (B,)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_image.T, target)).item() / 2
