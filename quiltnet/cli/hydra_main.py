"""Where Hydra is started: by ``train.py`` and ``eval.py`` over ``conf/``, by ``quiltnet …`` over the installed copy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from quiltnet.cli.door import at_the_door, leave_if_user_error, refuse_multirun_under_torchrun
from quiltnet.cli.sweep import Trials, is_trial

INSTALLED_CONF = "pkg://quiltnet.conf"


@at_the_door
def train_main(arguments: Sequence[str] | None = None, conf: str = INSTALLED_CONF) -> None:
    """Train with ``arguments``, or with the command line's."""
    refuse_multirun_under_torchrun(sys.argv[1:] if arguments is None else list(arguments))

    def run(cfg: DictConfig) -> float | None:
        from quiltnet.cli.train import run_train

        return run_train(cfg)

    _start(run, "train", conf, arguments)


@at_the_door
def eval_main(arguments: Sequence[str] | None = None, conf: str = INSTALLED_CONF) -> None:
    """Evaluate with ``arguments``, or with the command line's."""

    def run(cfg: DictConfig) -> None:
        from quiltnet.cli.evaluate import run_eval

        run_eval(cfg)

    _start(run, "eval", conf, arguments)


def _start(run: Callable[[DictConfig], Any], name: str, conf: str, arguments: Sequence[str] | None) -> None:
    trials = Trials()

    def task(cfg: DictConfig) -> Any:
        try:
            value = run(cfg)
        except Exception as error:
            if is_trial():
                trials.add(cfg, error)
            else:
                leave_if_user_error(error)  # Hydra would announce an exception with a line of its own
            raise
        if is_trial():
            trials.add(cfg, value)
        return value

    if arguments is not None:
        sys.argv = [f"quiltnet {name}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=conf, config_name=name)(task)()
    finally:
        trials.print()
