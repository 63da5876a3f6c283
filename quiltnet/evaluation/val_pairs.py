"""The training objective on held-out pairs: what to watch where there are no labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.features import (
    EncodesImagesAndText,
    HeldOutPairs,
    encode_captions,
    encode_pair_images,
)
from quiltnet.evaluation.metrics import symmetric_info_nce
from quiltnet.evaluation.retrieval import build_gallery, check_pairs

KS = (1, 5)


@dataclass
class ValPairs:
    """Symmetric InfoNCE loss and recall@1 and @5 of held-out pairs, each image with its first caption.

    The loss is the mean over consecutive batches of ``batch_size`` pairs, in the set's order and whatever the
    number of ranks. A smaller last batch, whose loss is lower for having fewer wrong answers, is left out
    unless it is the only one.

    For the health of one run: the loss depends on ``batch_size`` and on how often a batch repeats a caption
    (d equal ones cannot get below ln d), so do not compare it across sets.
    """

    pairs: HeldOutPairs
    batch_size: int = 64
    workers: int = 0
    _sizes: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_pairs(self.pairs)
        if self.batch_size < 2:
            raise UserError(f"batch_size={self.batch_size}: a pair has nothing to be confused with; give at least 2")

    def run(self, model: EncodesImagesAndText) -> Iterator[tuple[str, float]]:  # all ranks
        """loss, image_to_text_recall@k and text_to_image_recall@k."""
        image_features, captions, image_ids = encode_pair_images(
            model, self.pairs, batch_size=self.batch_size, workers=self.workers
        )
        gallery = build_gallery(image_ids, [in_row[:1] for in_row in captions])
        self._sizes = gallery.sizes()
        text_features = encode_captions(model, gallery.captions, batch_size=self.batch_size)  # (C, D)
        first_caption = [indices[0] for indices in gallery.caption_of_row]  # N
        yield "loss", self._loss(image_features, text_features[first_caption], model.logit_scale)
        yield from gallery.recalls(image_features, text_features, KS)

    def describe(self) -> dict[str, Any]:
        """JSON types only; the sizes of the gallery are known once ``run`` has read the pairs."""
        return {"pairs": len(self.pairs), "batch_size": self.batch_size, **self._sizes}

    def _loss(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> float:
        """image_features, text_features: (N, D), a row a pair; logit_scale: ()."""
        logit_scale = logit_scale.detach().float().cpu()
        size = min(self.batch_size, len(image_features))
        batches = len(image_features) // size
        losses = [
            symmetric_info_nce(image, text, logit_scale)
            for image, text in zip(
                image_features.split(size)[:batches], text_features.split(size)[:batches], strict=True
            )
        ]
        return torch.tensor(losses, dtype=torch.float64).mean().item()
