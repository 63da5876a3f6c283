"""When patch dropout ends: the last part of a run sees all patches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quiltnet.training.engine import Callback, Pairs, TrainState


class PatchDropping(Callback):
    """Leaves out patches until ``until_samples``, then none: FLIP's unmasked tuning (Li et al. 2023, arXiv 2212.00794).

    The one callback that is part of training, as the schedule is; like that, it is a function of the clock alone, so a
    resumed run goes on as if it had not stopped.

    Args:
        set_share: sets the share of patches that the image tower leaves out.
        share: until ``until_samples``.
        until_samples: on the clock of pairs over all ranks; the step that begins there is the first to see all.
    """

    def __init__(self, set_share: Callable[[float], None], share: float, until_samples: int) -> None:
        self.set_share = set_share
        self.share = share
        self.until_samples = until_samples

    def fit_start(self, state: TrainState) -> None:
        self._set(state)

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:
        self._set(state)

    def _set(self, state: TrainState) -> None:
        self.set_share(self.share if state.samples_seen < self.until_samples else 0.0)
