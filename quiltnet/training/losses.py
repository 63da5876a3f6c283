"""Contrastive losses over the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.distributed import gather_features, rank, world_size


def info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The symmetric InfoNCE loss of CLIP (Radford et al. 2021, fig. 3): the dense definition, for one process.

    Args:
        image_features, text_features: ``(B, D)``, unit length; row i of one belongs to row i of the other.
        logit_scale: ``()``.

    Returns:
        ``()``: mean over rows and columns of the cross-entropy with the pair itself as target.
    """
    logits_per_image = logit_scale * image_features @ text_features.T  # (B, B)
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)  # (B,)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_image.T, target)) / 2


class InfoNCE:
    """``info_nce`` over the pairs of all ranks: this rank's rows against everybody's columns.

    Together with DDP's mean over ranks, gradients equal those of one process on the whole batch, for the towers and
    ``logit_scale`` alike. No rank holds more than ``(B, W*B)`` logits a direction.
    """

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:  # all ranks
        """The local share of the loss; its mean over ranks is the loss of the global batch.

        Args:
            image_features, text_features: ``(B, D)``, unit length, of this rank.
            logit_scale: ``()``.
            sizes: B of each rank, where they differ.
        """
        all_image_features = gather_features(image_features, sizes)  # (W*B, D)
        all_text_features = gather_features(text_features, sizes)  # (W*B, D)
        batch_size, total = len(image_features), len(all_image_features)
        first = sum(sizes[: rank()]) if sizes else rank() * batch_size
        target = torch.arange(first, first + batch_size, device=image_features.device)  # (B,)
        logits_per_image = logit_scale * image_features @ all_text_features.T  # (B, W*B)
        logits_per_text = logit_scale * text_features @ all_image_features.T  # (B, W*B)
        loss = (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_text, target)) / 2
        # DDP weighs ranks equally whatever their number of rows.
        return loss * (batch_size * world_size() / total)
