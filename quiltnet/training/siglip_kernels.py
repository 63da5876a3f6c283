"""SigLIP's loss from tiles of logits, in one pass: O(B D + chunk_size N) memory, for one process or many.

A sigmoid has no normaliser, so the gradient of a logit is known as soon as the logit is: loss and gradients come out of
one pass over this rank's images and the captions of all ranks, in three matrix products. The captions' gradient is
summed over ranks in the backward pass (reduce-scatter), so that a forward pass alone does not pay. The torch path
serves every device and type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from quiltnet.distributed import gather_rows, rank, reduce_scatter_rows, world_size
from quiltnet.training.duplicates import Duplicates, all_if_none, require_ids, sharing

_TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}  # of one buffer of a chunk
_CHUNK_ROWS = (32, 1024)


@dataclass(frozen=True)
class Labels:
    """Which of the N x N pairs are positive, and which take part; read a chunk of rows at a time.

    Attributes:
        duplicates, label_smoothing, hardness: see ``quiltnet.training.siglip.siglip``.
        image_id, caption_id: ``(N,)`` int64; None where duplicates are ignored.
        kept: ``(N,)`` bool, captions that take part; None for all.
    """

    duplicates: Duplicates = "ignore"
    label_smoothing: float = 0.0
    hardness: float = 0.0
    image_id: Tensor | None = None
    caption_id: Tensor | None = None
    kept: Tensor | None = None

    @property
    def are_plain(self) -> bool:
        """Whether a pair is positive with itself alone, and nothing else is asked for."""
        return self.duplicates == "ignore" and not self.label_smoothing and not self.hardness and self.kept is None


def streamed_siglip(
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
    sizes: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> Tensor:  # all ranks
    """``quiltnet.training.siglip.siglip`` over the pairs of all ranks, value and gradient, from tiles.

    Args:
        image_features, text_features: ``(B, D)``, unit length, of this rank.
        logit_scale, logit_bias: ``()``.
        image_id, caption_id: ``(B,)`` int64 of this rank's pairs; for duplicates other than "ignore".
        kept: ``(N,)`` bool, captions of all ranks that take part; None for all.
        sizes: B of each rank, where they differ.
        chunk_size: rows at once; by default as many as a tile of moderate size has.

    Returns:
        ``()`` float32 (float64 for such features): this rank's share, whose mean over ranks is the loss of the global
        batch, with gradients to match, as ``streamed_info_nce``.
    """
    require_ids(duplicates, image_id, caption_id)
    sizes = [len(image_features)] * world_size() if sizes is None else list(sizes)
    if duplicates == "ignore":
        image_id = caption_id = None
    else:
        image_id, caption_id = gather_rows(image_id, sizes), gather_rows(caption_id, sizes)
    kept = None if kept is None else all_if_none(kept)
    labels = Labels(duplicates, label_smoothing, hardness, image_id, caption_id, kept)
    return _StreamedSigLIP.apply(image_features, text_features, logit_scale, logit_bias, labels, sizes, chunk_size)


class _StreamedSigLIP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        labels: Labels,
        sizes: list[int],
        chunk_size: int | None,
    ) -> Tensor:
        wide = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            x, y = image.to(wide), gather_rows(text, sizes).to(wide)  # (B, D), (N, D)
            found = _one_pass(x, y, scale, bias, labels, sum(sizes[: rank()]), chunk_size, any(ctx.needs_input_grad))
        counted = sum(sizes) if labels.kept is None else labels.kept.sum(dtype=wide)
        ctx.factor, ctx.sizes, ctx.dtypes = world_size() / counted, sizes, (image.dtype, text.dtype)
        loss, *gradients = found
        ctx.save_for_backward(scale, *gradients)
        return loss * ctx.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, for_image, for_text, for_scale, for_bias = ctx.saved_tensors
        factor = upstream * ctx.factor
        needs_image, needs_text, needs_scale, needs_bias, *_ = ctx.needs_input_grad
        own = reduce_scatter_rows(for_text, ctx.sizes) if needs_text else None
        return (
            (for_image * (factor * scale)).to(ctx.dtypes[0]) if needs_image else None,
            (own * (factor * scale)).to(ctx.dtypes[1]) if needs_text else None,
            (for_scale * factor).to(scale.dtype) if needs_scale else None,
            (for_bias * factor).to(scale.dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def _one_pass(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Labels,
    first: int,
    chunk_size: int | None,
    with_gradients: bool,
) -> tuple[Tensor, ...]:
    """The sum of losses of all pairs of these rows; and G y ``(B, D)``, G^T x ``(N, D)``, sum G c, sum G.

    G is the gradient of that sum by the logits ``(B, N)``, c are the cosines.
    """
    losses = x.new_zeros(len(x))
    for_image, for_text, for_bias = torch.zeros_like(x), torch.zeros_like(y), x.new_zeros(())
    size = _chunk_size(x, y) if chunk_size is None else chunk_size
    tiles = [x.new_empty((min(size, len(x)), len(y))) for _ in range(2)]
    measure = _plain if labels.are_plain else _labelled
    for start in range(0, len(x), size):
        chunk = slice(start, min(start + size, len(x)))
        losses[chunk], gradient = measure(x[chunk], y, scale, bias, labels, first + start, tiles)
        if with_gradients:
            torch.mm(gradient, y, out=for_image[chunk])
            for_text.addmm_(gradient.T, x[chunk])
            for_bias += gradient.sum()
    for_scale = torch.linalg.vecdot(for_image, x).sum()
    return losses.sum(), for_image, for_text, for_scale, for_bias


def _plain(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Labels, first: int, tiles: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses ``(n,)`` and gradients ``(n, N)`` of the pairs ``first`` to ``first + n``: no copy of a tile is made."""
    logits, gradient = (tile[: len(x)] for tile in tiles)
    torch.mm(x * scale, y.T, out=logits).add_(bias)
    own = logits.diagonal(first).clone()
    torch.sigmoid(logits, out=gradient).diagonal(first).sub_(1)
    # softplus(-z) of the pair itself, as it is: softplus(z) - z would lose it.
    losses = softplus(logits)
    losses.diagonal(first).copy_(softplus(-own))
    return losses.sum(1), gradient


