"""SigLIP's loss: its dense definition, and the loss of a training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.training.duplicates import Duplicates, PairOptions, all_if_none, require_ids, sharing
from quiltnet.training.siglip_kernels import streamed_siglip


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    image_id: Tensor | None = None,
    caption_id: Tensor | None = None,
    duplicates: Duplicates = "ignore",
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """The sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343): the dense definition, for one process.

    Args:
        image_features, text_features: ``(B, D)``, unit length; row i of one belongs to row i of the other.
        logit_scale, logit_bias: ``()``.
        image_id, caption_id: ``(B,)`` int64; pairs with an id in common share an image or a caption.
        duplicates: what pairs that share are to each other: negatives ("ignore"), nothing ("mask"), or positives.
        label_smoothing: e; labels of 1 become 1 - e/2, labels of 0 become e/2.
        hardness: logits of negatives are raised by ``hardness * cosine``, without gradient through that.
        kept: ``(B,)`` bool; captions that take part. If none is kept, all are.

    Returns:
        ``()``: sum over all pairs of the binary cross-entropy, divided by the number of captions that take part.
    """
    require_ids(duplicates, image_id, caption_id)
    cosine = image_features @ text_features.T  # (B, B)
    own = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)  # (B, B)
    same = own if duplicates == "ignore" else sharing(image_id, caption_id, image_id, caption_id)  # (B, B)
    kept = torch.ones_like(own[0]) if kept is None else all_if_none(kept)
    takes_part = kept & ~(same & ~own) if duplicates == "mask" else kept.expand_as(own)
    label = (same if duplicates == "positive" else own).to(cosine.dtype)
    label = label * (1 - label_smoothing) + label_smoothing / 2
    logits = logit_scale * cosine + logit_bias
    raised = logits + hardness * cosine.detach().masked_fill(same, 0)
    losses = F.softplus(raised, threshold=40) - label * logits  # torch's own 20 is off by exp(-20)
    return losses.masked_fill(~takes_part, 0).sum() / kept.sum()


class SigLIP:
    """``siglip`` over the pairs of all ranks, streamed; otherwise as ``quiltnet.training.losses.InfoNCE``.

    Args:
        duplicates, label_smoothing, hardness: as of ``siglip``.
        caption_dropout: share of the captions that sit out a step, drawn anew in each.

    Raises:
        UserError: an option out of its range.
    """

    needs_logit_bias = True

    def __init__(
        self,
        duplicates: Duplicates = "ignore",
        label_smoothing: float = 0.0,
        hardness: float = 0.0,
        caption_dropout: float = 0.0,
    ) -> None:
        self.options = PairOptions(duplicates, label_smoothing, hardness, caption_dropout)

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        image_id: Tensor | None = None,
        caption_id: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:  # all ranks
        """The local share of the loss; its mean over ranks is the loss of the global batch.

        Args:
            image_features, text_features: ``(B, D)``, unit length, of this rank.
            logit_scale, logit_bias: ``()``.
            image_id, caption_id: ``(B,)`` int64 of this rank's pairs; for duplicates other than "ignore".
            sizes: B of each rank, where they differ.
        """
        if logit_bias is None:
            raise ValueError("SigLIP adds a logit_bias and got none; build the model with init_logit_bias=-10")
        return streamed_siglip(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_id=image_id,
            caption_id=caption_id,
            **self.options.of_step(text_features, sizes),
        )
