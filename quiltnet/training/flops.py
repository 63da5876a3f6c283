"""What a pair costs in floating-point operations, what a device could do at most, and how much memory was used."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Dense peaks in TFLOP/s as vendors' data sheets state them, those of tensor cores with float32 accumulation: GeForce
# cards do twice as much where they accumulate in float16, which training does not. A figure that is given with
# sparsity is halved. fp32 is what runs without tensor cores. By the name that torch.cuda.get_device_name gives; the
# first pattern that is found in it counts.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA H100 and H200 data sheets; the plain name of an H100 is "NVIDIA H100 80GB HBM3", the SXM module.
    (r"\bH[12]00 NVL\b", {"fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5}),
    (r"\bH[18]00 PCIe\b", {"fp32": 51, "tf32": 378, "fp16": 756, "bf16": 756}),
    (r"\b(H[128]00|GH200)\b", {"fp32": 67, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4}),
    (r"\bH20\b", {"fp32": 44, "tf32": 74, "fp16": 148, "bf16": 148}),
    # NVIDIA HGX B200 data sheet, an eighth of the board's.
    (r"\bB200\b", {"fp32": 75, "tf32": 1100, "fp16": 2250, "bf16": 2250}),
    # NVIDIA A100, A30, A10, A40 and RTX A6000 data sheets; Amazon's for the A10G, a card of its own.
    (r"\bA[18]00\b", {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312}),
    (r"\bA30\b", {"fp32": 10.3, "tf32": 82, "fp16": 165, "bf16": 165}),
    (r"\bA10G\b", {"fp32": 35, "tf32": 35, "fp16": 70, "bf16": 70}),
    (r"\bA10\b", {"fp32": 31.2, "tf32": 62.5, "fp16": 125, "bf16": 125}),
    (r"\bA40\b", {"fp32": 37.4, "tf32": 74.8, "fp16": 149.7, "bf16": 149.7}),
    (r"\bA6000\b", {"fp32": 38.7, "tf32": 77.4, "fp16": 154.8, "bf16": 154.8}),
    # NVIDIA L40S, L40, L4 and RTX 6000 Ada data sheets.
    (r"\bL40S\b", {"fp32": 91.6, "tf32": 183, "fp16": 362.05, "bf16": 362.05}),
    (r"\bL40\b", {"fp32": 90.5, "tf32": 90.5, "fp16": 181.05, "bf16": 181.05}),
    (r"\bL4\b", {"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121}),
    (r"\bRTX 6000 Ada\b", {"fp32": 91.1, "tf32": 182.1, "fp16": 364.2, "bf16": 364.2}),
    # NVIDIA V100, V100S and T4 data sheets: no TF32, no bfloat16.
    (r"\bV100S\b", {"fp32": 16.4, "fp16": 130}),
    (r"\bV100-PCIE\b", {"fp32": 14, "fp16": 112}),
    (r"\bV100\b", {"fp32": 15.7, "fp16": 125}),
    (r"\bT4\b", {"fp32": 8.1, "fp16": 65}),
    # NVIDIA's white papers on GA102 (RTX 3090), Ada (RTX 4090) and RTX Blackwell (RTX 5090); no Ti, no laptop.
    (r"\bRTX 3090$", {"fp32": 35.6, "tf32": 35.6, "fp16": 71, "bf16": 71}),
    (r"\bRTX 4090$", {"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2}),
    (r"\bRTX 5090$", {"fp32": 104.8, "tf32": 104.8, "fp16": 209.5, "bf16": 209.5}),
    # AMD Instinct data sheets. A MI250 or MI250X shows as two devices, so half of the card's figures.
    (r"\bMI325X\b", {"fp32": 163.4, "tf32": 653.7, "fp16": 1307.4, "bf16": 1307.4}),
    (r"\bMI300X\b", {"fp32": 163.4, "tf32": 653.7, "fp16": 1307.4, "bf16": 1307.4}),
    (r"\bMI300A\b", {"fp32": 122.6, "tf32": 490.3, "fp16": 980.6, "bf16": 980.6}),
    (r"\bMI250X\b", {"fp32": 23.9, "fp16": 191.5, "bf16": 191.5}),
    (r"\bMI250\b", {"fp32": 22.6, "fp16": 181, "bf16": 181}),
    (r"\bMI210\b", {"fp32": 22.6, "fp16": 181, "bf16": 181}),
)


def flops_per_pair(model: nn.Module, image: Tensor, text: Tensor) -> float:
    """Floating-point operations of one pair, forward and backward, as torch counts them on a small batch.

    A multiplication and an addition are two. Matrix products, convolutions and attention are counted, in what is
    trained and what lies behind it: a frozen tower has no backward, so it costs less than "three times the forward".
    Count before the model is compiled or checkpoints its activations: what is computed again is of no use, and compiled
    code is not seen. The loss is not counted: what it costs depends on how it is computed.

    Nothing of the run changes: gradients, buffers, mode and random generators are as before.

    Args:
        model: a ``ContrastiveModel``, in no wrapper.
        image: ``(n, 3, H, W)``, n small; text: ``(n, L)``.
    """
    return flops_by_length(model, image, text, [text.shape[1]])[text.shape[1]]


def flops_by_length(
    model: nn.Module, image: Tensor, text: Tensor, lengths: Sequence[int], *, views: int = 1
) -> dict[int, float]:
    """``flops_per_pair`` where texts are cut to each of ``lengths``, since a batch is as long as its longest text.

    Args:
        views: 2 where each image is seen twice a step.
    """
    with _left_as_it_was(model):
        of_image = views * _count(model, lambda: model.encode_image(image)) / len(image)
        of_text = {length: _count(model, lambda n=length: model.encode_text(text[:, :n])) for length in lengths}
    return {length: of_image + flops / len(text) for length, flops in of_text.items()}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that the device can do at most, without sparsity; None for a CPU and for what is not in the table.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: fp32, tf32, bf16 or fp16.
    """
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            peak = peaks.get(precision)
            return None if peak is None else peak * 1e12
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: on CUDA what torch allocated, else what this process held (its loader's apart)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: a process that was started by a large one inherits that one's peak.
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if peak is not None:
            return int(peak[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _count(model: nn.Module, encode: Callable[[], Tensor]) -> int:
    # By its definition: torch has no formula for the fused attention of a CPU, and a fused backward computes twice.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = encode()
        if features.requires_grad:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(features.sum(), trained, allow_unused=True)
    return counter.get_total_flops()


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Training mode inside: dropped patches are not computed, and BatchNorm's statistics may move.

    A frozen tower is in eval mode even so, where torch's attention takes one fused call that no formula counts.
    """
    was_training, was_fused = model.training, torch.backends.mha.get_fastpath_enabled()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        model.train()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(was_fused)
            model.train(was_training)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
