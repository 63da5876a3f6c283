"""The command line of a search: from Hydra options to a plan; all that can be wrong is found before a trial starts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from quiltnet.cli.clock import whole_batches
from quiltnet.cli.hydra_main import CONF_MODULE
from quiltnet.cli.search_plan import DIRECTIONS, PRUNERS, SAMPLERS, SearchPlan
from quiltnet.cli.search_space import Parameter, as_text, parse_space
from quiltnet.cli.sweep import check_monitor, monitored
from quiltnet.errors import UserError

# Options of the search itself, which a trial does not know.
SEARCH_KEYS = {
    "search", "n_trials", "parallel", "nproc_per_trial", "sampler", "sampler_seed", "pruner", "direction", "storage"
}  # fmt: skip
# What the search decides for its trials.
_PLACE = {"sweep", "run_name", "output_dir"}
_NOTHING_TO_SEARCH = (
    "quiltnet sweep needs to know what to search: say sweep=optuna, or another file of conf/sweep that has `search:`; "
    "a grid such as sweep=lr is for `python train.py -m`"
)
# A URL; but SQLite in memory, which no other driver sees and the next start does not find.
_STORAGE = re.compile(r"[\w+]+://(?!/?$|/:memory:$).+")


def plan_search(arguments: Sequence[str]) -> SearchPlan:
    """What ``quiltnet sweep`` was told, as a plan.

    Raises:
        UserError: an option that does not exist or is not what it must be, of the search or of its trials.
    """
    _refuse_flags(arguments)
    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        if not any(_key(option) == "sweep" for option in arguments):
            raise UserError(_NOTHING_TO_SEARCH)
        cfg = _compose(arguments)
        if not OmegaConf.is_dict(cfg.get("search")):
            raise UserError(_NOTHING_TO_SEARCH)
        _check_own_options(cfg)
        shared = [option for option in arguments if _key(option) not in SEARCH_KEYS | _PLACE]
        trial = _compose([*shared, f"run_name={as_text(str(cfg.run_name))}"])
        _check_that_all_is_shared(cfg, trial)
        space = parse_space(OmegaConf.to_container(cfg.search, resolve=True))
        _check_space(space, shared, trial)
    monitor = _checked_monitor(trial)
    return SearchPlan(
        name=str(cfg.run_name),
        folder=Path(cfg.output_dir) / str(cfg.run_name),
        space=space,
        monitor=monitor,
        direction=cfg.direction or _direction_of(monitor),
        options=tuple(shared),
        n_trials=cfg.n_trials,
        parallel=cfg.parallel,
        nproc_per_trial=cfg.nproc_per_trial,
        sampler=cfg.sampler,
        sampler_seed=cfg.sampler_seed,
        pruner=cfg.pruner,
        first_samples=trial.callbacks.evaluate_every_samples,
        total_samples=_total_samples(trial),
        storage=cfg.storage,
        log_to_wandb="wandb" in trial.logger and trial.logger.wandb.get("name") is None,
    )


def share_gpus(plan: SearchPlan) -> list[str]:
    """The GPUs that trials share out, as CUDA_VISIBLE_DEVICES names them; none on a machine without.

    Raises:
        UserError: there are fewer than the trials need at once.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = named.split(",")[:count] if named else [str(index) for index in range(count)]
    needed = plan.parallel * plan.nproc_per_trial
    if gpus and needed > len(gpus):
        raise UserError(
            f"parallel={plan.parallel} trials of nproc_per_trial={plan.nproc_per_trial} need {needed} GPUs; there are "
            f"{len(gpus)}: take fewer of either"
        )
    return gpus


def _refuse_flags(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(
                f"quiltnet sweep takes options of the form name=value, not {argument}; a folder of your own configs is "
                "said by hydra.searchpath=[file:///path/to/conf]"
            )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "a sweep starts torchrun for each trial itself: run `quiltnet sweep … nproc_per_trial=8` without torchrun"
        )


def _compose(options: Sequence[str]) -> DictConfig:
    try:
        return compose("train", list(options))
    except ConfigCompositionException as error:
        text = str(error)
        if "--multirun" in text:
            raise UserError(
                f"{text.splitlines()[0]}: several values of an option are searched by "
                "+search.<option>={choices: [a, b]}, in quotes"
            ) from error
        raise


