"""Ends a run whose numbers are no longer finite, and says where it began."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quiltnet.distributed import all_gather_object
from quiltnet.errors import UserError
from quiltnet.training.engine import Callback, Pairs, TrainState

_KEYS_SHOWN = 3


class FiniteCheck(Callback):
    """Looks at the flags of the steps since the last look; the steps themselves left the weights as they were.

    Args:
        every_samples: clocks at which to look; reading the flags waits for the device, so the clock of the log.
            The checkpoint's must be among them, or an update that was not made would be saved as made.
    """

    def __init__(self, every_samples: Sequence[int]) -> None:
        self.every_samples = every_samples
        self._steps: list[tuple[int, list[str], Tensor]] = []  # samples before the step, keys, (2,) flags

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        flags = torch.stack([metrics["finite_features"], metrics["finite_step"]])
        self._steps.append((state.samples_seen - state.global_batch_size, batch.key, flags))
        if any(state.passed(every) for every in self.every_samples):
            self._look(state)

    def fit_end(self, state: TrainState) -> None:
        self._look(state)

    def _look(self, state: TrainState) -> None:  # all ranks
        steps, self._steps = self._steps, []
        if not steps:
            return
        flags = torch.stack([flags for *_, flags in steps]).tolist()  # waits for the device
        # Every rank's loss is of all ranks' features: the step failed on all, the features perhaps on one.
        first = next((number for number, (_, step) in enumerate(flags) if not step), None)
        features, keys = (True, []) if first is None else (flags[first][0], steps[first][1])
        found = all_gather_object((first, features, keys))
        if first is None:
            return
        ranks = [str(rank) for rank, (_, features, _) in enumerate(found) if not features]
        place = f"step {steps[first][0] // state.global_batch_size + 1} ({steps[first][0]:,} samples seen)"
        if not ranks:
            raise UserError(
                f"{place}: the features are finite, the loss or its gradient is not; the weights are those from "
                "before. Lower optim.lr, or compute in another precision (fp16 overflows where bf16 does not)"
            )
        keys = next(keys for _, features, keys in found if not features)
        raise UserError(
            f"{place}: features of rank {', '.join(ranks)} are not finite; the weights are those from before. Its "
            f"pairs begin with {', '.join(keys[:_KEYS_SHOWN])}. Look at them, lower optim.lr, or use another precision"
        )
