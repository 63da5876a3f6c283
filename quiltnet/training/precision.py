"""What a run computes in: accelerate's owner of device, process group and mixed precision, and what a device can do."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from quiltnet.distributed import world_size
from quiltnet.errors import UserError
from quiltnet.training.process_group import start_process_group

log = logging.getLogger(__name__)

# Of a collective. In an evaluation ranks may wait for one of them to fit a probe, which the 10 minutes that NCCL gives
# would end; a step that hangs is found sooner, by the stall watch.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)

# CPU instructions that multiply bfloat16; without them torch converts to float32 and back.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def build_accelerator(precision: str = "fp32", *, deterministic: bool = False, cpu: bool = False) -> Accelerator:
    """accelerate's owner of device, process group and mixed precision.

    Args:
        precision: of the towers: ``fp32``, ``tf32`` (float32 whose products are rounded to 10 bits of mantissa),
            ``bf16`` or ``fp16`` (with a gradient scaler). Weights, features and ``logit_scale`` stay float32.
        deterministic: DDP rebuilds its gradient buckets after the first step, which changes the order of sums with
            three ranks or more (1e-5 was seen); looking for unused parameters keeps the buckets as they are.
            On a GPU, deterministic kernels as well.
        cpu: stay on the CPU where there is a GPU.

    Raises:
        UserError: the device does not have this precision.
    """
    on_cpu = cpu or not torch.accelerator.is_available()
    check_precision(precision, "cpu" if on_cpu else torch.accelerator.current_accelerator().type)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # for convolutions torch's default is True
    # A sweep's next trial may ask for another precision; accelerate keeps the first one's for the process.
    AcceleratorState._reset_state()
    buckets = DistributedDataParallelKwargs(find_unused_parameters=deterministic, gradient_as_bucket_view=True)
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    start_process_group(dist.get_default_backend_for_device(device), _COLLECTIVE_TIMEOUT)
    # Without cpu=True on a machine that has only that, accelerate 1.15 starts the process group but leaves the model
    # unwrapped: the ranks would train apart, without a word.
    accelerator = Accelerator(
        mixed_precision="no" if precision in ("fp32", "tf32") else precision,
        cpu=on_cpu,
        kwargs_handlers=[buckets, InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
    )
    if accelerator.num_processes != world_size():
        raise RuntimeError(f"accelerate sees {accelerator.num_processes} processes, torch.distributed {world_size()}")
    return accelerator


def check_precision(precision: str, device_type: str) -> None:
    """Refuse what the device does not have; warn where a CPU has it without instructions for it.

    Raises:
        UserError: with what the device does have.
    """
    on_gpu = device_type == "cuda"
    if precision == "fp16" and device_type == "cpu":
        raise UserError("precision=fp16 needs a GPU (its gradients are scaled there); use fp32 or bf16")
    # Ampere, compute capability 8.0, was the first to have either.
    if precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability() >= (8, 0)):
        raise UserError(
            f"precision=tf32 needs an NVIDIA GPU of Ampere or later, this is {_name(device_type)}; use fp32"
        )
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"precision=bf16 needs an NVIDIA GPU of Ampere or later, this is {_name(device_type)}; use fp16"
        )
    if precision == "bf16" and device_type == "cpu" and _is_slow_in_bf16():
        log.warning(
            "precision=bf16 on a CPU without bfloat16 instructions (torch finds none of %s): right, but slower than "
            "fp32",
            ", ".join(_BF16_INSTRUCTIONS),
        )


def _is_slow_in_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.6 says nothing of its CPU in public
        return False
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(name) for name in _BF16_INSTRUCTIONS)


def _name(device_type: str) -> str:
    return torch.cuda.get_device_name() if device_type == "cuda" else f"a {device_type.upper()}"
