"""The loss on one device: its kernels against the dense definition, its time and memory beside its peers.

What ``benchmarks/gpu.py`` calls first, and what it measures with.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.training import kernels
from quiltnet.training.kernels import streamed_info_nce
from quiltnet.training.losses import info_nce
from quiltnet.training.targets import PairTargets

Row = dict[str, Any]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of max |a - b| / max |b|
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"duplicates": "mask", "label_smoothing": 0.1, "hardness": 3.0},
    "positive": {"duplicates": "positive", "label_smoothing": 0.1, "hardness": 3.0},
}


def check_parity(device: torch.device, sizes: Sequence[int]) -> list[Row]:
    """Errors of the loss and of its gradients by images, texts and scale; ``by`` is the module that computed them."""
    rows = []
    for dtype, tolerance in TOLERANCES.items():
        by = kernels._operations(*features(device, 1, dtype), PairTargets()).forward.__module__
        for pairs in sizes:
            for name, options in OPTIONS.items():
                errors = relative_errors(device, dtype, pairs, options)
                row = {"by": by, "dtype": str(dtype), "pairs": pairs, "options": name, "errors": errors}
                rows.append({**row, "tolerance": tolerance, "passed": all(error <= tolerance for error in errors)})
    return rows


def relative_errors(device: torch.device, dtype: torch.dtype, pairs: int, options: dict[str, Any]) -> list[float]:
    """Of the loss and its three gradients, against float64 on the rounded inputs."""
    inputs = (*features(device, pairs, dtype), torch.tensor(20.0, device=device))
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3 * pairs, (pairs,), generator=generator).to(device) for _ in range(2)]
    kept = (torch.rand(pairs, generator=generator) < 0.9).to(device)
    options = {**options, "image_id": ids[0], "caption_id": ids[1], "kept": kept}
    # Chunks that end within a block of rows.
    ours = value_and_gradients(lambda *i: streamed_info_nce(*i, chunk_size=300, **options), inputs)
    wide = tuple(part.double() for part in inputs)
    expected = value_and_gradients(lambda *i: info_nce(*i, **options), wide)
    # A lone pair has no loss: there, the error itself.
    return [
        ((a.double() - b).abs().max() / (b.abs().max() if pairs > 1 else 1)).item()
        for a, b in zip(ours, expected, strict=True)
    ]


def features(device: torch.device, pairs: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(2, pairs, 512, generator=generator, device=device)
    return [part.to(dtype) for part in F.normalize(drawn, dim=-1)]


def value_and_gradients(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = tuple(part.detach().requires_grad_() for part in inputs)
    value = loss(*inputs)
    return (value.detach(), *torch.autograd.grad(value, inputs))


def loss_variants(device: torch.device) -> dict[str, Callable[..., Any]]:
    """By name: the loss and its gradients."""
    open_clips = open_clip.ClipLoss()
    by_torch = kernels.Operations(kernels.forward_chunk, kernels.gradient_chunk, 2, 2)
    variants = {
        "ours": within(nullcontext, streamed_info_nce),
        "ours, in torch": within(partial(patch.object, kernels, "_operations", lambda *_: by_torch), streamed_info_nce),
        "open_clip": within(nullcontext, open_clips),
        "open_clip, bf16 autocast": within(partial(torch.autocast, device.type, torch.bfloat16), open_clips),
    }
    if importlib.util.find_spec("inf_cl") is not None and device.type == "cuda":
        import inf_cl

        def inf_cls(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            # One direction a call. Its own scaling wants a process group.
            return (inf_cl.cal_inf_loss(scale * image, text) + inf_cl.cal_inf_loss(scale * text, image)) / 2

        variants["inf-cl"] = within(nullcontext, inf_cls)
    return variants


def within(context: Callable[[], AbstractContextManager[Any]], loss: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(inputs: tuple[Tensor, ...]) -> None:
        with context():
            value_and_gradients(loss, inputs)

    return run


def measure_losses(device: torch.device, sizes: Sequence[int], rounds: int) -> list[Row]:
    """Out of memory is a row, and so is a peer's kernel that this GPU or this Triton does not take."""
    rows = []
    for pairs in sizes:
        inputs = (*features(device, pairs, torch.float32), torch.tensor(20.0, device=device))
        variants = loss_variants(device)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        failures: dict[str, str] = {}
        for _ in range(rounds):
            for name in random.sample(list(variants), len(variants)):
                if name in failures:
                    continue
                try:
                    measured[name].append(measure_once(device, variants[name], inputs))
                except Exception as error:
                    if name.startswith("ours") and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        for name in variants:
            row = {"pairs": pairs, "variant": name}
            if name in failures:
                rows.append({**row, "failed": failures[name]})
            else:
                seconds, peaks = zip(*measured[name], strict=True)
                rows.append({**row, **spread(seconds), "peak_mib": max(peaks) / 2**20})
    return rows


def measure_once(device: torch.device, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Seconds, and bytes above what is held already (0 on a CPU)."""
    empty_memory(device)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    run(inputs)  # compiles, and allocates what the next one reuses
    synchronize(device)
    begun = time.perf_counter()
    run(inputs)
    synchronize(device)
    taken = time.perf_counter() - begun
    return taken, torch.cuda.max_memory_allocated() - held if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def spread(seconds: Sequence[float]) -> Row:
    return {"min_ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds), "max_ms": 1e3 * max(seconds)}
