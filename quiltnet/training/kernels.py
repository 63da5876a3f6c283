"""InfoNCE from tiles of logits: O(B D + chunk_size N) memory, for one process or many.

Each rank holds its B image rows against the N captions of all ranks, and makes every logit once in the forward pass and
once more in the backward pass: four matrix products, where a loss over both directions of gathered features takes six.
The sums of rows end on the rank; those of columns are made over chunks (an online log-sum-exp, Milakov and Gimelshein
2018, arXiv 1805.02867) and over ranks (all-reduce). Tiling and recomputing is Inf-CLIP's idea (Cheng et al. 2024, arXiv
2410.17243); one matrix for both directions and the distributed form are ours.

Two operations on a chunk of rows do the work, ``forward_chunk`` and ``gradient_chunk``: here in torch for every device
and type, in ``quiltnet.training.triton_kernels`` for a CUDA device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quiltnet.distributed import gather_rows, max_over_ranks, rank, reduce_scatter_rows, sum_over_ranks, world_size
from quiltnet.training.duplicates import Duplicates, all_if_none, require_ids
from quiltnet.training.targets import PairTargets, Targets, pair_targets

# Of one buffer of a chunk.
_TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}
_ROWS_WITHOUT_TILE = 4096
_CHUNK_ROWS = (32, 1024)  # fewer would waste the matrix product, more gain nothing


class ColumnStatistics(NamedTuple):
    """Of each column, over the rows seen so far: ``(N,)`` each, of the accumulating type, updated in place."""

    maximum: Tensor  # of the logits
    total: Tensor  # of exp(logit - maximum)
    target: Tensor  # of logits weighed by the column's target


class LogSumExps(NamedTuple):
    row: Tensor  # (B,) of each image over captions; +inf where the pair does not count
    column: Tensor  # (N,) of each caption over the images of all ranks; likewise
    loss: Tensor  # () this rank's sum over its rows and columns of (log-sum-exp - target)


class Operations(NamedTuple):
    """The two operations, and how many ``(chunk_size, N)`` buffers each wants."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    forward_tiles: int
    gradient_tiles: int


def streamed_info_nce(
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
    sizes: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> Tensor:  # all ranks
    """``quiltnet.training.losses.info_nce`` over the pairs of all ranks, value and gradient, from tiles.

    Args:
        image_features, text_features: ``(B, D)``, unit length, of this rank.
        logit_scale: ``()``.
        image_id, caption_id: ``(B,)`` int64 of this rank's pairs; for duplicates other than "ignore".
        kept: ``(N,)`` bool, captions of all ranks that take part; None for all.
        sizes: B of each rank, where they differ.
        chunk_size: rows at once; by default as many as a tile of moderate size has.

    Returns:
        ``()`` float32 (float64 for such features): this rank's share, whose mean over ranks is the loss of the global
        batch. Gradients are those of that loss times W, as DDP will take their mean over ranks; they are right if
        every rank goes backward from its share with the same weight.
    """
    require_ids(duplicates, image_id, caption_id)
    sizes = [len(image_features)] * world_size() if sizes is None else list(sizes)
    if duplicates != "ignore":
        image_id, caption_id = gather_rows(image_id, sizes), gather_rows(caption_id, sizes)
    targets = pair_targets(
        sum(sizes),
        image_features.device,
        duplicates=duplicates,
        label_smoothing=label_smoothing,
        hardness=hardness,
        image_id=image_id,
        caption_id=caption_id,
        kept=None if kept is None else all_if_none(kept),
    )
    return streamed_cross_entropy(image_features, text_features, logit_scale, targets, sizes, chunk_size)


def streamed_cross_entropy(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    targets: Targets,
    sizes: Sequence[int],
    chunk_size: int | None = None,
) -> Tensor:  # all ranks
    """Mean over rows and columns of the cross-entropy with ``targets``: a rank's share, as of ``streamed_info_nce``."""
    return _StreamedCrossEntropy.apply(image_features, text_features, logit_scale, targets, list(sizes), chunk_size)


class _StreamedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, targets: Targets, sizes: list[int], chunk_size: int | None
    ) -> Tensor:
        all_text = gather_rows(text, sizes)  # (N, D)
        sums = log_sum_exps(image, all_text, scale, targets, sizes, chunk_size)
        counted = sum(sizes) if targets.kept is None else targets.kept.sum(dtype=sums.loss.dtype)
        ctx.save_for_backward(image, all_text, scale, sums.row, sums.column)
        ctx.targets, ctx.sizes, ctx.chunk_size = targets, sizes, chunk_size
        ctx.factor = world_size() / (2 * counted)
        return sums.loss * ctx.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        image, all_text, scale, *_ = ctx.saved_tensors
        needs_image, needs_text, needs_scale, *_ = ctx.needs_input_grad
        factor = upstream * ctx.factor
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        with in_full_precision(image.device.type):
            for_image, for_text = _similarity_gradients(ctx, needs_image or needs_scale, needs_text)
            if needs_scale:  # the sum of G_ij c_ij over this rank's rows
                partial = torch.linalg.vecdot(for_image, image.to(for_image.dtype)).sum()
                gradients[2] = (partial * factor).to(scale.dtype)
        if needs_image:
            gradients[0] = for_image.mul_(factor * scale).to(image.dtype)
        if needs_text:
            own = reduce_scatter_rows(for_text, ctx.sizes)
            gradients[1] = own.mul_(factor * scale).to(all_text.dtype)
        return tuple(gradients)


