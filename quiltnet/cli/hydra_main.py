"""Where Hydra is started: by ``train.py`` and ``eval.py`` over ``conf/``, by ``quiltnet …`` over the installed copy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from quiltnet.cli.door import at_the_door, leave_if_user_error, message_for_user, refuse_multirun_under_torchrun
from quiltnet.cli.sweep import Trials, become_ranks, is_trial
from quiltnet.cli.targets import checked_composition
from quiltnet.errors import UserError

CONF_MODULE = "quiltnet.conf"
INSTALLED_CONF = f"pkg://{CONF_MODULE}"


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
        if is_trial():
            return run_trial(cfg)
        try:
            return run(cfg)
        except Exception as error:
            leave_if_user_error(error)  # Hydra would announce an exception with a line of its own
            raise

    def run_trial(cfg: DictConfig) -> Any:
        become_ranks()
        try:
            value = run(cfg)
        except Exception as error:
            trials.add(cfg, error)
            message = message_for_user(error)
            if message is not None:  # what a launcher carries to another process has lost its cause
                raise UserError(message) from error
            raise
        if os.environ.get("RANK", "0") == "0":
            trials.add(cfg, value)
        return value

    if arguments is not None:
        sys.argv = [f"quiltnet {name}", *arguments]
    try:
        with checked_composition():
            hydra.main(version_base="1.3", config_path=conf, config_name=name)(task)()
    finally:
        trials.print()
