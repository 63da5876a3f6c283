"""When towers begin to train: gradual unfreezing, at counts of pairs seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.training.engine import Callback, Pairs, TrainState
from quiltnet.training.placement import Placement, unwrap, wrap_again


class Thawing(Callback):
    """Lets a tower train once so many pairs were seen, new projections first (KEP: Zhou et al. 2024, arXiv 2404.09942).

    A part of training, as ``PatchDropping`` is; like the schedule it is a function of the clock alone, so a resumed run
    goes on as if it had not stopped. The optimiser holds all parameters from the start, and leaves alone those that
    have no gradient; moments and their bias correction begin with the first one.

    Args:
        freeze_waiting: takes the pairs seen over all ranks, lets train what does by then and says whether that is
            something else than before.
        placement: of the run; DDP has to be made anew.
    """

    def __init__(self, freeze_waiting: Callable[[int], bool], placement: Placement) -> None:
        self.freeze_waiting = freeze_waiting
        self.placement = placement

    def fit_start(self, state: TrainState) -> None:  # all ranks
        self._set(state)

    def step_end(self, state: TrainState, batch: Pairs, metrics: dict[str, Tensor]) -> None:  # all ranks
        self._set(state)

    def _set(self, state: TrainState) -> None:
        if not self.freeze_waiting(state.samples_seen):
            return
        state.model = unwrap(state.model, state.accelerator)
        state.model = wrap_again(state.model, state.accelerator, self.placement).train()


def check_thawing(thaw_samples: Mapping[str, int], placement: Placement, total_samples: int) -> None:
    """Refuse what would never thaw, or could not.

    Args:
        thaw_samples: of each tower, 0 where it trains from the start.

    Raises:
        UserError: a tower that thaws when the run is over, or under FSDP.
    """
    for tower, samples in thaw_samples.items():
        if samples and placement.sharding == "fsdp":
            raise UserError(f"tuning.{tower}_thaw_samples={samples} does not go with placement=fsdp; use placement=ddp")
        if samples >= total_samples:
            raise UserError(
                f"tuning.{tower}_thaw_samples={samples} is not before the end of the run, at {total_samples} samples; "
                f"freeze the tower (tuning.{tower}=frozen or projection_only), or thaw it earlier"
            )