def log_sum_exps(
    image: Tensor, all_text: Tensor, scale: Tensor, targets: Targets, sizes: Sequence[int], chunk_size: int | None
) -> LogSumExps:  # all ranks
    """One pass over the logits of this rank's images and all captions.

    Args:
        image: ``(B, D)`` of this rank.
        all_text: ``(N, D)``.
        sizes: B of each rank.
    """
    first, wide = sum(sizes[: rank()]), accumulating(image, all_text)
    own = slice(first, first + len(image))
    operations = _operations(image, all_text, targets)
    columns = ColumnStatistics(
        torch.full((len(all_text),), torch.finfo(wide).min, dtype=wide, device=image.device),
        torch.zeros(len(all_text), dtype=wide, device=image.device),
        torch.zeros(len(all_text), dtype=wide, device=image.device),
    )
    row, row_loss = torch.empty((2, len(image)), dtype=wide, device=image.device)
    with in_full_precision(image.device.type):
        for chunk, tiles in chunks(image, all_text, chunk_size, operations.forward_tiles):
            row[chunk], row_loss[chunk] = operations.forward(
                image[chunk], all_text, scale, first + chunk.start, targets, columns, tiles
            )
    maximum = max_over_ranks(columns.maximum)
    total = columns.total * (columns.maximum - maximum).exp()
    total, target = sum_over_ranks(torch.stack([total, columns.target]))
    log_total = total.log()
    column, column_loss = maximum + log_total, ((maximum - target) + log_total)[own]
    if targets.kept is not None:
        column = column.masked_fill(~targets.kept, torch.inf)
        row, row_loss, column_loss = (
            part.masked_fill(~targets.kept[own], value)
            for part, value in ((row, torch.inf), (row_loss, 0), (column_loss, 0))
        )
    return LogSumExps(row, column, row_loss.sum() + column_loss.sum())


