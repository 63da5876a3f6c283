"""The training loop: what moves, one step, the run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import record_function

from quiltnet.distributed import all_gather_object, rank
from quiltnet.training.full_state import full_optimizer_state, full_weights, load_optimizer_state, load_weights
from quiltnet.training.gradcache import cached_backward
from quiltnet.training.optim import skip_if
from quiltnet.training.placement import Placement, place
from quiltnet.training.precision import build_accelerator
from quiltnet.training.random_state import random_state, restore_random_state

Schedule = Callable[[int, int], float]


class Pairs(Protocol):
    """What a step needs of a batch."""

    image: Tensor  # (B, 3, H, W) uint8
    text: Tensor  # (B, L) int64
    second_image: Tensor | None  # (B, 3, H, W) uint8
    image_id: Tensor  # (B,) int64
    caption_id: Tensor  # (B,) int64
    key: list[str]
    rejected: list[tuple[str, str]]


# (features of this rank's pairs, the pairs) -> {"loss": (), and parts of it to be logged}
Objective = Callable[[Any, Pairs], dict[str, Tensor]]


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
            "weights": full_weights(self.model),
            "optimizer": full_optimizer_state(self.model, self.optimizer),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "samples_seen": self.samples_seen,
            "random": all_gather_object(random_state(self.accelerator.device)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:  # all ranks
        load_weights(self.model, state["weights"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.samples_seen = state["samples_seen"]
        # Saved on fewer ranks: a new rank keeps the seed it was started with.
        if rank() < len(state["random"]):
            restore_random_state(state["random"][rank()], self.accelerator.device)


class Callback:
    """``fit_start -> (train_step -> step_end) * -> fit_end``; a callback must not change the course of training.

    ``PatchDropping`` is a part of it, as the schedule is.
    """

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
    placement: Placement | None = None,
) -> TrainState:
    """Place model and optimiser where they belong. Neither loader nor schedule are accelerate's business.

    A prepared loader would be dispatched from rank 0, a prepared schedule stepped once a rank.
    """
    accelerator = accelerator or build_accelerator()
    model, optimizer = place(model, optimizer, accelerator, placement or Placement())
    return TrainState(model, optimizer, schedule, accelerator, global_batch_size)


def train_step(
    state: TrainState,
    batch: Pairs,
    objective: Objective,
    *,
    max_grad_norm: float | None = 1.0,
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """One update on the global batch; ``samples_seen`` moves by its size.

    A step whose loss or gradients are not finite changes nothing but the clock: the optimiser finds out on the device.

    Args:
        micro_batch_size: pairs of this rank that go through the towers at once, with the gradient of the whole batch.

    Returns:
        Detached scalars, still on the device: reading them here would wait for it.
    """
    device = state.accelerator.device
    factor = state.schedule(state.samples_seen, state.global_batch_size)
    for group in state.optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
    parts = (batch.image, batch.text, batch.second_image)
    inputs = tuple(part if part is None else part.to(device, non_blocking=True) for part in parts)

    def measure(features: Any) -> dict[str, Tensor]:
        return objective(features, batch)

    if micro_batch_size is None:
        values, features = _backward(state, inputs, measure)
    else:
        values, features = cached_backward(state.model, state.accelerator, inputs, measure, micro_batch_size)
    towers = torch.stack([features.image_features.isfinite().all(), features.text_features.isfinite().all()])
    metrics = {**values, "logit_scale": features.logit_scale.detach(), "finite_features": towers.all()}
    with record_function("quiltnet.clip"):
        metrics["grad_norm"] = _clip(state, max_grad_norm)
    with record_function("quiltnet.optimizer"):
        metrics["finite_step"] = _update(state, metrics["loss"], metrics["grad_norm"])
    state.samples_seen += state.global_batch_size
    return metrics


def _backward(
    state: TrainState, inputs: tuple[Tensor | None, ...], measure: Callable[[Any], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Any]:
    with record_function("quiltnet.forward"):
        features = state.model(*inputs)
    with record_function("quiltnet.loss"):
        values = measure(features)
    with record_function("quiltnet.backward"):
        state.accelerator.backward(values["loss"])
    return {name: value.detach() for name, value in values.items()}, features


def _clip(state: TrainState, max_grad_norm: float | None) -> Tensor:  # all ranks
    """The norm of the gradients over all parameters, before they are scaled down to ``max_grad_norm``."""
    state.accelerator.unscale_gradients(state.optimizer)
    trained = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
    # Under FSDP scalars are whole where all else is sharded, and no operation takes both.
    sharded = [parameter for parameter in trained if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
    norms = [get_total_norm([parameter.grad for parameter in part]) for part in (sharded, whole) if part]
    norm = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    if max_grad_norm is not None:
        clip_grads_with_norm_(sharded, max_grad_norm, norm)
        clip_grads_with_norm_(whole, max_grad_norm, norm)
    return norm


def _update(state: TrainState, loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether the step was taken, on the device."""
    finite = loss.isfinite() & grad_norm.isfinite()
    if state.accelerator.scaler is None:  # which skips overflowing steps itself, and they are in order
        skip_if(state.optimizer.optimizer, ~finite)
    else:
        finite = loss.isfinite()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.unwrapped.clamp_logit_scale()
    return finite


def fit(
    state: TrainState,
    batches: Iterator[Pairs],
    objective: Objective,
    callbacks: Sequence[Callback],
    *,
    total_samples: int,
    max_grad_norm: float | None = 1.0,
    micro_batch_size: int | None = None,
) -> None:
    """Train until ``total_samples`` pairs were seen over all ranks. ``batches`` never end; the clock ends the run."""
    state.model.train()
    for callback in callbacks:
        callback.fit_start(state)
    while state.samples_seen < total_samples:
        asked = time.perf_counter()
        with record_function("quiltnet.data"):
            batch = next(batches)
        waited_s = time.perf_counter() - asked
        metrics = train_step(state, batch, objective, max_grad_norm=max_grad_norm, micro_batch_size=micro_batch_size)
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
