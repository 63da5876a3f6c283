"""Evaluators on a model: the one place where they are run, in training and outside."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from quiltnet.distributed import broadcast_object
from quiltnet.evaluation.feature_cache import FeatureCache
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.outcome import Outcome

log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """It knows its data, is handed a model's encoder, and says what it found.

    Attributes:
        split: ``train``, ``val`` or ``test``: what it is scored on. Nothing is chosen by a number of a test set.
    """

    @property
    def split(self) -> str: ...

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        ...

    def describe(self) -> dict[str, Any]:
        """The data and every choice that moves the numbers, known before a model is; JSON types only."""
        ...


def measure(
    model: nn.Module,
    evaluators: Mapping[str, Evaluator],
    *,
    cache: FeatureCache | None = None,
    dtype: torch.dtype = torch.float32,
    time_budget_s: float | None = None,
    between: Callable[[], None] | None = None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Outcome]:  # all ranks
    """The outcome of every evaluator, rank 0's on every rank; what several of them look at is encoded once.

    Args:
        dtype: bfloat16 to compute the towers in that; features are normalised in float32 in any case.
        time_budget_s: an evaluator that would start later than this is left out, with a warning. One that has started
            ends, however long it takes.
        between: called between batches, by all ranks as often; what it raises ends the evaluation.
        waiting: entered while a loader is waited for, which is at this rank's own pace.
    """
    outcomes: dict[str, Outcome] = {}
    start = time.monotonic()
    with evaluation_mode(model), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        encoder = SetEncoder(model, cache, dtype, between, waiting)
        for name, evaluator in evaluators.items():
            elapsed_s = broadcast_object(time.monotonic() - start)  # rank 0's clock decides for all
            if time_budget_s is not None and elapsed_s > time_budget_s:
                log.warning("%s was left out: evaluation has its %.0f s already", name, time_budget_s)
                continue
            encoder.between()
            outcomes[name] = evaluator.run(encoder)
    return broadcast_object(outcomes)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; outside, mode and random generators are as if nothing had happened."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