def forward_chunk(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    first: int,
    targets: Targets,
    columns: ColumnStatistics,
    tiles: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of a chunk of rows; what they add to the columns is added in place.

    A logit is ``scale * x_i . y_j``. Inside log-sum-exps (not where it is weighed by a target) that of a negative is
    ``(scale + hardness) * x_i . y_j``, and that of a pair left out is -inf.

    Args:
        x: ``(n, D)`` images, the pairs ``first`` to ``first + n``.
        y: ``(N, D)`` captions of all pairs.
        scale: ``()``.
        targets: what to weigh and what to leave out.
        columns: updated in place.
        tiles: two ``(at least n, N)`` buffers of the accumulating type, overwritten.

    Returns:
        ``(n,)`` log-sum-exp, and ``(n,)`` log-sum-exp less target, as ``(maximum - target) + log(total)``: float32
        would lose a small loss between two large numbers. Rows that do not count (``kept``) may hold anything.
    """
    logits, powers = (tile[: len(x)] for tile in tiles)
    rows = targets.of_rows(first, len(x))
    ratio = _logits(x, y, scale, targets.hardness, out=logits)
    row_target, column_target = rows.sums(logits)
    if ratio is not None:
        row_target, column_target = row_target * ratio, column_target * ratio
    rows.adjust_(logits, ratio)
    # Finite where a row or column is left out whole, so that exp(-inf - maximum) is 0; NaN stays NaN.
    maximum = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)  # (n,)
    log_total = torch.sub(logits, maximum[:, None], out=powers).exp_().sum(1).log_()
    raised = torch.maximum(columns.maximum, logits.amax(0))  # (N,)
    columns.total.mul_((columns.maximum - raised).exp_()).add_(logits.sub_(raised).exp_().sum(0))
    columns.maximum.copy_(raised)
    columns.target.add_(column_target)
    return maximum + log_total, (maximum - row_target) + log_total


def gradient_chunk(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    first: int,
    row_lse: Tensor,
    column_lse: Tensor,
    targets: Targets,
    tiles: Sequence[Tensor],
) -> Tensor:
    """The gradient of a chunk of rows by the logits, before the mean over pairs.

    Args:
        x, y, scale, first, targets: as in ``forward_chunk``.
        row_lse: ``(n,)``, column_lse: ``(N,)``; +inf where a pair does not count as a row, as a column.
        tiles: two ``(at least n, N)`` buffers of the accumulating type, overwritten.

    Returns:
        ``(n, N)`` G_ij = p_ij - T_ij + q_ij - U_ij, with p = exp(logit - row_lse) and q = exp(logit - column_lse) of
        the raised logits and with the targets of rows T and columns U, each where its row or column counts. In the
        first of ``tiles``.
    """
    logits, powers = (tile[: len(x)] for tile in tiles)
    rows = targets.of_rows(first, len(x))
    rows.adjust_(logits, _logits(x, y, scale, targets.hardness, out=logits))
    torch.sub(logits, row_lse[:, None], out=powers).exp_()
    gradient = logits.sub_(column_lse).exp_().add_(powers)
    rows.subtract_from_(gradient)
    return gradient


def _logits(x: Tensor, y: Tensor, scale: Tensor, hardness: float, out: Tensor) -> Tensor | None:
    """All logits as those of negatives; and what makes one that of a positive, unless it is 1."""
    raised = scale + hardness if hardness else scale
    torch.mm(x.to(out.dtype) * raised, y.to(out.dtype).T, out=out)
    return scale / raised if hardness else None


def _similarity_gradients(ctx: Any, for_image: bool, for_text: bool) -> tuple[Tensor | None, Tensor | None]:
    """The sum over j of G_ij y_j ``(B, D)``, and over this rank's i of G_ij x_i ``(N, D)``; float32 or wider."""
    image, all_text, scale, row_lse, column_lse = ctx.saved_tensors
    first, wide = sum(ctx.sizes[: rank()]), row_lse.dtype
    operations = _operations(image, all_text, ctx.targets)
    image_gradient = torch.empty_like(image, dtype=wide) if for_image else None
    text_gradient = torch.zeros_like(all_text, dtype=wide) if for_text else None
    wide_image, wide_text = image.to(wide), all_text.to(wide)
    for chunk, tiles in chunks(image, all_text, ctx.chunk_size, operations.gradient_tiles):
        gradient = operations.gradient(
            image[chunk], all_text, scale, first + chunk.start, row_lse[chunk], column_lse, ctx.targets, tiles
        )
        if image_gradient is not None:
            torch.mm(gradient, wide_text, out=image_gradient[chunk])
        if text_gradient is not None:
            text_gradient.addmm_(gradient.T, wide_image[chunk])
    return image_gradient, text_gradient


def chunks(image: Tensor, all_text: Tensor, chunk_size: int | None, tiles: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the rows, with buffers that all of them use in turn."""
    wide = accumulating(image, all_text)
    if chunk_size is None:
        bytes_of_tile = _TILE_BYTES["cpu" if image.device.type == "cpu" else "cuda"]
        fitting = bytes_of_tile // (max(len(all_text), 1) * wide.itemsize)
        # Without a tile to hold, few launches are better.
        chunk_size = min(max(fitting, _CHUNK_ROWS[0]), _CHUNK_ROWS[1]) if tiles else _ROWS_WITHOUT_TILE
    chunk_size = min(chunk_size, len(image))
    buffers = [torch.empty((chunk_size, len(all_text)), dtype=wide, device=image.device) for _ in range(tiles)]
    for start in range(0, len(image), max(chunk_size, 1)):
        yield slice(start, min(start + chunk_size, len(image))), buffers


@contextmanager
def in_full_precision(device_type: str) -> Iterator[None]:
    """Products of float32 as they are, whatever the towers compute in: not under autocast, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def accumulating(image: Tensor, text: Tensor) -> torch.dtype:
    """float32 for 16 bits."""
    return torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)


def _operations(image: Tensor, all_text: Tensor, targets: Targets) -> Operations:
    if image.is_cuda and isinstance(targets, PairTargets) and importlib.util.find_spec("triton") is not None:
        from quiltnet.training import triton_kernels

        if triton_kernels.supports(image, all_text):
            return Operations(triton_kernels.forward_chunk, triton_kernels.gradient_chunk, 0, 1)
    return Operations(forward_chunk, gradient_chunk, 2, 2)
