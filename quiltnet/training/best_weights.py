"""The best checkpoint for the final evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from quiltnet.distributed import on_main
from quiltnet.training.callbacks import Evaluate
from quiltnet.training.checkpoint import best_checkpoint, load_checkpoint
from quiltnet.training.engine import Callback, TrainState
from quiltnet.training.full_state import load_weights


class RestoreBest(Callback):
    """When training has ended, loads the weights of the best checkpoint into the model, and has them evaluated.

    Stands last among the callbacks: the run's last checkpoint is written by then.

    Args:
        evaluate: keeps the numbers, as ``best``.
        root: folder of the run's checkpoints.
    """

    stage: ClassVar[str] = "evaluation"

    def __init__(self, evaluate: Evaluate, root: Path) -> None:
        self.evaluate = evaluate
        self.root = root

    def fit_end(self, state: TrainState) -> None:  # all ranks
        best = on_main(lambda: best_checkpoint(self.root))
        if best is None:
            return
        loaded = load_checkpoint(best)
        found = self.evaluate.best
        # A complete run that is started again has the numbers already, unless its evaluators are others.
        if found.get("samples_seen") == loaded["samples_seen"] and found["scores"].keys() == self.evaluate.last.keys():
            return
        load_weights(state.model, loaded["weights"])
        if state.average is not None and "average" in loaded:
            load_weights(state.average.module, loaded["average"])
        self.evaluate.measure_best(state, loaded["samples_seen"])
