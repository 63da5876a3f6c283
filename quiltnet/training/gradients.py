"""Gradients between the backward pass and the optimiser: that they are there, and no longer than allowed."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from quiltnet.errors import UserError

_NAMES_SHOWN = 3


def check_gradients(model: nn.Module) -> None:
    """Before the optimiser's first step, or DDP would end the second one with words about its reducer.

    Raises:
        UserError: a parameter that is set to train has none.
    """
    parameters = model.named_parameters()
    names = [name for name, parameter in parameters if parameter.requires_grad and parameter.grad is None]
    if not names:
        return
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    raise UserError(
        f"no gradient reaches {', '.join(names[:_NAMES_SHOWN])}{more}, though set to train: the loss does not depend "
        "on them. LoRA on a module whose weights the tower reads past it does this, such as out_proj of torch's own "
        "attention; name other targets, or freeze what is not used"
    )


def clip_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_grad_norm: float | None
) -> Tensor:  # all ranks
    """The norm of the gradients over all parameters, before they are scaled down to ``max_grad_norm``."""
    accelerator.unscale_gradients(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    # Under FSDP scalars are whole where all else is sharded, and no operation takes both.
    sharded = [parameter for parameter in trained if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
    norms = [get_total_norm([parameter.grad for parameter in part]) for part in (sharded, whole) if part]
    norm = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    if max_grad_norm is not None:
        clip_grads_with_norm_(sharded, max_grad_norm, norm)
        clip_grads_with_norm_(whole, max_grad_norm, norm)
    return norm
