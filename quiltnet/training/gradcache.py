"""GradCache: a large contrastive batch through the towers in micro-batches, with the gradient of the whole batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from quiltnet.errors import UserError
from quiltnet.training.random_state import random_state, restore_random_state
from quiltnet.training.stage import stage

log = logging.getLogger(__name__)

Parts = Sequence[Tensor | None]


def cached_backward(
    model: nn.Module,
    accelerator: Accelerator,
    inputs: tuple[Tensor | None, ...],
    objective: Callable[[Any], dict[str, Tensor]],
    micro_batch_size: int,
) -> tuple[dict[str, Tensor], Any]:  # all ranks
    """Leave in ``.grad`` the gradient of the whole batch's loss, holding the graph of one micro-batch at a time.

    GradCache (Gao et al. 2021, arXiv 2101.06983): encode all, differentiate the loss with respect to the features, then
    encode each micro-batch again and send its rows of that gradient through the towers. Averaging the losses of
    micro-batches would be something else: each pair would meet the negatives of its micro-batch alone.

    A micro-batch is encoded from the same random state both times, so dropout, patch dropout and stochastic depth
    draw the same. Afterwards random states are those that the objective left behind: a step uses up the draws of one
    forward and one loss, as an undivided step does, and the next step repeats none of them.

    Args:
        model: as placed on its device (DDP, FSDP2's module, or plain); its scalars are the same for every row.
        inputs: of this rank, ``(image, text)`` or ``(image, text, second_image)``; rows are split alike.
        objective: takes the model's named tuple of features, gives ``loss`` and scalars to be logged; it has no
            parameters of its own.
        micro_batch_size: rows of a micro-batch; the last one is shorter where it does not divide B.

    Returns:
        What the objective gave, and the features of all B rows; both detached.
    """
    chunks = _split(inputs, micro_batch_size, len(inputs[0]))
    with stage("forward"):
        features, states = _encode(model, accelerator, chunks)
    with stage("loss"):
        values, gradients = _differentiate(objective, features)
    with stage("backward"):
        after = random_state(accelerator.device)
        chunk_gradients = _split(gradients, micro_batch_size, len(inputs[0]))
        for number, (chunk, gradient, state) in enumerate(zip(chunks, chunk_gradients, states, strict=True), start=1):
            restore_random_state(state, accelerator.device)
            with nullcontext() if number == len(chunks) else _unreduced(model, accelerator):
                _encode_again(model, accelerator, chunk, gradient)
        restore_random_state(after, accelerator.device)
    return values, _detached(features)


def check_micro_batch_size(micro_batch_size: int, global_batch_size: int, world_size: int) -> None:
    """Refuse a size that does not divide the pairs of a rank.

    Raises:
        UserError: with the nearest sizes that do.
    """
    batch_size = global_batch_size // world_size
    if micro_batch_size >= 1 and batch_size % micro_batch_size == 0:
        return
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    below = [size for size in divisors if size < micro_batch_size][-1:]
    above = [size for size in divisors if size > micro_batch_size][:1]
    raise UserError(
        f"micro_batch_size={micro_batch_size} must divide the {batch_size} pairs of a rank "
        f"(global_batch_size={global_batch_size}, {world_size} ranks); use {' or '.join(map(str, below + above))}"
    )


def warn_of_batch_statistics(model: nn.Module, micro_batch_size: int) -> None:
    """Say that the step is not exact where BatchNorm is trained. Puts the model in training mode to find out."""
    model.train()
    if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        log.warning(
            "batchnorm=train with micro_batch_size=%d: BatchNorm sees the statistics of a micro-batch, and counts each "
            "twice, so the step is no longer that of the undivided batch; batchnorm=frozen keeps it exact",
            micro_batch_size,
        )


def _encode(model: nn.Module, accelerator: Accelerator, chunks: Sequence[Parts]) -> tuple[Any, list[dict[str, Tensor]]]:
    """Features of all rows as leaves of the loss's graph, and the random states that each micro-batch began with.

    The towers' graph is made and dropped, at about 1 % of a step (ViT-B/32 on a CPU). Under ``no_grad`` other code may
    run than in the second pass, with other draws: torch.compile compiles for each, and where its limit of variants is
    reached, which stochastic depth brings about, leaves the one or the other to eager mode.
    """
    states, outputs = [], []
    with _unreduced(model, accelerator):
        for chunk in chunks:
            states.append(random_state(accelerator.device))
            outputs.append(_detached(model(*chunk)))
    return outputs[0]._make(_leaf(parts) for parts in zip(*outputs, strict=True)), states


def _detached(features: Any) -> Any:
    return features._make(None if part is None else part.detach() for part in features)


def _leaf(parts: Parts) -> Tensor | None:
    if parts[0] is None:
        return None
    # A scalar is copied: it may be a parameter, whose memory FSDP takes back.
    whole = torch.cat(parts) if parts[0].ndim > 1 else parts[0].clone()
    return whole.requires_grad_()


def _differentiate(objective: Callable[[Any], dict[str, Tensor]], features: Any) -> tuple[dict[str, Tensor], Parts]:
    """The objective's values, and the gradient of its loss for each of the features (None where there is none)."""
    values = objective(features)
    leaves = [part for part in features if part is not None]
    # Of the loss itself: fp16's scaler comes in when these gradients are sent through the towers.
    found = iter(torch.autograd.grad(values["loss"], leaves, allow_unused=True))
    gradients = [None if part is None else next(found) for part in features]
    return {name: value.detach() for name, value in values.items()}, gradients


def _encode_again(model: nn.Module, accelerator: Accelerator, chunk: Parts, gradients: Parts) -> None:
    """A function of its own, so that nothing keeps this micro-batch's graph when the next one is made."""
    features = model(*chunk)
    with_gradient = [(part, grad) for part, grad in zip(features, gradients, strict=True) if grad is not None]
    # The gradient of this sum with respect to the features is the cached one.
    accelerator.backward(sum((part * gradient).sum() for part, gradient in with_gradient))


def _unreduced(model: nn.Module, accelerator: Accelerator) -> AbstractContextManager[None]:
    """DDP reduces gradients once a step, with the last micro-batch.

    FSDP2 after each: a rank adds up its shard, where it would else hold the gradient of the whole model.
    """
    return nullcontext() if isinstance(model, FSDPModule) else accelerator.no_sync(model)


def _split(parts: Parts, micro_batch_size: int, batch_size: int) -> list[tuple[Tensor | None, ...]]:
    """Micro-batches of ``parts``. A scalar goes with the last one: there DDP waits for every parameter's gradient."""
    number = -(-batch_size // micro_batch_size)
    columns: list[Sequence[Tensor | None]] = []
    for part in parts:
        if part is None:
            columns.append([None] * number)
        elif part.ndim < 2:
            columns.append([None] * (number - 1) + [part])
        else:
            columns.append(part.split(micro_batch_size))
    return list(zip(*columns, strict=True))