def _labelled(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Labels, first: int, tiles: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """As ``_plain``, by the definition, for all options."""
    rows = torch.arange(first, first + len(x), device=x.device)  # (n,)
    own = rows[:, None] == torch.arange(len(y), device=x.device)  # (n, N)
    same = own
    if labels.duplicates != "ignore":
        ids = labels.image_id, labels.caption_id
        same = sharing(*(part[rows] for part in ids), *ids) | own
    positive = same if labels.duplicates == "positive" else own
    left_out = same & ~own if labels.duplicates == "mask" else torch.zeros_like(own)
    if labels.kept is not None:
        left_out = left_out | ~labels.kept
    cosine = torch.mm(x, y.T, out=tiles[0][: len(x)])
    logits = scale * cosine + bias
    raised = logits + labels.hardness * cosine.masked_fill(same, 0)
    target = labels.label_smoothing / 2
    as_positive, as_negative = softplus(-logits) + target * logits, softplus(raised) - target * logits
    losses = torch.where(positive, as_positive, as_negative).masked_fill_(left_out, 0).sum(1)
    gradient = torch.sigmoid(raised) - target - positive.to(x.dtype) * (1 - 2 * target)
    return losses, gradient.masked_fill_(left_out, 0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); from torch's default threshold of 20 on it would be off by exp(-20)."""
    return F.softplus(x, threshold=40)


def _chunk_size(x: Tensor, y: Tensor) -> int:
    tile_bytes = _TILE_BYTES["cpu" if x.device.type == "cpu" else "cuda"]
    fitting = tile_bytes // (max(len(y), 1) * x.dtype.itemsize)
    return min(max(fitting, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])
