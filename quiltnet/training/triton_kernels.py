"""The two operations of ``quiltnet.training.kernels`` in Triton: logits never leave the registers in the forward pass.

Only where triton is installed can this be imported; ``supports`` says what it can compute. A program takes one block
of rows and, in the forward pass, every n-th block of columns. What it collects of its rows is written once, what of
columns once a block, and torch merges these parts: without atomics sums have the same order each time.

Shapes in the kernels: R rows (images) and K columns (captions) of a tile, D the width of features, in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quiltnet.training.targets import PairTargets


class Blocks(NamedTuple):
    """Sides of a tile, the step along D, and how a program runs."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Not measured on a GPU. Chosen by what ptxas says of the code for compute capability 8.0 and 9.0: registers suffice (at
# most 36 bytes spill), and shared memory fits in the 99 KiB that a block has on consumer GPUs (8.6, 8.9, 12.0). A
# table, not an autotuner, which would compile and time all candidates anew for every width and option.
BLOCKS = {
    torch.float32: Blocks(128, 64, 32, num_warps=8, num_stages=3),
    torch.float16: Blocks(128, 64, 64, num_warps=8, num_stages=3),
    torch.bfloat16: Blocks(128, 64, 64, num_warps=8, num_stages=3),
}
_PROGRAMS = 1024  # of a launch, about: some for each of 100 to 200 multiprocessors
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_MINUS_INFINITY = tl.constexpr(float("-inf"))


def supports(x: Tensor, y: Tensor) -> bool:
    """Whether the kernels take these features: 16 or 32 bits, on an NVIDIA GPU that has what they are made of."""
    if not (x.is_cuda and x.dtype == y.dtype and x.dtype in BLOCKS) or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)  # tf32 and bfloat16 products: Ampere and newer


