"""InfoNCE: its dense definition, and the loss of a training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quiltnet.training.duplicates import Duplicates, PairOptions, all_if_none, require_ids, sharing
from quiltnet.training.kernels import streamed_info_nce


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    image_id: Tensor | None = None,
    caption_id: Tensor | None = None,
    duplicates: Duplicates = "ignore",
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """The symmetric InfoNCE loss of CLIP (Radford et al. 2021, fig. 3): the dense definition, for one process.

    Args:
        image_features, text_features: ``(B, D)``, unit length; row i of one belongs to row i of the other.
        logit_scale: ``()``.
        image_id, caption_id: ``(B,)`` int64; pairs with an id in common share an image or a caption.
        duplicates: what pairs that share are to each other: negatives like all others ("ignore"), left out of the
            denominators ("mask"), or positives, with equal parts of the target ("positive").
        label_smoothing: share of the target that is uniform over what is not left out, as in ``F.cross_entropy``.
        hardness: logits of negatives weigh as if raised by ``hardness * cosine``, without gradient through that: the
            harder a negative, the more it counts (Lan et al. 2025, LLaVE, arXiv 2503.04812).
        kept: ``(B,)`` bool; captions that take part. The others are neither targets nor negatives, while their images
            stay negatives of other captions. If none is kept, all are.

    Returns:
        ``()``: mean over rows and columns (those of captions that take part) of the cross-entropy with the target.
    """
    require_ids(duplicates, image_id, caption_id)
    similarity = image_features @ text_features.T  # (B, B)
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)  # (B, B)
    same = own if duplicates == "ignore" else sharing(image_id, caption_id, image_id, caption_id)  # (B, B)
    kept = torch.ones_like(own[0]) if kept is None else all_if_none(kept)
    target = same if duplicates == "positive" else own
    logits = logit_scale * similarity + hardness * similarity.detach().masked_fill(same, 0)
    if duplicates == "mask":
        logits = logits.masked_fill(same & ~own, -torch.inf)
    plain = logit_scale * similarity
    rows = _cross_entropy(plain[kept][:, kept], logits[kept][:, kept], target[kept][:, kept], label_smoothing)
    columns = _cross_entropy(plain.T[kept], logits.T[kept], target.T[kept], label_smoothing)
    return (rows + columns) / 2


def _cross_entropy(logits: Tensor, in_denominator: Tensor, positives: Tensor, label_smoothing: float) -> Tensor:
    """Mean over rows; ``in_denominator`` are the logits with weighed negatives, -inf where one is left out."""
    present = in_denominator > -torch.inf
    positives, present = positives.to(logits.dtype), present.to(logits.dtype)
    target = (1 - label_smoothing) * positives / positives.sum(1, keepdim=True)
    target = target + label_smoothing * present / present.sum(1, keepdim=True)
    return (in_denominator.logsumexp(1) - (target * logits).sum(1)).mean()


class InfoNCE:
    """``info_nce`` over the pairs of all ranks, streamed: this rank's images against everybody's captions.

    Together with DDP's mean over ranks, gradients equal those of one process on the whole batch, for the towers and
    ``logit_scale`` alike. No rank ever holds more than a chunk of rows of the logits.

    Args:
        duplicates, label_smoothing, hardness: as of ``info_nce``.
        caption_dropout: share of the captions that sit out a step, drawn anew in each.

    Raises:
        UserError: an option out of its range.
    """

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
            logit_scale: ``()``.
            logit_bias: has no effect on a softmax.
            image_id, caption_id: ``(B,)`` int64 of this rank's pairs; for duplicates other than "ignore".
            sizes: B of each rank, where they differ.
        """
        return streamed_info_nce(
            image_features,
            text_features,
            logit_scale,
            image_id=image_id,
            caption_id=caption_id,
            **self.options.of_step(text_features, sizes),
        )
