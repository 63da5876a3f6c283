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


def sum_over_ranks(value: Tensor) -> Tensor:  # all ranks
    """The sum of a detached tensor over ranks."""
    return _all_reduce(value, dist.ReduceOp.SUM)


def max_over_ranks(value: Tensor) -> Tensor:  # all ranks
    """The greatest of a detached tensor over ranks, element by element."""
    return _all_reduce(value, dist.ReduceOp.MAX)


def mean_over_ranks(value: Tensor) -> Tensor:  # all ranks
    """The mean of a detached tensor over ranks."""
    return sum_over_ranks(value) / world_size() if world_size() > 1 else value


def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:  # all ranks
    """Rows of every rank, rank after rank; ranks may hold different numbers of rows. No gradient.

    Args:
        rows: ``(n_r, ...)`` on rank r.
        sizes: ``n_r`` of each rank, where all ranks know them; otherwise they are exchanged first.

    Returns:
        ``(sum of n_r, ...)``, the same on every rank.
    """
    if world_size() == 1:
        return rows
    sizes = all_gather_object(len(rows)) if sizes is None else sizes
    longest = max(sizes)
    # gloo wants equal shapes from all ranks: pad to the longest, cut again.
    padded = _padded(rows.detach(), longest).contiguous()
    gathered = rows.new_empty((len(sizes) * longest, *rows.shape[1:]))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.14
    gather(gathered, padded)
    if min(sizes) == longest:
        return gathered
    parts = gathered.unflatten(0, (len(sizes), longest))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatter_rows(rows: Tensor, sizes: Sequence[int]) -> Tensor:  # all ranks
    """This rank's rows of the sum over ranks: what a gather's gradient needs. No gradient of its own.

    Args:
        rows: ``(sum of sizes, ...)``; a block of rows for each rank, rank after rank.
        sizes: rows of each rank, the same list on every rank.

    Returns:
        ``(sizes[rank], ...)``.
    """
    if world_size() == 1:
        return rows
    longest = max(sizes)
    if min(sizes) < longest:
        rows = torch.cat([_padded(part, longest) for part in rows.split(list(sizes))])
    own = rows.new_empty((longest, *rows.shape[1:]))
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name from torch 2.14
    reduce_scatter(own, rows.contiguous())
    return own[: sizes[rank()]]


def _all_reduce(value: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value, operation)
    return value


def _padded(rows: Tensor, length: int) -> Tensor:
    """``rows`` and as many rows of zeros as make ``length``."""
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows.new_zeros((length - len(rows), *rows.shape[1:]))])
