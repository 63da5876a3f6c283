"""``python -m tests.stopped_rank PLACE option...``: train, and let rank 1 stand still once it comes to a place."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from quiltnet.cli.hydra_main import train_main
from quiltnet.training import engine
from tests.conftest import ROOT

PLACES = {"step": (engine, "clip_gradients"), "save": (engine.TrainState, "state_dict")}


def stand_still_at(place: str) -> None:
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), []

    def standing(*args: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args, **named)

    setattr(owner, name, standing)


if __name__ == "__main__":
    stand_still_at(sys.argv[1])
    train_main(sys.argv[2:], conf=str(ROOT / "conf"))
