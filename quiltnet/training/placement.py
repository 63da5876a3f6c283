"""Where a model lives and how its towers are run: replicated or sharded, checkpointed, compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from quiltnet.distributed import world_size
from quiltnet.errors import UserError

_COMPILE_BACKEND = "inductor"
# A block is compiled once for each of: tower, with and without gradient, autocast, inside a checkpoint; torch's 8 are
# fewer, and beyond them torch warns once and goes on uncompiled.
_RECOMPILE_LIMIT = 64
# What accelerate's launcher can ask for through the environment; each takes backward, clipping and state upon itself.
_FOREIGN = {DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM}


@dataclass(frozen=True)
class Placement:
    """How model and optimiser are laid over the ranks; nothing of it changes what is computed but for rounding.

    Attributes:
        sharding: ``ddp``: every rank holds all of the model. ``fsdp``: a rank holds its share of weights, gradients
            and optimiser state, and gathers a block of a tower when it needs it (FSDP2).
        gradient_compression: DDP sends gradients as bfloat16, half the bytes, each rounded by up to 0.4 %.
        activation_checkpointing: a block keeps its input alone and runs again in the backward pass.
        compile: the towers' blocks go through ``torch.compile``.
    """

    sharding: Literal["ddp", "fsdp"] = "ddp"
    gradient_compression: bool = False
    activation_checkpointing: bool = False
    compile: bool = False


def check_placement(placement: Placement, accelerator: Accelerator, precision: str) -> None:
    """Refuse what these ranks, this machine or this precision cannot do.

    Raises:
        UserError: with what they can.
    """
    if accelerator.distributed_type in _FOREIGN:
        raise UserError(
            f"the environment asks accelerate for {accelerator.distributed_type.value}, which would take gradients and "
            "optimiser state out of the run's hands; start with torchrun, and shard by placement=fsdp"
        )
    if placement.sharding == "fsdp":
        if world_size() == 1:
            raise UserError("sharding=fsdp needs several processes (torchrun --nproc-per-node 2 …); one shards nothing")
        if placement.gradient_compression:
            raise UserError("gradient_compression is of ddp, and sharding=fsdp was asked for; leave out one of them")
        if precision == "fp16":
            raise UserError("precision=fp16 scales gradients, which sharding=fsdp was not tried with; use bf16 or ddp")
    if placement.gradient_compression and world_size() == 1:
        raise UserError("gradient_compression=true, but one process sends no gradients; leave it out")
    if placement.compile:
        _check_compiler(accelerator.device.type)


def check_towers(placement: Placement, model: nn.Module) -> None:
    """Refuse a model that cannot be placed so; activation checkpointing is switched on to find out.

    Raises:
        UserError: a tower without blocks or with parameters shared between them, or that ignores checkpointing.
    """
    if placement.sharding == "fsdp":
        _check_units(model)
    if placement.activation_checkpointing:
        _checkpoint_activations(model)
    if placement.compile:
        model.tower_blocks()


def place(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, placement: Placement
) -> tuple[nn.Module, torch.optim.Optimizer]:  # all ranks
    """Model and optimiser where accelerate says, laid out as asked.

    Args:
        model: a ``ContrastiveModel``; changed in place.
        optimizer: of its parameters, without state yet. Under FSDP it is given the shards in their place.

    Raises:
        UserError: the model cannot be placed so.
        RuntimeError: the placement that came out is not the one asked for.
    """
    check_towers(placement, model)
    if placement.compile:
        _compile_blocks(model)
    if placement.sharding == "fsdp":
        _shard(model, optimizer, accelerator)
        optimizer = accelerator.prepare(optimizer)
        placed = isinstance(model, FSDPModule) and all(isinstance(p, DTensor) for p in model.parameters() if p.ndim)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        placed = isinstance(model, DistributedDataParallel) == (world_size() > 1)
    if not placed:
        raise RuntimeError(f"asked for {placement.sharding} on {world_size()} ranks, got a {type(model).__name__}")
    if placement.gradient_compression:
        model.register_comm_hook(None, bf16_compress_hook)
    return model, optimizer


def unwrap(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model without DDP and autocast around it, for ``wrap_again``; as it is where there was no DDP."""
    if not isinstance(model, DistributedDataParallel):
        return model
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def wrap_again(model: nn.Module, accelerator: Accelerator, placement: Placement) -> nn.Module:  # all ranks
    """DDP around the parameters that train now: it leaves out those that did not when it was made.

    Args:
        model: from ``unwrap``; the caller has let go of the DDP that was around it, whose hooks go with it.
    """
    if placement.sharding == "fsdp" or world_size() == 1:
        return model
    accelerator.free_memory()  # it kept the earlier DDP, whose hooks would send gradients a second time
    model = accelerator.prepare_model(model)
    if placement.gradient_compression:
        model.register_comm_hook(None, bf16_compress_hook)
    return model


