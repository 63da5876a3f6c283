"""The evaluators of a config, and what they may be used for."""

from __future__ import annotations

from collections.abc import Mapping

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from quiltnet.cli.targets import check_targets
from quiltnet.errors import UserError
from quiltnet.evaluation.measuring import Evaluator
from quiltnet.training.averaging import evaluator_of


def make_evaluators(cfg: DictConfig, first: str | None = None) -> dict[str, Evaluator]:
    """All of ``cfg.evaluator``, by name.

    Args:
        first: the one that runs before the others, so that no time budget leaves it out.

    Raises:
        UserError: a name that may not be called; or some cannot be made, and all that is wrong is said at once, since
            a set takes a day to download.
    """
    check_targets(cfg.evaluator, cfg.get("allow_targets"))
    evaluators, faults = {}, []
    for name in sorted(cfg.evaluator, key=lambda name: name != first):
        try:
            evaluators[name] = instantiate(cfg.evaluator[name], _convert_="all")
        except (UserError, InstantiationException) as error:
            fault = error if isinstance(error, UserError) else error.__cause__  # Hydra wraps what a constructor raises
            if not isinstance(fault, UserError):
                raise
            faults.append(f"{name}: {fault}")
    if faults:
        several = len(faults) > 1
        lines = (
            [f"{len(faults)} evaluators cannot be made:", *(f"- {fault}" for fault in faults)] if several else faults
        )
        root = cfg.get("data_root")
        if root is not None and any(f"{root}/" in fault for fault in faults):
            lines.append(
                f"Sets are looked for below data_root={root}; data_root=… or QUILTNET_DATA names another place"
            )
        raise UserError("\n".join(lines))
    return evaluators


def check_monitored_split(monitor: str | None, evaluators: Mapping[str, Evaluator]) -> None:
    """Whatever is chosen by a number of a test set makes that number worthless.

    Raises:
        UserError: ``monitor`` is measured on a test split.
    """
    if monitor is None:
        return
    name = evaluator_of(monitor)
    if evaluators[name].split == "test":
        raise UserError(
            f"monitor={monitor} would choose by a test set, as {name} is scored on one (so are images that nobody "
            f"declared to be another); monitor a validation split, or say split: val in the set of {name}, if it is one"
        )