def _key(option: str) -> str:
    """The first word of an option's name: ``search`` of ``+search.optim.lr.low=1``."""
    return re.split(r"[.=@/]", option.lstrip("+~"), maxsplit=1)[0]


def _check_own_options(cfg: DictConfig) -> None:
    from quiltnet.cli.options import COUNT, NAME, SEED, SWITCH, check_run_name  # torch comes with it

    check_run_name(cfg, "rates", "trials go to outputs/rates/trial-000, …")
    for name, (allows, words) in {
        "n_trials": COUNT, "parallel": COUNT, "nproc_per_trial": COUNT, "sampler_seed": SEED, "overwrite": SWITCH,
        "output_dir": NAME,
    }.items():  # fmt: skip
        if not allows(cfg[name]):
            raise UserError(f"{name}={cfg[name]} must be {words}")
    for name, choices in {"sampler": SAMPLERS, "pruner": PRUNERS, "direction": (*DIRECTIONS, None)}.items():
        if cfg[name] not in choices:
            raise UserError(f"{name}={cfg[name]} must be one of {', '.join(filter(None, choices))}")
    if cfg.storage is not None and not _STORAGE.fullmatch(str(cfg.storage)):
        raise UserError(f"storage={cfg.storage} must be a URL: sqlite:///path/to/file or postgresql://…; or null")
    if cfg.resume is not None or cfg.overwrite:
        raise UserError(
            "a sweep decides itself what its trials resume: the same command goes on with an interrupted one; another "
            "run_name, or removing its folder, begins anew"
        )


def _check_that_all_is_shared(cfg: DictConfig, trial: DictConfig) -> None:
    """A trial is started without the sweep's file, so that its command line is an ordinary one."""
    with_file, without = (OmegaConf.to_container(node, resolve=False) for node in (cfg, trial))
    for name in with_file.keys() - SEARCH_KEYS - _PLACE:
        if with_file[name] != without.get(name):
            raise UserError(
                f"the sweep's file sets {name}, which is none of its own options ({', '.join(sorted(SEARCH_KEYS))}); "
                "what all trials share belongs on the command line or into an experiment"
            )


def _check_space(space: dict[str, Parameter], shared: Sequence[str], trial: DictConfig) -> None:
    """Every value that bounds the others is composed into a trial, and looked at as a trial would."""
    from quiltnet.cli.options import check_options

    check_options(trial)
    given = {option.lstrip("+").partition("=")[0] for option in shared}
    for name, parameter in space.items():
        if name in given:
            raise UserError(f"{name} is both given and searched; leave it out, or say ~search.{name}")
        _check_key(name, trial)
        for value in parameter.examples():
            text = value if isinstance(value, str) else as_text(value)
            check_options(_compose([*shared, f"{name}={text}", "run_name=trial"]))


def _check_key(name: str, trial: DictConfig) -> None:
    from quiltnet.cli.options import option_names

    groups = compose("train", [], return_hydra_config=True).hydra.runtime.choices
    known = {group for group in groups if not group.startswith("hydra/")}
    known.update(option_names(OmegaConf.to_container(trial)))
    if name not in known or name in _PLACE:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0)
        raise UserError(f"search.{name}: a run has no option {name}; the nearest are {', '.join(near)}")


def _checked_monitor(trial: DictConfig) -> str:
    monitor = monitored(trial)
    if monitor is None:
        known = ", ".join(trial.evaluator) or "none"
        raise UserError(
            f"a sweep needs a number to go by: evaluator=[val_pairs], or monitor=evaluator/metric of the run's "
            f"evaluators ({known})"
        )
    check_monitor(monitor, trial, names_metric=True)
    return monitor


def _direction_of(monitor: str) -> str:
    from quiltnet.evaluation.comparison import lower_is_better

    return DIRECTIONS[0] if lower_is_better(monitor) else DIRECTIONS[1]


def _total_samples(trial: DictConfig) -> int | None:
    total: Any = trial.total_samples
    return None if total is None else whole_batches(total, trial.global_batch_size)
