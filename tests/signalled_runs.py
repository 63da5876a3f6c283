"""Runs that are sent a signal in the middle of something, and started again; tests/test_faults.py starts this.

``python -m tests.signalled_runs SHARDS FOLDER`` writes ``FOLDER/codes.json``: place -> exit codes of the two starts.
Each start is a process of its own, forked from here, where everything is imported already.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from quiltnet.cli import train as train_module
from quiltnet.cli.hydra_main import train_main
from quiltnet.evaluation.features import SetEncoder
from quiltnet.training import engine, saving
from tests.conftest import ROOT

TOTAL = 96
PLACES = ("step", "evaluation", "save", "interrupt")


def main(shards: str, folder: str) -> None:
    codes = {"unbroken": [run(shards, folder, "unbroken")]}
    for place in PLACES:
        codes[place] = [run(shards, folder, place, place), run(shards, folder, place)]
    Path(folder, "codes.json").write_text(json.dumps(codes))


def run(shards: str, folder: str, name: str, place: str | None = None) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code: Any = 0
    try:
        if place is not None:
            send_in(place)
        train_main(options(shards, folder, name), conf=str(ROOT / "conf"))
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def options(shards: str, folder: str, name: str) -> list[str]:
    return [
        "model=tiny",
        "+model.image.patch_dropout=0.5",
        "evaluator=[val_pairs]",
        "evaluator.val_pairs.batch_size=2",
        f"data.train.shards={shards}/train",
        f"data.val.shards={shards}/val",
        "data.train.workers=1",
        f"run_name={name}",
        f"output_dir={folder}/outputs",
        "global_batch_size=8",
        f"total_samples={TOTAL}",
        "callbacks.checkpoint_every_samples=16",
        "callbacks.evaluate_every_samples=32",
        "callbacks.log_every_samples=8",
        "callbacks.keep_checkpoints=9",
        "resume=auto",
    ]


def send_in(place: str) -> None:
    """Send this process, and all that it has started, a signal the first time that it comes to a place beyond 32."""
    module, name = {
        "step": (engine, "clip_gradients"),
        "interrupt": (engine, "clip_gradients"),
        "evaluation": (SetEncoder, "texts"),
        "save": (saving, "save_checkpoint"),
    }[place]
    original, calls = getattr(module, name), []
    nth = {"step": 5, "interrupt": 5, "evaluation": 2, "save": 2}[place]

    def sending(*args: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == nth:
            os.killpg(0, signal.SIGINT if place == "interrupt" else signal.SIGTERM)
        return original(*args, **named)

    setattr(module, name, sending)
    os.setpgid(0, 0)


if __name__ == "__main__":
    assert train_module  # imported here, and so in each child
    main(*sys.argv[1:])
