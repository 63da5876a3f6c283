"""SigLIP's loss from tiles of logits, in one pass: O(B D + chunk_size N) memory, for one process or many.

A sigmoid has no normaliser, so the gradient of a logit is known as soon as the logit is: loss and gradients come out of
one pass over this rank's images and the captions of all ranks, in three matrix products. The captions' gradient is
summed over ranks in the backward pass (reduce-scatter), so that a forward pass alone does not pay. The torch path
serves every device and type, CUDA too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quiltnet.distributed import gather_rows, rank, reduce_scatter_rows, world_size
from quiltnet.training.duplicates import Duplicates, all_if_none, partners, require_ids, sharing_counts
from quiltnet.training.kernels import accumulating, chunks, in_full_precision


@dataclass(frozen=True)
class Labels:
    """Which of the N x N pairs are positive, and which take part; read a chunk of rows at a time.

    Attributes:
        duplicates, label_smoothing, hardness: see ``quiltnet.training.siglip.siglip``.
        image_id, caption_id: ``(N,)`` int64; None where duplicates are ignored.
        sharing_counts: ``(N,)`` int64, with how many pairs each shares, itself among them; likewise.
        kept: ``(N,)`` bool, captions that take part; None for all.
    """

    duplicates: Duplicates = "ignore"
    label_smoothing: float = 0.0
    hardness: float = 0.0
    image_id: Tensor | None = None
    caption_id: Tensor | None = None
    sharing_counts: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """What one pass over the logits of these rows gives; G is the gradient of ``loss`` by the logits ``(B, N)``.

    Attributes:
        loss: (), the sum over all pairs.
        for_image: (B, D), G y; for_text: (N, D), G^T x; for_scale: (), the sum of G times cosines; for_bias: (), that
            of G. None where nobody asked for it.
    """

    loss: Tensor
    for_image: Tensor | None = None
    for_text: Tensor | None = None
    for_scale: Tensor | None = None
    for_bias: Tensor | None = None


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
    counts = None
    if duplicates == "ignore":
        image_id = caption_id = None
    else:
        image_id, caption_id = gather_rows(image_id, sizes), gather_rows(caption_id, sizes)
        counts = sharing_counts(image_id, caption_id)
    kept = None if kept is None else all_if_none(kept)
    labels = Labels(duplicates, label_smoothing, hardness, image_id, caption_id, counts, kept)
    inputs = (image_features, text_features, logit_scale, logit_bias)
    # Asked here: inside the function gradients are off, and a parameter says yes under no_grad too.
    needs = tuple(torch.is_grad_enabled() and part.requires_grad for part in inputs)
    return _StreamedSigLIP.apply(*inputs, labels, sizes, chunk_size, needs)


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
        needs: tuple[bool, ...],
    ) -> Tensor:
        wide = accumulating(image, text)
        with in_full_precision(image.device.type):
            all_text = gather_rows(text, sizes)  # (N, D)
            given = (part.to(wide) for part in (image, all_text, scale, bias))
            found = _one_pass(*given, labels, sum(sizes[: rank()]), chunk_size, needs)
        counted = sum(sizes) if labels.kept is None else labels.kept.sum(dtype=wide)
        ctx.factor, ctx.sizes = world_size() / counted, sizes
        ctx.dtypes = [part.dtype for part in (image, text, scale, bias)]
        ctx.save_for_backward(scale, found.for_image, found.for_text, found.for_scale, found.for_bias)
        return found.loss * ctx.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, *found = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        factor = upstream * ctx.factor
        if needs[1]:
            found[1] = reduce_scatter_rows(found[1], ctx.sizes)
        factors = (factor * scale, factor * scale, factor, factor)
        gradients = [
            (part * of_part).to(dtype) if needed else None
            for part, of_part, dtype, needed in zip(found, factors, ctx.dtypes, needs, strict=True)
        ]
        return (*gradients, None, None, None, None)


def _one_pass(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Labels,
    first: int,
    chunk_size: int | None,
    needs: tuple[bool, ...],
) -> Pass:
    """Of images x ``(B, D)``, the pairs ``first`` to ``first + B``, and captions y ``(N, D)``."""
    losses, bias_sums = torch.zeros((2, len(x)), dtype=x.dtype, device=x.device)
    for_image = torch.empty_like(x) if needs[0] or needs[2] else None
    for_text = torch.zeros_like(y) if needs[1] else None
    for chunk, buffers in chunks(x, y, chunk_size, tiles=2):
        tiles = [buffer[: chunk.stop - chunk.start] for buffer in buffers]
        losses[chunk], gradient = _chunk(x[chunk], y, scale, bias, labels, first + chunk.start, tiles, any(needs))
        if for_image is not None:
            torch.mm(gradient, y, out=for_image[chunk])
        if for_text is not None:
            for_text.addmm_(gradient.T, x[chunk])
        if needs[3]:
            torch.sum(gradient, 1, out=bias_sums[chunk])
    for_scale = torch.linalg.vecdot(for_image, x).sum() if needs[2] else None
    for_bias = bias_sums.sum() if needs[3] else None
    return Pass(losses.sum(), for_image if needs[0] else None, for_text, for_scale, for_bias)


def _chunk(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Labels,
    first: int,
    tiles: Sequence[Tensor],
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses ``(n,)`` of the pairs ``first`` to ``first + n``, and their gradients ``(n, N)`` if asked for.

    With w the raised logit of a negative, minus the logit of a positive (softplus(z) - z would lose softplus(-z) in
    float32), and -inf where a pair does not take part, a loss is softplus(w) and its gradient sigmoid(w), but for the
    sign of positives and for smoothing. Both tiles are overwritten; the gradients are in the second.
    """
    logits, gradient = tiles
    raised = scale + labels.hardness
    torch.mm(x * raised, y.T, out=logits).add_(bias)
    rows = _Rows(labels, slice(first, first + len(x)))
    of_own = torch.linalg.vecdot(x, y[rows.own]) * scale + bias  # (n,)
    of_partners = None if rows.partnered is None else logits[rows.partnered]  # (p, N)
    if of_partners is not None and labels.hardness:
        of_partners.sub_(bias).mul_(scale / raised).add_(bias)
    smoothed = rows.smoothed(x, y, scale, bias, of_own, of_partners) if labels.label_smoothing else 0
    rows.place_(logits, of_own, of_partners)
    losses = torch.clamp_min(logits, 0, out=gradient).sum(1) - smoothed
    if with_gradient:
        rows.finish_(torch.sigmoid(logits, out=gradient))
    return losses + log1p_sums_(logits.abs_().neg_().exp_()), gradient


