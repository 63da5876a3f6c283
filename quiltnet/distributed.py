"""Rank facts and the collectives of contrastive learning.

accelerate (or a test) starts the process group; nothing here does. Functions marked ``# all ranks`` communicate and
must be called by every rank, unconditionally.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quiltnet.errors import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process does the side effects: writes, prints, pushes."""
    return rank() == 0


def barrier() -> None:  # all ranks
    if world_size() > 1:
        dist.barrier()


def all_gather_object(value: Any) -> list[Any]:  # all ranks
    """``value`` of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:  # all ranks
    """Rank 0's ``value``, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(decide: Callable[[], Any]) -> Any:  # all ranks
    """What ``decide`` returns on rank 0, on every rank; if it raises a UserError there, every rank raises it.

    For what only rank 0 can or may look at: an error on one rank alone would leave the others waiting.
    """
    outcome: Any = None
    if is_main():
        try:
            outcome = decide()
        except UserError as error:
            outcome = error
    outcome = broadcast_object(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def mean_over_ranks(value: Tensor) -> Tensor:  # all ranks
    """The mean of a detached tensor over ranks."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather_rows(rows: Tensor) -> Tensor:  # all ranks
    """Rows of every rank, rank after rank; ranks may hold different numbers of rows. No gradient.

    Args:
        rows: ``(n_r, ...)`` on rank r.

    Returns:
        ``(sum of n_r, ...)``, the same on every rank.
    """
    if world_size() == 1:
        return rows
    return _all_gather(rows.detach(), all_gather_object(len(rows)))


def gather_features(features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:  # all ranks
    """Features of every rank, rank after rank, through which gradients flow back to the rank that made them.

    The gradient is the sum over ranks of what each rank's loss asks of these features. DDP then averages parameter
    gradients over ranks, so a loss that is a mean over local rows yields the gradient of one process on the whole
    batch (https://github.com/mlfoundations/open_clip/issues/616 shows what happens without it).

    Args:
        features: ``(B, D)``.
        sizes: rows of each rank, where ranks differ; ``None`` promises that all hold B, and spares an exchange.

    Returns:
        ``(W*B, D)``, or ``(sum of sizes, D)``.
    """
    if world_size() == 1:
        return features
    return _GatherWithGradient.apply(features, list(sizes or [len(features)] * world_size()))


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, sizes: list[int]) -> Tensor:
        ctx.start = sum(sizes[: rank()])
        ctx.length = len(features)
        return _all_gather(features, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.length], None


def _all_gather(rows: Tensor, sizes: list[int]) -> Tensor:
    # gloo wants equal shapes from all ranks: pad to the longest, cut again.
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
