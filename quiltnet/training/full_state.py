"""Weights and optimiser state whole and by parameter name, so that one process, DDP and FSDP open each other's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from quiltnet.distributed import is_main, rank, world_size
from quiltnet.errors import UserError


def full_weights(model: nn.Module) -> dict[str, Tensor]:  # all ranks
    """``clip.state_dict()`` without shards.

    What was sharded is on the CPU of rank 0, and of no other: a copy a rank would fill the host's memory.

    Args:
        model: as ``place`` left it.
    """
    weights = {name: _gather(tensor) for name, tensor in _unsharded_root(model).clip.state_dict().items()}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:  # all ranks
    """Args: the model as ``place`` left it, and on every rank all that ``full_weights`` gave rank 0."""
    clip = _unsharded_root(model).clip
    own = clip.state_dict()
    clip.load_state_dict({name: _part_of(whole, own.get(name)) for name, whole in weights.items()})


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
    return {"state": state, "param_groups": groups}


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:  # all ranks
    """Take up what ``full_optimizer_state`` gave rank 0, whatever the placement it came from.

    A state of an earlier version, which has numbers in place of names, is taken up where nothing is sharded.

    Raises:
        UserError: the state is of other parameters.
    """
    packed = optimizer.state_dict()
    if any(isinstance(name, int) for group in saved["param_groups"] for name in group["params"]):
        _load_numbered(model, optimizer, saved)
        return
    group_of = {name: group for group in saved["param_groups"] for name in group["params"]}
    state, groups = {}, []
    names = _names_by_group(model, optimizer)
    for live, group, names_of_group in zip(optimizer.param_groups, packed["param_groups"], names, strict=True):
        unknown = next((name for name in names_of_group if name not in group_of), None)
        if unknown is not None:
            raise UserError(f"the checkpoint's optimiser did not train {unknown}, this run does; begin a new run")
        groups.append({**group, **group_of[names_of_group[0]], "params": group["params"]})
        for number, name, parameter in zip(group["params"], names_of_group, live["params"], strict=True):
            if saved["state"].get(name):
                state[number] = {key: _part_of(value, parameter) for key, value in saved["state"][name].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _load_numbered(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    if isinstance(model, FSDPModule):
        raise UserError("this checkpoint is of an earlier version, whose optimiser state cannot be sharded; use ddp")
    if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise UserError("this checkpoint is of an earlier version, which grouped parameters otherwise; begin a new run")
    optimizer.load_state_dict(saved)


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
