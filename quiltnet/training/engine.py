"""The training loop: what moves, one step, the run."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from quiltnet.distributed import all_gather_object, barrier, rank
from quiltnet.training.averaging import Averaging, WeightAverage, check_averaging
from quiltnet.training.full_state import full_optimizer_state, full_weights, load_optimizer_state, load_weights
from quiltnet.training.gradcache import cached_backward
from quiltnet.training.gradients import check_gradients, clip_gradients
from quiltnet.training.optim import skip_if
from quiltnet.training.placement import Placement, place
from quiltnet.training.precision import build_accelerator
from quiltnet.training.random_state import random_state, restore_random_state
from quiltnet.training.stage import stage
from quiltnet.training.stopping import RunStopped, Stopping

log = logging.getLogger(__name__)

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

    Attributes:
        average: the moving average of the weights, where the run keeps one.
        is_complete: a callback has found that there is nothing left to train.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    accelerator: Accelerator
    global_batch_size: int
    samples_seen: int = 0
    average: WeightAverage | None = None
    is_complete: bool = False

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
        average = {} if self.average is None else {"average": full_weights(self.average.module)}
        return {
            "weights": full_weights(self.model),
            **average,
            "optimizer": full_optimizer_state(self.model, self.optimizer),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "samples_seen": self.samples_seen,
            "random": all_gather_object(random_state(self.accelerator.device)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:  # all ranks
        load_weights(self.model, state["weights"])
        self._load_average(state.get("average"))
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.samples_seen = state["samples_seen"]
        # Saved on fewer ranks: a new rank keeps the seed it was started with.
        if rank() < len(state["random"]):
            restore_random_state(state["random"][rank()], self.accelerator.device)

    def _load_average(self, weights: dict[str, Tensor] | None) -> None:
        if self.average is None:
            if weights is not None:
                log.warning("the checkpoint's averaged weights are left behind: this run keeps no average")
        elif weights is None:
            log.warning("the checkpoint has no averaged weights: the average begins with its weights")
            self.average.restart(self.unwrapped)
        else:
            load_weights(self.average.module, weights)


class Callback:
    """``fit_start -> (train_step -> step_end) * -> fit_end``; a callback must not change the course of training.

    ``PatchDropping`` is a part of it, as the schedule is. A run that is asked to stop ends after a step with
    ``run_stopped`` in place of ``fit_end``: what is not on the disk by then is lost. ``close`` is called at last,
    however the run ended, by errors too and perhaps on this rank alone: it neither communicates nor raises.

    Attributes:
        stage: what the process is at in here, as ``quiltnet.training.stage`` has it.
    """

    stage: ClassVar[str] = "callbacks"

    def fit_start(self, state: TrainState) -> None: ...

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None: ...

    def fit_end(self, state: TrainState) -> None: ...

    def run_stopped(self, state: TrainState) -> None: ...

    def close(self) -> None: ...


def start_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    global_batch_size: int,
    accelerator: Accelerator | None = None,
    placement: Placement | None = None,
    averaging: Averaging | None = None,
) -> TrainState:
    """Place model and optimiser where they belong. Neither loader nor schedule are accelerate's business.

    A prepared loader would be dispatched from rank 0, a prepared schedule stepped once a rank.

    Args:
        averaging: keep a moving average of the weights.
    """
    accelerator, placement = accelerator or build_accelerator(), placement or Placement()
    average = None
    if averaging is not None:
        check_averaging(averaging, placement.sharding)
        average = WeightAverage(model, averaging)
    model, optimizer = place(model, optimizer, accelerator, placement)
    state = TrainState(model, optimizer, schedule, accelerator, global_batch_size, average=average)
    if average is not None:
        average.restart(state.unwrapped)  # with what all ranks have begun with
    return state


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
    check_gradients(state.unwrapped)
    with stage("clip"):
        metrics["grad_norm"] = clip_gradients(state.model, state.optimizer, state.accelerator, max_grad_norm)
    with stage("optimizer"):
        metrics["finite_step"] = _update(state, metrics["loss"], metrics["grad_norm"])
    state.samples_seen += state.global_batch_size
    return metrics


def _backward(
    state: TrainState, inputs: tuple[Tensor | None, ...], measure: Callable[[Any], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Any]:
    with stage("forward"):
        features = state.model(*inputs)
    with stage("loss"):
        values = measure(features)
    with stage("backward"):
        state.accelerator.backward(values["loss"])
    return {name: value.detach() for name, value in values.items()}, features


def _update(state: TrainState, loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether the step was finite, on the device."""
    taken = loss.isfinite() & grad_norm.isfinite()
    if state.accelerator.scaler is None:
        skip_if(state.optimizer.optimizer, ~taken)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.unwrapped.clamp_logit_scale()
    if state.average is not None:
        state.average.update(state.unwrapped, state.step + 1, taken)
    # The scaler skips steps whose gradients overflow by itself, and they are in order.
    return taken if state.accelerator.scaler is None else loss.isfinite()


def fit(
    state: TrainState,
    batches: Iterator[Pairs],
    objective: Objective,
    callbacks: Sequence[Callback],
    *,
    total_samples: int,
    max_grad_norm: float | None = 1.0,
    micro_batch_size: int | None = None,
    stopping: Stopping | None = None,
) -> None:
    """Train until ``total_samples`` pairs were seen over all ranks. ``batches`` never end; the clock ends the run.

    Args:
        stopping: looked at before each step; None: nobody can ask the run to stop.

    Raises:
        RunStopped: the run was asked to stop, and has saved what it has.
    """
    state.model.train()
    try:
        _call(callbacks, "fit_start", state)
        while state.samples_seen < total_samples and not state.is_complete:
            with stage("stopping"):
                if stopping is not None and stopping.agreed():
                    _leave(state, callbacks, stopping)
            asked = time.perf_counter()
            with stage("data"):
                batch = next(batches)
            waited_s = time.perf_counter() - asked
            metrics = train_step(
                state, batch, objective, max_grad_norm=max_grad_norm, micro_batch_size=micro_batch_size
            )
            metrics["data_wait_s"] = torch.tensor(waited_s)
            metrics["step_s"] = torch.tensor(time.perf_counter() - asked)
            _call(callbacks, "step_end", state, batch, metrics)
        _call(callbacks, "fit_end", state)
        if stopping is not None and stopping.owes_evaluation:
            _leave(state, callbacks, stopping)
    finally:
        _call(callbacks, "close")


def _call(callbacks: Sequence[Callback], hook: str, *arguments: Any) -> None:
    for callback in callbacks:
        with stage(callback.stage):
            getattr(callback, hook)(*arguments)


def _leave(state: TrainState, callbacks: Sequence[Callback], stopping: Stopping) -> NoReturn:  # all ranks
    _call(callbacks, "run_stopped", state)
    barrier()  # torchrun ends all ranks as soon as one has ended, and rank 0 may still be writing
    raise RunStopped(stopping.exit_code)


def seed_everything(seed: int) -> None:
    """Seed this process; ranks add their number once the model is built, so that their dropout differs."""
    random.seed(seed)
    torch.manual_seed(seed)
