"""The training loop: what moves, one step, the run."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from quiltnet.distributed import all_gather_object, rank, world_size

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Schedule = Callable[[int, int], float]


class Pairs(Protocol):
    """What a step needs of a batch."""

    image: Tensor  # (B, 3, H, W) uint8
    text: Tensor  # (B, L) int64
    rejected: list[tuple[str, str]]


@dataclass
class TrainState:
    """Everything that moves during a run; nothing that moves lives elsewhere.

    The loader needs no state of its own: its position is ``samples_seen``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    accelerator: Accelerator
    global_batch_size: int
    samples_seen: int = 0

    @property
    def step(self) -> int:
        """Optimiser updates made."""
        return self.samples_seen // self.global_batch_size

    @property
    def unwrapped(self) -> nn.Module:
        """The model without DDP around it."""
        return self.accelerator.unwrap_model(self.model)

    def passed(self, every_samples: int) -> bool:
        """Whether the last step reached or crossed a multiple of ``every_samples``."""
        before = self.samples_seen - self.global_batch_size
        return self.samples_seen // every_samples > before // every_samples

    def state_dict(self) -> dict[str, Any]:  # all ranks
        """Weights, optimiser, clock, and the random generators of every rank (dropout draws from them)."""
        return {
            "weights": self.unwrapped.clip.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "samples_seen": self.samples_seen,
            "random": all_gather_object(_random_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unwrapped.clip.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.samples_seen = state["samples_seen"]
        # Saved on fewer ranks: a new rank keeps the seed it was started with.
        if rank() < len(state["random"]):
            _restore_random_state(state["random"][rank()])


class Callback:
    """``fit_start -> (train_step -> step_end) * -> fit_end``; a callback must not change the course of training."""

    def fit_start(self, state: TrainState) -> None: ...

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None: ...

    def fit_end(self, state: TrainState) -> None: ...


def start_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    global_batch_size: int,
    accelerator: Accelerator | None = None,
) -> TrainState:
    """Place model and optimiser where accelerate says. Neither loader nor schedule are its business.

    A prepared loader would be dispatched from rank 0, a prepared schedule stepped once a rank.
    """
    accelerator = accelerator or build_accelerator()
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainState(model, optimizer, schedule, accelerator, global_batch_size)


def build_accelerator(precision: str = "fp32", *, deterministic: bool = False, cpu: bool = False) -> Accelerator:
    """accelerate's owner of device, process group and mixed precision.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16`` (with a gradient scaler) for the towers; features, loss and
            ``logit_scale`` stay float32.
        deterministic: DDP rebuilds its gradient buckets after the first step, which changes the order of sums with
            three ranks or more (1e-5 was seen); looking for unused parameters keeps the buckets as they are.
            On a GPU, deterministic kernels as well.
        cpu: stay on the CPU where there is a GPU.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # A sweep's next trial may ask for another precision; accelerate keeps the first one's for the process.
    AcceleratorState._reset_state()
    buckets = DistributedDataParallelKwargs(find_unused_parameters=deterministic, gradient_as_bucket_view=True)
    # Without cpu=True on a machine that has only that, accelerate 1.15 starts the process group but leaves the model
    # unwrapped: the ranks would train apart, without a word.
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=cpu or not torch.accelerator.is_available(),
        kwargs_handlers=[buckets],
    )
    if accelerator.num_processes != world_size():
        raise RuntimeError(f"accelerate sees {accelerator.num_processes} processes, torch.distributed {world_size()}")
    return accelerator


def train_step(state: TrainState, batch: Pairs, loss: Loss, *, max_grad_norm: float | None = 1.0) -> dict[str, Tensor]:
    """One update on the global batch; ``samples_seen`` moves by its size.

    Returns:
        Detached scalars, still on the device: reading them here would wait for it.
    """
    device = state.accelerator.device
    factor = state.schedule(state.samples_seen, state.global_batch_size)
    for group in state.optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
    image = batch.image.to(device, non_blocking=True)  # (B, 3, H, W)
    text = batch.text.to(device, non_blocking=True)  # (B, L)
    image_features, text_features, logit_scale = state.model(image, text)  # (B, D), (B, D), ()
    value = loss(image_features, text_features, logit_scale)
    state.accelerator.backward(value)
    metrics = {"loss": value.detach(), "logit_scale": logit_scale.detach()}
    if max_grad_norm is not None:
        metrics["grad_norm"] = state.accelerator.clip_grad_norm_(state.model.parameters(), max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.unwrapped.clamp_logit_scale()
    state.samples_seen += state.global_batch_size
    return metrics


def fit(
    state: TrainState,
    batches: Iterator[Pairs],
    loss: Loss,
    callbacks: Sequence[Callback],
    *,
    total_samples: int,
    max_grad_norm: float | None = 1.0,
) -> None:
    """Train until ``total_samples`` pairs were seen over all ranks. ``batches`` never end; the clock ends the run."""
    state.model.train()
    for callback in callbacks:
        callback.fit_start(state)
    while state.samples_seen < total_samples:
        asked = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - asked
        metrics = train_step(state, batch, loss, max_grad_norm=max_grad_norm)
        metrics["data_wait_s"] = torch.tensor(waited_s)
        metrics["step_s"] = torch.tensor(time.perf_counter() - asked)
        for callback in callbacks:
            callback.step_end(state, batch, metrics)
    for callback in callbacks:
        callback.fit_end(state)


def seed_everything(seed: int) -> None:
    """Seed this process; ranks add their number once the model is built, so that their dropout differs."""
    random.seed(seed)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