class _Rows:
    """What the labels say of the pairs ``own``, as images."""

    def __init__(self, labels: Labels, own: slice) -> None:
        self.labels = labels
        self.own = own
        self.partnered, self.shared = None, None
        if labels.duplicates != "ignore":
            ids = labels.image_id, labels.caption_id
            self.partnered, self.shared = partners(own, labels.sharing_counts, *ids)

    def smoothed(
        self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, of_own: Tensor, of_partners: Tensor | None
    ) -> Tensor:
        """What smoothing takes from each row's loss: e/2 times the sum of logits, those of positives with a minus."""
        kept = torch.ones_like(y[:, 0]) if self.labels.kept is None else self.labels.kept.to(y.dtype)
        total = x @ (scale * (kept @ y)) + bias * kept.sum() - 2 * of_own * kept[self.own]
        if of_partners is not None:
            times = 2 if self.labels.duplicates == "positive" else 1  # turned round, or taken out
            total.index_add_(0, self.partnered, (of_partners * self.shared) @ kept, alpha=-times)
        return total * (self.labels.label_smoothing / 2)

    def place_(self, logits: Tensor, of_own: Tensor, of_partners: Tensor | None) -> None:
        """In place: raised logits of negatives -> w of ``_chunk``."""
        logits.diagonal(self.own.start).copy_(-of_own)
        if self.labels.duplicates == "mask":
            logits[self.partnered] = logits[self.partnered].masked_fill_(self.shared, -torch.inf)
        elif self.labels.duplicates == "positive":
            logits[self.partnered] = torch.where(self.shared, -of_partners, logits[self.partnered])
        if self.labels.kept is not None:
            logits.masked_fill_(~self.labels.kept, -torch.inf)

    def finish_(self, sigmoid: Tensor) -> None:
        """In place: sigmoid of w -> gradient by the logits."""
        labels = self.labels
        if labels.label_smoothing:
            half = sigmoid.new_full((), labels.label_smoothing / 2)
            sigmoid.sub_(half if labels.kept is None else half * labels.kept)
        sigmoid.diagonal(self.own.start).neg_()
        if labels.duplicates == "positive":
            partnered = sigmoid[self.partnered]
            sigmoid[self.partnered] = torch.where(self.shared, -partnered, partnered)
        elif labels.duplicates == "mask" and labels.label_smoothing:
            sigmoid[self.partnered] = sigmoid[self.partnered].masked_fill_(self.shared, 0)


def log1p_sums_(powers: Tensor) -> Tensor:
    """Sum of log(1 + u) over each row of ``(n, N)`` u in [0, 1], which is overwritten -> ``(n,)``.

    A logarithm for each pair would cost a CPU nearly as much time as one of the matrix products. (1 + u)(1 + v) is
    1 + (u + v + uv), and a sum of positive terms loses nothing: so rows are folded to a 16th of their length first.
    """
    for _ in range(4):
        half = powers.shape[1] // 2
        powers, other = powers[:, : powers.shape[1] - half], powers[:, powers.shape[1] - half :]
        powers[:, :half].addcmul_(powers[:, :half], other).add_(other)
    return powers.log1p().sum(1)
