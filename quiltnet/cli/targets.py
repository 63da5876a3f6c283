"""What a config may have called: classes by name, from a list, since a recipe can come from anybody.

Hydra imports and calls whatever a ``_target_`` names, ``torch.load`` and ``functools.partial`` too, and reaches
any module's imports through any other's name (``quiltnet.training.checkpoint.torch.load``). So names are listed here
one by one, and a class of one's own is allowed on the command line, which no file can write.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quiltnet.errors import UserError

_OURS = {
    "cli.sweep": ("SweepStart",),
    "data.held_out": ("ShardPairs",),
    "data.stain": ("hed_jitter",),
    "data.synthetic": ("draw_pairs", "labelled_tiles"),
    "evaluation.corruptions": ("GaussianBlur", "JPEGCompression", "Rotation", "StainJitter"),
    "evaluation.datasets": ("csv_labels", "folder_per_class", "in_memory"),
    "evaluation.few_shot": ("FewShot",),
    "evaluation.group_split": ("part_by_group", "split_by_group", "with_groups"),
    "evaluation.image_retrieval": ("ImageRetrieval",),
    "evaluation.knn": ("KNN",),
    "evaluation.label_archives": ("huggingface_labels", "npz_labels", "webdataset_labels"),
    "evaluation.linear_probe": ("LinearProbe",),
    "evaluation.pair_tables": ("arch_pairs", "table_pairs"),
    "evaluation.pathology_sets": ("bach", "crc_val_7k", "databiox", "lc25000", "nct_crc_100k", "pcam", "renal_cell"),
    "evaluation.pathology_tables": ("mhist", "osteosarcoma", "sicapv2", "skin_cancer", "skin_tumor"),
    "evaluation.prompts": ("PromptSet",),
    "evaluation.retrieval": ("Retrieval",),
    "evaluation.robustness": ("Robustness",),
    "evaluation.slide_pooling": ("SlidePooling",),
    "evaluation.truncation": ("TruncationCurve",),
    "evaluation.val_pairs": ("ValPairs",),
    "evaluation.zeroshot": ("ZeroShotClassification",),
    "model.adapters": ("Tuning",),
    "model.assembly": ("build_model",),
    "release.hub": ("load_model",),
    "training.loggers": ("TensorBoardLogger", "WandbLogger"),
    "training.losses": ("InfoNCE",),
    "training.optim": ("build_optimizer",),
    "training.placement": ("Placement",),
    "training.schedules": ("WarmupConstant", "WarmupCosine", "WarmupLinear", "WarmupStableDecay"),
    "training.siglip": ("SigLIP",),
}
_HYDRAS = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
}
TARGETS = frozenset(f"quiltnet.{module}.{name}" for module, names in _OURS.items() for name in names) | _HYDRAS

# Python's logging.config calls what these keys name.
_LOGGING_KEYS = ("()", "class", "factory")
_LOGGING_CLASSES = {
    "colorlog.ColoredFormatter", "logging.FileHandler", "logging.Formatter", "logging.NullHandler",
    "logging.StreamHandler", "logging.handlers.RotatingFileHandler"
}  # fmt: skip
_LOGGING_STREAMS = {"ext://sys.stdout", "ext://sys.stderr"}

# What lets code run: no file can say it for the user.
_ON_COMMAND_LINE_ONLY = ("allow_targets", "data.allow_pipe", "hydra.job.env_set")


def check_targets(cfg: Any, allowed: Sequence[str] | None = ()) -> None:
    """Before anything is instantiated: that every ``_target_`` below ``cfg``, at any depth, is a listed one.

    Args:
        cfg: a config, or a part of one.
        allowed: further names: of a class or function, or of the module that it is in.

    Raises:
        UserError: one is not, or cannot be told.
    """
    for place, name in _named(cfg, "", ("_target_",)):
        if name in TARGETS or {name, name.rpartition(".")[0]} & set(allowed or ()):
            continue
        near = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.8)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{place}={name} is not among what a config may have called{hint}. A config can come from anybody, and "
            f"what it names is run: where you have read {name} and trust it, say allow_targets=[{name}] on the command "
            "line, or the module that it is in"
        )


def check_composed(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """As ``check_targets``, of a whole config with Hydra's own part, which Hydra instantiates before a run begins.

    Args:
        overrides: what the command line says.

    Raises:
        UserError: also for what only the command line may say, and for loggers that are calls of something else.
    """
    said = {override.lstrip("+").partition("=")[0] for override in overrides}
    for name in _ON_COMMAND_LINE_ONLY:
        value = OmegaConf.select(cfg, name, default=None)
        if value and not any(key == name or key.startswith(f"{name}.") for key in said):
            raise UserError(
                f"a config file says {name}={value}, which lets commands or code of others run; where you trust it, "
                f"say it yourself on the command line: {name}=…"
            )
    check_targets(cfg, OmegaConf.select(cfg, "allow_targets", default=None))
    for part in ("hydra.job_logging", "hydra.hydra_logging"):
        _check_logging(OmegaConf.select(cfg, part, default=None), part)


@contextmanager
def checked_composition() -> Iterator[None]:
    """Within, every config that Hydra composes is looked at before Hydra makes its own callbacks, launcher or loggers.

    Hydra has no hook between the two. This is the one method that all its ways of composing go through.
    """
    compose = ConfigLoaderImpl.load_configuration

    @functools.wraps(compose)
    def load_configuration(self: Any, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> Any:
        cfg = compose(self, config_name, overrides, *args, **kwargs)
        check_composed(cfg, overrides)
        return cfg

    ConfigLoaderImpl.load_configuration = load_configuration
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = compose


def _check_logging(node: Any, part: str) -> None:
    for place, name in _named(node, part, _LOGGING_KEYS):
        if name not in _LOGGING_CLASSES:
            raise UserError(f"{place}={name}: loggers are {', '.join(sorted(_LOGGING_CLASSES))}; leave {part} as it is")
    for place, value in _texts(node, part):
        if value.startswith("ext://") and value not in _LOGGING_STREAMS:
            raise UserError(f"{place}={value} must be one of {', '.join(sorted(_LOGGING_STREAMS))}")


def _named(cfg: Any, place: str, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(place, value) of all that stands under one of these keys, at any depth."""
    for where, key, value in _entries(cfg, place, frozenset()):
        if key in keys:
            yield where, "a value that cannot be told" if value is None else str(value)


def _texts(cfg: Any, place: str) -> Iterator[tuple[str, str]]:
    return ((where, value) for where, _, value in _entries(cfg, place, frozenset()) if isinstance(value, str))


def _entries(node: Any, place: str, above: frozenset[int]) -> Iterator[tuple[str, Any, Any]]:
    """(place, key, value) of everything below a node, with interpolations resolved as instantiating would.

    above: the nodes that this one lies in: an interpolation may lead back to one of them.
    """
    if id(node) in above or not _is_container(node):
        return
    keys = list(node) if isinstance(node, Mapping) else range(len(node))
    for key in keys:
        where = f"{place}.{key}" if place else str(key)
        try:
            value = node[key]
        except OmegaConfBaseException:  # what is missing or cannot be resolved cannot be instantiated either
            value = None
        yield where, key, value
        yield from _entries(value, where, above | {id(node)})


def _is_container(node: Any) -> bool:
    return isinstance(node, Mapping) or (isinstance(node, Sequence) and not isinstance(node, (str, bytes)))
