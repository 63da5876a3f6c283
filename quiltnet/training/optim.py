"""The optimiser: by timm's or torch's name, over parameter groups that differ by tower and depth."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from quiltnet.distributed import world_size
from quiltnet.errors import UserError
from quiltnet.training.parameter_groups import parameter_groups

# CLIP's (Radford et al. 2021, table 19); torch's own are meant for smaller batches.
_DEFAULTS = {
    "adamw": {"betas": (0.9, 0.98), "eps": 1e-6},
    # Drawn from torch's generator, in which ranks differ, its random probes would let the weights of ranks drift apart.
    **{name: {"deterministic": True} for name in ("kron", "kronc", "kronw")},
}
# Arguments of the classes that are not options: what the groups hold.
_GIVEN = {"self", "params", "lr", "weight_decay"}
# Where torch's one-kernel AdamW was tried; elsewhere torch chooses.
_FUSED_DEVICES = {"cpu", "cuda"}


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float,
    weight_decay: float = 0.2,
    layer_decay: float = 1.0,
    image_lr_factor: float = 1.0,
    text_lr_factor: float = 1.0,
    projection_lr_factor: float = 1.0,
    logit_scale_lr_factor: float = 1.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimiser of the model's trainable parameters.

    Args:
        model: before it is placed: DDP, sharding and compilation rename parameters.
        name: one of ``timm.optim.list_optimizers()``, which takes AdamW, SGD and their like from torch.
        lr: of the heads; other arguments up to ``options`` are those of ``parameter_groups``.
        options: the optimiser's own, such as ``betas`` and ``eps``. AdamW has CLIP's by default, and runs fused.

    Raises:
        UserError: a name or an option that does not exist (with the nearest or with those that do), a rate out of
            range, an optimiser that is not installed; when a state is loaded, one of other parameters or groups.
    """
    name = _known_name(name)
    if not lr > 0:
        raise UserError(f"lr={lr} must be greater than 0; 1e-5 to 5e-5 suits full fine-tuning of a pretrained model")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay={weight_decay} must be at least 0")
    _check_options(name, options)
    groups = parameter_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        image_lr_factor=image_lr_factor,
        text_lr_factor=text_lr_factor,
        projection_lr_factor=projection_lr_factor,
        logit_scale_lr_factor=logit_scale_lr_factor,
        matrices_apart="muon" in name,
    )
    plain = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    settings = {**_DEFAULTS.get(name, {}), **_fused(name, model), **plain}
    try:
        optimizer = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **settings)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UserError(f"the optimiser {name} cannot be built with {settings} ({error})") from error
    optimizer.register_load_state_dict_pre_hook(_check_loaded)
    return optimizer


def check_sharded(optimizer: torch.optim.Optimizer, device: torch.device) -> None:  # all ranks
    """Find out on small layers whether an optimiser can update sharded weights, which many of timm's cannot.

    A kernel, a matrix, vectors, and a scalar that stays whole as ``logit_scale`` does.

    Args:
        optimizer: of ``build_optimizer``, before its first step.

    Raises:
        UserError: it cannot.
    """
    width = 8 * world_size()
    layers = nn.Sequential(nn.Conv2d(3, width, 2), nn.Flatten(), nn.Linear(width, width)).to(device)
    fully_shard(layers, mesh=init_device_mesh(device.type, (world_size(),)))
    scale = nn.Parameter(torch.ones((), device=device))
    known = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    first, last = (
        {name: value for name, value in optimizer.param_groups[at].items() if name != "param_names"} for at in (0, -1)
    )
    groups = [{**first, "params": list(layers.parameters())}, {**last, "params": [scale]}]
    try:
        probe = type(optimizer)(groups, **settings)
        (scale * layers(torch.ones(2, 3, 2, 2, device=device))).square().sum().backward()
        probe.step()
    except Exception as error:  # whatever an operation on sharded tensors is refused with
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the optimiser {type(optimizer).__name__} cannot update sharded weights ({reason}); use placement=ddp, or "
            "an optimiser that can: adamw, lion, sgd"
        ) from error


def skip_if(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Make the coming step change nothing where ``bad`` is true. Called before every step; never waits for the device.

    The fused Adam and AdamW leave weights, moments and step count as they were, whatever is in the gradients. Others
    get gradients of zero: their weight decay, momentum and step count move on, and all stays finite.

    Args:
        optimizer: not accelerate's wrapper, but its ``optimizer``.
        bad: ``()`` bool, on the device of the parameters.
    """
    # Not the fused SGD: a first step that is skipped leaves its momentum unwritten memory.
    is_adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    if is_adam and all(group["fused"] for group in optimizer.param_groups):
        optimizer.found_inf = bad.float()  # what torch's GradScaler tells a fused optimiser
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(bad, 0)


def _known_name(name: str) -> str:
    names = list_optimizers()
    if name.lower() in names:
        if get_optimizer_info(name).second_order:
            raise UserError(f"the optimiser {name} needs second derivatives, which a training step does not compute")
        return name.lower()
    near = get_close_matches(name.lower(), names, n=3)
    raise UserError(
        f"there is no optimiser {name!r}; "
        + (f"did you mean {' or '.join(near)}?" if near else "timm.optim.list_optimizers() names them")
    )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    try:
        known = set(inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters) - _GIVEN
    except (AssertionError, ImportError) as error:
        raise UserError(f"the optimiser {name} cannot be used here ({error}); adamw always can") from error
    for option in options:
        if option not in known:
            raise UserError(
                f"the optimiser {name} has no option {option}; the options it has are {', '.join(sorted(known))}"
            )


def _fused(name: str, model: nn.Module) -> dict[str, bool]:
    """One kernel for all parameters, and a step that can be skipped on the device."""
    is_adam = get_optimizer_class(name, bind_defaults=False) in (torch.optim.Adam, torch.optim.AdamW)
    devices = {parameter.device.type for parameter in model.parameters()}
    return {"fused": True} if is_adam and devices <= _FUSED_DEVICES else {}


def _check_loaded(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """torch matches a loaded state to parameters by their order alone."""
    ours, theirs = (_names(groups) for groups in (optimizer.param_groups, state["param_groups"]))
    if None not in theirs and ours != theirs:
        raise UserError(
            f"the optimiser's state is of other parameters or groups of them ({_sizes(theirs)} tensors) than this "
            f"run's ({_sizes(ours)}); resume with the same model and optim settings, or begin a new run"
        )


def _names(groups: Sequence[Mapping[str, Any]]) -> list[list[str] | None]:
    return [group.get("param_names") for group in groups]


def _sizes(names: Sequence[Sequence[str]]) -> str:
    return " + ".join(str(len(group)) for group in names)
