"""Where Hydra is started: by ``train.py`` and ``eval.py`` over ``conf/``, by ``quiltnet …`` over the installed copy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from quiltnet.cli.door import at_the_door, leave_if_user_error, refuse_multirun_under_torchrun

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
    def task(cfg: DictConfig) -> Any:
        try:
            return run(cfg)
        except Exception as error:
            # Hydra announces an exception with a line of its own; one trial's mistake must not end a sweep.
            if HydraConfig.get().mode == RunMode.RUN:
                leave_if_user_error(error)
            raise

    if arguments is not None:
        sys.argv = [f"quiltnet {name}", *arguments]
    hydra.main(version_base="1.3", config_path=conf, config_name=name)(task)()
