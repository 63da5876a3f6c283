"""The ``epochs``, shares and clocks of a config -> samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omegaconf import DictConfig

from quiltnet.errors import UserError

_STEPS_PER_LOG_LINE = 10
_WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Clock:
    """All durations of a run, in pairs over all ranks."""

    total_samples: int
    warmup_samples: int
    log_every_samples: int
    evaluate_every_samples: int | None
    checkpoint_every_samples: int


def plan_clock(cfg: DictConfig, samples_per_epoch: int) -> Clock:
    """Epochs and shares become samples; the total is rounded up to whole batches."""
    if (cfg.epochs is None) == (cfg.total_samples is None):
        raise UserError("say how long to train, by one of epochs=10 and total_samples=1000000")
    wanted = cfg.total_samples if cfg.total_samples is not None else cfg.epochs * samples_per_epoch
    if not wanted > 0:
        raise UserError(f"the run would see {wanted} samples; give a positive number of epochs or total_samples")
    total_samples = whole_batches(wanted, cfg.global_batch_size)
    warmup_samples = cfg.schedule.get("warmup_samples")
    callbacks = cfg.callbacks
    return Clock(
        total_samples=total_samples,
        warmup_samples=round(_WARMUP_SHARE * total_samples) if warmup_samples is None else warmup_samples,
        log_every_samples=callbacks.log_every_samples or _STEPS_PER_LOG_LINE * cfg.global_batch_size,
        evaluate_every_samples=callbacks.evaluate_every_samples,
        checkpoint_every_samples=callbacks.checkpoint_every_samples or samples_per_epoch,
    )


def whole_batches(samples: float, global_batch_size: int) -> int:
    """``samples``, rounded up."""
    return math.ceil(samples / global_batch_size) * global_batch_size