def forward_chunk(
    x: Tensor, y: Tensor, scale: Tensor, first: int, targets: PairTargets, columns: Any, tiles: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """``quiltnet.training.kernels.forward_chunk``, without tiles."""
    blocks, spread = BLOCKS[x.dtype], _is_spread(targets)
    row_blocks, column_blocks = triton.cdiv(len(x), blocks.rows), triton.cdiv(len(y), blocks.columns)
    groups = min(column_blocks, triton.cdiv(_PROGRAMS, row_blocks))
    of_rows = torch.empty((3, groups, len(x)), device=x.device)
    of_columns = torch.empty((2 + spread, row_blocks, len(y)), device=x.device)
    with torch.cuda.device_of(x):
        _forward[(row_blocks, groups)](
            *of_rows, *of_columns[:2], of_columns[2] if spread else None, **_inputs(x, y, scale, first, targets)
        )
    maximum, total = _merged(*of_rows[:2])
    row_target, log_total = of_rows[2].sum(0), total.log()
    column_maximum, column_total = _merged(*of_columns[:2])
    raised = torch.maximum(columns.maximum, column_maximum)
    columns.total.mul_((columns.maximum - raised).exp_()).add_(column_total * (column_maximum - raised).exp_())
    columns.maximum.copy_(raised)
    if spread:
        columns.target.add_(of_columns[2].sum(0))
    else:
        columns.target[first : first + len(x)] += row_target
    return maximum + log_total, (maximum - row_target) + log_total


def gradient_chunk(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    first: int,
    row_lse: Tensor,
    column_lse: Tensor,
    targets: PairTargets,
    tiles: Sequence[Tensor],
) -> Tensor:
    """``quiltnet.training.kernels.gradient_chunk``, with one tile."""
    blocks, gradient = BLOCKS[x.dtype], tiles[0][: len(x)]
    grid = (triton.cdiv(len(x), blocks.rows), triton.cdiv(len(y), blocks.columns))
    with torch.cuda.device_of(x):
        _gradient[grid](row_lse, column_lse, gradient, **_inputs(x, y, scale, first, targets))
    return gradient


def _is_spread(targets: PairTargets) -> bool:
    """Whether anything but the pair itself is a target."""
    return targets.duplicates == "positive" or targets.label_smoothing > 0


def _inputs(x: Tensor, y: Tensor, scale: Tensor, first: int, targets: PairTargets) -> dict[str, Any]:
    """What both kernels read."""
    blocks, spread = BLOCKS[x.dtype], _is_spread(targets)
    weights = _weights(targets, slice(first, first + len(x)), len(y), x.device) if spread else (None,) * 4
    names = ("row_positive", "row_uniform", "column_positive", "column_uniform")
    return {
        "x": x.contiguous(),
        "y": y.contiguous(),
        "scale": scale,
        "rows": len(x),
        "columns": len(y),
        "first": first,
        "hardness": float(targets.hardness),
        "image_id": None if targets.image_id is None else targets.image_id.contiguous(),
        "caption_id": None if targets.caption_id is None else targets.caption_id.contiguous(),
        "kept": None if targets.kept is None else targets.kept.contiguous().view(torch.uint8),
        **dict(zip(names, weights, strict=True)),
        "WIDTH": x.shape[1],
        "WIDEN": x.device.type == "cpu",  # Triton's interpreter cannot multiply bfloat16
        "DUPLICATES": targets.duplicates,
        "IS_HARD": targets.hardness != 0,
        "HAS_KEPT": targets.kept is not None,
        "IS_SPREAD": spread,
        "BLOCK_R": blocks.rows,
        "BLOCK_K": blocks.columns,
        "BLOCK_D": blocks.depth,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        # A product fused with the sum after it is not the product that was written down: the loss of a lone pair, whose
        # logit less itself is 0, would be 1e-6.
        "enable_fp_fusion": False,
    }


def _weights(targets: PairTargets, own: slice, pairs: int, device: torch.device) -> tuple[Tensor, ...]:
    """What a positive has of a row's target, and what any column has: ``(n,)`` each; then ``(N,)`` the reverse."""
    smoothing = targets.label_smoothing
    positive = torch.full((pairs,), 1 - smoothing, device=device)
    row_positive, row_uniform = positive[own], torch.zeros_like(positive[own])
    column_positive, column_uniform = positive, torch.zeros_like(positive)
    if targets.duplicates == "positive":
        row_positive = row_positive / targets.row_positives[own]
        column_positive = column_positive / targets.column_positives
    if smoothing:
        row_uniform = smoothing / targets.row_choices[own]
        column_uniform = smoothing / targets.column_choices
    if targets.kept is not None:
        row_positive, row_uniform = row_positive * targets.kept[own], row_uniform * targets.kept[own]
    return row_positive, row_uniform, column_positive, column_uniform


def _merged(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps in parts ``(p, n)``, as a maximum and the sum of powers less it -> the same of the whole."""
    highest = maximum.amax(0)
    return highest, (total * (maximum - highest).exp_()).sum(0)


@triton.jit
def _logits(
    row_R, column_K, x, y, scale, rows, columns, first, hardness, image_id, caption_id, kept,
    WIDTH: tl.constexpr, WIDEN: tl.constexpr, DUPLICATES: tl.constexpr, IS_HARD: tl.constexpr, HAS_KEPT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A tile of logits as targets weigh them, and as log-sum-exps see them; which are positives, which take part."""
    in_R, in_K = row_R < rows, column_K < columns
    x_R, y_K = x + row_R.to(tl.int64) * WIDTH, y + column_K.to(tl.int64) * WIDTH
    cosine_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        depth_D = start + tl.arange(0, BLOCK_D)
        in_D = depth_D < WIDTH
        x_RD = tl.load(x_R[:, None] + depth_D[None, :], mask=in_R[:, None] & in_D[None, :], other=0.0)
        y_DK = tl.load(y_K[None, :] + depth_D[:, None], mask=in_D[:, None] & in_K[None, :], other=0.0)
        if WIDEN:
            x_RD, y_DK = x_RD.to(tl.float32), y_DK.to(tl.float32)
        # Three products in tf32 make one that errs no more than float32; 16 bits are multiplied as they are.
        cosine_RK = tl.dot(x_RD, y_DK, cosine_RK, input_precision="tf32x3")
    pair_R = first + row_R
    own_RK = pair_R[:, None] == column_K[None, :]
    positive_RK, present_RK = own_RK, in_R[:, None] & in_K[None, :]
    if HAS_KEPT:
        present_RK &= (tl.load(kept + column_K, mask=in_K, other=0) != 0)[None, :]
    if DUPLICATES != "ignore":
        image_R, image_K = tl.load(image_id + pair_R, mask=in_R), tl.load(image_id + column_K, mask=in_K)
        caption_R, caption_K = tl.load(caption_id + pair_R, mask=in_R), tl.load(caption_id + column_K, mask=in_K)
        shared_RK = (image_R[:, None] == image_K[None, :]) | (caption_R[:, None] == caption_K[None, :])
        if DUPLICATES == "positive":
            positive_RK = shared_RK
        else:
            present_RK &= own_RK | ~shared_RK
    plain_RK = scale * cosine_RK
    logit_RK = plain_RK
    if IS_HARD:
        logit_RK = tl.where(positive_RK, plain_RK, (scale + hardness) * cosine_RK)
    return plain_RK, tl.where(present_RK, logit_RK, _MINUS_INFINITY), positive_RK, present_RK


@triton.jit(do_not_specialize=["first"])
def _forward(
    row_maximum, row_total, row_target, column_maximum, column_total, column_target, x, y, scale, rows, columns,
    first, hardness, image_id, caption_id, kept, row_positive, row_uniform, column_positive, column_uniform,
    WIDTH: tl.constexpr, WIDEN: tl.constexpr, DUPLICATES: tl.constexpr, IS_HARD: tl.constexpr, HAS_KEPT: tl.constexpr,
    IS_SPREAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Of rows over this program's columns ``(groups, n)``; of columns over this program's rows ``(row blocks, N)``."""
    row_block, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    scale = tl.load(scale).to(tl.float32)
    row_R = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_R = row_R < rows
    maximum_R = tl.full((BLOCK_R,), _LOWEST, tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    target_R = tl.zeros((BLOCK_R,), tl.float32)
    of_columns = row_block.to(tl.int64) * columns
    for block in range(group, tl.cdiv(columns, BLOCK_K), groups):
        column_K = block * BLOCK_K + tl.arange(0, BLOCK_K)
        in_K = column_K < columns
        plain_RK, logit_RK, positive_RK, present_RK = _logits(
            row_R, column_K, x, y, scale, rows, columns, first, hardness, image_id, caption_id, kept,
            WIDTH, WIDEN, DUPLICATES, IS_HARD, HAS_KEPT, BLOCK_R, BLOCK_K, BLOCK_D
        )  # fmt: skip
        # Maxima pass over NaN, totals do not. Finite where nothing takes part, so that exp(-inf - maximum) is 0.
        raised_R = tl.maximum(maximum_R, tl.max(logit_RK, 1))
        power_RK = tl.exp(logit_RK - raised_R[:, None])
        total_R = total_R * tl.exp(maximum_R - raised_R) + tl.sum(power_RK, 1)
        maximum_R = raised_R
        maximum_K = tl.maximum(tl.max(logit_RK, 0), _LOWEST)
        tl.store(column_maximum + of_columns + column_K, maximum_K, mask=in_K)
        total_K = tl.sum(tl.exp(logit_RK - maximum_K[None, :]), 0)
        tl.store(column_total + of_columns + column_K, total_K, mask=in_K)
        if IS_SPREAD:
            plain_RK = tl.where(present_RK, plain_RK, 0.0)
            positive_R = tl.load(row_positive + row_R, mask=in_R, other=0.0)
            uniform_R = tl.load(row_uniform + row_R, mask=in_R, other=0.0)
            positive_K = tl.load(column_positive + column_K, mask=in_K, other=0.0)
            uniform_K = tl.load(column_uniform + column_K, mask=in_K, other=0.0)
            target_R += tl.sum(plain_RK * (tl.where(positive_RK, positive_R[:, None], 0.0) + uniform_R[:, None]), 1)
            target_K = tl.sum(plain_RK * (tl.where(positive_RK, positive_K[None, :], 0.0) + uniform_K[None, :]), 0)
            tl.store(column_target + of_columns + column_K, target_K, mask=in_K)
        elif (first + row_block * BLOCK_R < (block + 1) * BLOCK_K) & (
            block * BLOCK_K < first + (row_block + 1) * BLOCK_R
        ):
            target_R += tl.sum(tl.where(positive_RK & present_RK, plain_RK, 0.0), 1)
    of_rows = group * rows + row_R
    tl.store(row_maximum + of_rows, maximum_R, mask=in_R)
    tl.store(row_total + of_rows, total_R, mask=in_R)
    tl.store(row_target + of_rows, target_R, mask=in_R)


@triton.jit(do_not_specialize=["first"])
def _gradient(
    row_lse, column_lse, gradient, x, y, scale, rows, columns, first, hardness, image_id, caption_id, kept,
    row_positive, row_uniform, column_positive, column_uniform,
    WIDTH: tl.constexpr, WIDEN: tl.constexpr, DUPLICATES: tl.constexpr, IS_HARD: tl.constexpr, HAS_KEPT: tl.constexpr,
    IS_SPREAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Both probabilities less both targets, of one tile of ``(n, N)``."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_R, in_K = row_R < rows, column_K < columns
    _, logit_RK, positive_RK, present_RK = _logits(
        row_R, column_K, x, y, tl.load(scale).to(tl.float32), rows, columns, first, hardness, image_id, caption_id,
        kept, WIDTH, WIDEN, DUPLICATES, IS_HARD, HAS_KEPT, BLOCK_R, BLOCK_K, BLOCK_D
    )  # fmt: skip
    lse_R = tl.load(row_lse + row_R, mask=in_R, other=0.0)
    lse_K = tl.load(column_lse + column_K, mask=in_K, other=0.0)
    gradient_RK = tl.exp(logit_RK - lse_R[:, None]) + tl.exp(logit_RK - lse_K[None, :])
    if IS_SPREAD:
        positive_R = tl.load(row_positive + row_R, mask=in_R, other=0.0)
        uniform_R = tl.load(row_uniform + row_R, mask=in_R, other=0.0)
        positive_K = tl.load(column_positive + column_K, mask=in_K, other=0.0)
        uniform_K = tl.load(column_uniform + column_K, mask=in_K, other=0.0)
        gradient_RK -= tl.where(positive_RK, positive_R[:, None] + positive_K[None, :], 0.0)
        gradient_RK -= uniform_R[:, None] + uniform_K[None, :]
    else:
        gradient_RK -= tl.where(positive_RK, 2.0, 0.0)
    place_RK = row_R.to(tl.int64)[:, None] * columns + column_K[None, :]
    tl.store(gradient + place_RK, tl.where(present_RK, gradient_RK, 0.0), mask=in_R[:, None] & in_K[None, :])
