"""Weights and optimiser state whole and by parameter name, so that one process, DDP and FSDP open each other's."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from quiltnet.distributed import is_main, rank, world_size
from quiltnet.errors import UserError

_NOT_TRAINED = "the checkpoint's optimiser did not train {}, this run does; begin a new run"


def full_weights(model: nn.Module) -> dict[str, Tensor]:  # all ranks
    """``clip.state_dict()`` without shards.

    What was sharded is on the CPU of rank 0, and of no other: a copy a rank would fill the host's memory.

    Args:
        model: as ``place`` left it.
    """
    weights = {name: _gather(tensor) for name, tensor in _unsharded_root(model).clip.state_dict().items()}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:  # all ranks
    """Take up what ``full_weights`` gave rank 0.

    Args:
        model: as ``place`` left it.
        weights: all of them, on every rank.

    Raises:
        UserError: they are another model's.
    """
    clip = _unsharded_root(model).clip
    own = clip.state_dict()
    parts = {name: _part_of(whole, own.get(name)) for name, whole in weights.items()}
    try:
        clip.load_state_dict(parts)
    except RuntimeError as error:  # names that are missing or not known, and shapes
        what = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint is of another model than this run's: {what}") from error


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:  # all ranks
    """``optimizer.state_dict()`` without shards, with names of parameters where torch has their numbers.

    What was sharded is on the CPU of rank 0, and of no other.
    """
    packed = optimizer.state_dict()
    names = _names_by_group(model, optimizer)
    state, groups = {}, []
    for group, names_of_group in zip(packed["param_groups"], names, strict=True):
        groups.append({**group, "params": names_of_group})
        for number, name in zip(group["params"], names_of_group, strict=True):
            values = {key: _gather(value) for key, value in packed["state"].get(number, {}).items()}
            state[name] = {key: value for key, value in values.items() if value is not None}
    return {**packed, "state": state, "param_groups": groups}


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:  # all ranks
    """Take up what ``full_optimizer_state`` gave rank 0, whatever the placement it came from.

    Raises:
        UserError: the state is of other parameters.
    """
    packed = optimizer.state_dict()
    group_of = {name: group for group in saved["param_groups"] for name in group["params"]}
    state, groups = {}, []
    names = _names_by_group(model, optimizer)
    for live, group, names_of_group in zip(optimizer.param_groups, packed["param_groups"], names, strict=True):
        unknown = next((name for name in names_of_group if name not in group_of), None)
        if unknown is not None:
            raise UserError(_NOT_TRAINED.format(unknown))
        groups.append({**group, **group_of[names_of_group[0]], "params": group["params"]})
        for number, name, parameter in zip(group["params"], names_of_group, live["params"], strict=True):
            if saved["state"].get(name):
                state[number] = {key: _part_of(value, parameter) for key, value in saved["state"][name].items()}
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})


def check_fits(
    model: nn.Module, optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[int, ...]], trained: Collection[str]
) -> None:
    """Before anything is placed or loaded.

    Args:
        model, optimizer: as they were built.
        shapes: of the saved weights, under the names of ``full_weights``.
        trained: names of the parameters whose optimiser state was saved.

    Raises:
        UserError: they are of another model, or the optimiser trains more than was trained.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.clip.state_dict().items()}
    differing = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
    if differing:
        shown = ", ".join(
            f"{name} {shapes.get(name, 'absent')} then, {own.get(name, 'absent')} now" for name in differing[:3]
        )
        raise UserError(
            f"the checkpoint is of another model than this run's: {len(differing)} weights differ ({shown}); give the "
            "model and tuning of the first start, or begin a new run with model=start"
        )
    unknown = [name for names in _names_by_group(model, optimizer) for name in names if name not in trained]
    if unknown:
        raise UserError(_NOT_TRAINED.format(unknown[0]))


def with_settings_of(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved optimiser state with the groups and settings (rates, decay, betas) of an optimiser that is new.

    What an optimiser's class does not take as an argument is no setting, but state: Prodigy's estimate of its rate,
    say, which is kept among them.

    Args:
        optimizer: not accelerate's wrapper, but its ``optimizer``; no step was made.
        saved: of ``full_optimizer_state``.
    """
    settings = {*inspect.signature(type(optimizer).__init__).parameters, "lr", "weight_decay", "base_lr"}
    group_of = {name: group for group in saved["param_groups"] for name in group["params"]}
    groups = []
    for live, names in zip(optimizer.param_groups, _names_by_group(model, optimizer), strict=True):
        moved = {
            key: value
            for key, value in group_of.get(names[0], {}).items()
            if key not in settings and (key in optimizer.defaults or key not in live)
        }
        groups.append({**live, **moved, "params": [name for name in names if name in group_of]})
    return {**saved, "param_groups": groups}


def _unsharded_root(model: nn.Module) -> nn.Module:
    """The model without DDP around it; under FSDP with its sharded parameters in place.

    After an evaluation those of the root unit are still gathered, and not what the optimiser updates.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
    return model.module if isinstance(model, DistributedDataParallel) else model


def _names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    name_of = {parameter: name for name, parameter in _unsharded_root(model).named_parameters()}
    return [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def _gather(value: Any) -> Any:  # all ranks
    """A shard made whole on rank 0, None elsewhere; whatever else as it is."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if is_main() else None


def _part_of(whole: Any, like: Any) -> Any:
    """This rank's shard of a tensor that is whole on every rank, where ``like`` is sharded (over rows, by FSDP2)."""
    if not (isinstance(like, DTensor) and isinstance(whole, Tensor) and whole.shape == like.shape):
        return whole
    chunks = whole.chunk(world_size())
    own = chunks[rank()] if rank() < len(chunks) else whole[:0]
    return DTensor.from_local(
        own.to(like.device, copy=True),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