def _shard(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:  # all ranks
    """torch's FSDP2, with the towers' blocks as units and a last one of what is around them.

    Not accelerate's plugin, which version 1.15 ignores on a CPU: it hands back DDP without a word. Parameters stay
    float32, and so do their sums over ranks; autocast is what computes in 16 bits, as under DDP.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    accelerator.prepare_model(model, evaluation_mode=True)  # device and autocast, no DDP
    for tensor in chain(model.parameters(), model.buffers()):  # as DDP does: ranks begin alike
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(accelerator.device.type, (world_size(),))
    # FSDP2 refuses tensors without dimensions, such as logit_scale; they stay whole, and are used outside forward too.
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for unit in (*chain.from_iterable(model.tower_blocks().values()), model):
        fully_shard(unit, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average_gradient)
    # Evaluators encode outside of forward, which is all that FSDP gathers parameters for by itself.
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    _repoint(optimizer, model, names)


def _average_gradient(scalar: Tensor) -> None:  # all ranks
    """The mean over ranks; of what was averaged before and is accumulated onto, the mean is itself."""
    dist.all_reduce(scalar.grad)
    scalar.grad.div_(world_size())


def _repoint(optimizer: torch.optim.Optimizer, model: nn.Module, names: dict[nn.Parameter, str]) -> None:
    """Give the optimiser the parameters that now stand where those did that it was made with."""
    if optimizer.state:
        raise RuntimeError("the optimiser has made steps already; shard first")
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, parameter in sharded.items() if parameter.requires_grad and parameter not in held]
    if left:
        raise RuntimeError(f"the optimiser was not given {', '.join(left)}")


def _check_units(model: nn.Module) -> None:
    blocks = list(chain.from_iterable(model.tower_blocks().values()))
    unit_of = {module: number for number, block in enumerate(blocks) for module in block.modules()}
    home: dict[nn.Parameter, tuple[int | None, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(path, recurse=False):
            unit, first = home.setdefault(parameter, (unit_of.get(module), name))
            if unit != unit_of.get(module):
                raise UserError(f"{first} and {name} are one parameter in two blocks, which fsdp cannot shard; use ddp")
    trained = any(isinstance(module, _BatchNorm) for module in model.modules()) and model.batchnorm == "train"
    if trained:
        raise UserError("batchnorm=train with fsdp would leave each rank with statistics of its own; use ddp")


def _checkpoint_activations(model: nn.Module) -> None:
    """By the libraries' own switch: torch's non-reentrant checkpoint around each block, random draws replayed."""
    clip = model.clip
    towers = {"image": clip.visual, "text": clip.text if hasattr(clip, "text") else clip.transformer}
    refusal = ""
    try:
        clip.set_grad_checkpointing(True)
    except ValueError as error:  # a Hugging Face encoder that does not know it
        refusal = f" ({error})"
    # open_clip goes on without a word, or with one in the log, where a tower has no such switch.
    deaf = [name for name, tower in towers.items() if not any(map(_is_checkpointed, tower.modules()))]
    if refusal or deaf:
        raise UserError(
            f"activation_checkpointing=true, but the {' and '.join(deaf) or 'text'} tower does not know it{refusal}; "
            "leave it out, micro_batch_size saves memory too"
        )


def _is_checkpointed(module: nn.Module) -> bool:
    return bool(getattr(module, "grad_checkpointing", False) or getattr(module, "gradient_checkpointing", False))


def _compile_blocks(model: nn.Module) -> None:
    """Block by block, in place: names of parameters stay, and blocks alike are compiled once.

    Shapes are symbols from the start. Texts come in a few lengths; and where a checkpointed block had graphs for one
    length and for any, its second run could take another than its first (pytorch issue 166926).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    torch._dynamo.config.optimize_ddp = False  # it splits graphs at DDP's buckets; a block is small enough as it is
    for block in chain.from_iterable(model.tower_blocks().values()):
        block.compile(backend=_COMPILE_BACKEND, dynamic=True)


def _check_compiler(device_type: str) -> None:
    """What ``torch.compile`` would look for at the first step: of a CPU a C++ compiler, of a GPU Triton and C."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(
            "compile=true needs Triton on a GPU, and it is not installed; pip install triton, or leave it out"
        )
    if device_type == "cuda":
        variable, usual = "CC", ("gcc", "clang")
    else:
        variable, usual = "CXX", ("clang++",) if sys.platform == "darwin" else ("g++",)
    candidates = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(map(shutil.which, candidates)):
        raise UserError(
            f"compile=true needs a compiler, and there is no {' or '.join(candidates)} here; install one, name it in "
            f"${variable}, or leave compile out"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise UserError(f"compile=true needs {header}; install Python's development package, or leave compile out")
