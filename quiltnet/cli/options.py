"""What the options of a run may be: a text where a number belongs ends here, not an hour later in a traceback."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from quiltnet.data.transforms import DECODERS, EXIF
from quiltnet.errors import UserError

Rule = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _optional(rule: Rule) -> Rule:
    check, words = rule
    return (lambda value: value is None or check(value)), f"{words}, or null"


def _one_of(*choices: str) -> Rule:
    return choices.__contains__, f"one of {', '.join(choices)}"


COUNT: Rule = (lambda value: _is_whole(value) and value >= 1), "a whole number of at least 1"
WHOLE: Rule = (lambda value: _is_whole(value) and value >= 0), "a whole number of at least 0"
SEED: Rule = (lambda value: _is_whole(value) and 0 <= value < 1 << 63), "a whole number from 0 to 2**63 - 1"
NUMBER: Rule = _is_number, "a number"
FACTOR: Rule = (lambda value: _is_number(value) and value >= 0), "a number of at least 0"
POSITIVE: Rule = (lambda value: _is_number(value) and value > 0), "a number above 0"
SHARE: Rule = (lambda value: _is_number(value) and 0 <= value <= 1), "a number between 0 and 1"
PART: Rule = (lambda value: _is_number(value) and 0 <= value < 1), "a number of at least 0 and below 1"
SWITCH: Rule = (lambda value: isinstance(value, bool)), "true or false"
NAME: Rule = (lambda value: isinstance(value, str) and value != ""), "a name or path"
SHARDS: Rule = (
    (lambda value: value is None or _is_text(value) or (isinstance(value, Sequence) and all(map(_is_text, value)))),
    "a folder of shards, a tar, a brace pattern, a URL, or a list of these (quote a name that is a number)",
)
NAMES: Rule = (
    (lambda value: OmegaConf.is_list(value) and all(map(_is_text, value))),
    "a list of names: [a,b]",
)
RANGE: Rule = (
    (lambda value: OmegaConf.is_list(value) and len(value) == 2 and all(map(_is_number, value))),
    "two numbers: [least,most]",
)
STRENGTHS: Rule = (
    (lambda value: OmegaConf.is_list(value) and len(value) == 4 and all(_is_number(v) and v >= 0 for v in value)),
    "four numbers of at least 0: [brightness,contrast,saturation,hue]",
)

_ABSENT = object()

RULES: dict[str, Rule] = {
    "output_dir": NAME,
    "overwrite": SWITCH,
    "output": _optional(NAME),
    "chart_metric": NAME,
    "feature_cache": _optional(NAME),
    "resume": _optional(NAME),
    "allow_changes": SWITCH,
    "seed": SEED,
    "global_batch_size": COUNT,
    "epochs": _optional(POSITIVE),
    "total_samples": _optional(COUNT),
    "precision": _one_of("fp32", "tf32", "bf16", "fp16"),
    "micro_batch_size": _optional(COUNT),
    "patch_dropout": PART,
    "undropped_share": SHARE,
    "objective.image_image_weight": FACTOR,
    "objective.image_image_logit_scale": POSITIVE,
    "objective.distillation_weight": FACTOR,
    "objective.teacher": _optional(NAME),
    "averaging.decay": _optional(PART),
    "averaging.warmup": SWITCH,
    "overfit": SWITCH,
    "profile": SWITCH,
    "loss.duplicates": _one_of("ignore", "mask", "positive"),
    "loss.label_smoothing": PART,
    "loss.hardness": FACTOR,
    "loss.caption_dropout": PART,
    "placement.sharding": _one_of("ddp", "fsdp"),
    "placement.gradient_compression": SWITCH,
    "placement.activation_checkpointing": SWITCH,
    "placement.compile": SWITCH,
    "deterministic": SWITCH,
    "max_grad_norm": _optional(POSITIVE),
    "monitor": _optional(NAME),
    "allow_targets": NAMES,
    "share_samples": SWITCH,
    "data.train.shards": SHARDS,
    "data.train.workers": WHOLE,
    "data.train.crop_scale": RANGE,
    "data.train.horizontal_flip": SWITCH,
    "data.train.vertical_flip": SWITCH,
    "data.train.right_angle_rotations": SWITCH,
    "data.train.sentences": SWITCH,
    "data.val.shards": SHARDS,
    "data.decode": _one_of(*DECODERS),
    "data.exif": _one_of(*EXIF),
    "data.augment.color_jitter": STRENGTHS,
    "data.augment.color_jitter_probability": SHARE,
    "data.augment.hed_jitter": SHARE,
    "data.augment.hed_jitter_probability": SHARE,
    "data.stream.shuffle_buffer": COUNT,
    "data.stream.shards_at_once": COUNT,
    "data.stream.samples_per_epoch": _optional(COUNT),
    "data.stream.cache": _optional(NAME),
    "data.stream.cache_gib": POSITIVE,
    "data.allow_pipe": SWITCH,
    "data.max_bad_fraction": SHARE,
    "schedule.warmup_samples": _optional(WHOLE),
    "schedule.final_factor": SHARE,
    "optim.lr": NUMBER,
    "optim.weight_decay": FACTOR,
    "optim.name": NAME,
    "optim.layer_decay": POSITIVE,
    "optim.image_lr_factor": POSITIVE,
    "optim.text_lr_factor": POSITIVE,
    "optim.logit_scale_lr_factor": POSITIVE,
    "optim.projection_lr_factor": POSITIVE,
    "tuning.image_last_n": _optional(COUNT),
    "tuning.text_last_n": _optional(COUNT),
    "tuning.image_thaw_samples": WHOLE,
    "tuning.text_thaw_samples": WHOLE,
    "tuning.logit_scale": SWITCH,
    "tuning.lora_rank": COUNT,
    "tuning.lora_alpha": POSITIVE,
    "tuning.lora_dropout": PART,
    "tuning.image_lora_targets": _optional(NAMES),
    "tuning.text_lora_targets": _optional(NAMES),
    "schedule.decay_share": SHARE,
    "schedule.decay_shape": _one_of("linear", "cosine", "1-sqrt"),
    "callbacks.log_every_samples": _optional(COUNT),
    "callbacks.evaluate_every_samples": _optional(COUNT),
    "callbacks.evaluation_budget_s": _optional(POSITIVE),
    "callbacks.checkpoint_every_samples": _optional(COUNT),
    "callbacks.keep_checkpoints": COUNT,
    "callbacks.keep_best": WHOLE,
    "callbacks.keep_every_samples": _optional(COUNT),
    "callbacks.copy_checkpoints_to": _optional(NAME),
    "callbacks.on_save_failure": _one_of("continue", "stop"),
    "callbacks.max_nonfinite_steps": COUNT,
    "callbacks.stall_timeout_s": _optional(POSITIVE),
    "callbacks.early_stopping.patience": _optional(COUNT),
    "callbacks.early_stopping.min_delta": FACTOR,
    "callbacks.alarm.metrics": NAMES,
    "callbacks.alarm.margin": FACTOR,
    "callbacks.alarm.stop": SWITCH,
}

# Looked at where they are used, and by more than one rule.
CHECKED_ELSEWHERE = {"data.train.sources", "data.train.caption_policy", "data.augment.stain_normalization"}
PARTS = {
    "run_name", "data_root", "model", "data", "loss", "objective", "optim", "schedule", "placement", "callbacks",
    "evaluator", "logger", "tuning", "averaging"
}  # fmt: skip


def check_run_name(cfg: DictConfig, example: str, goes_to: str) -> None:
    """Raises UserError where ``run_name`` is not set, or could not name a folder."""
    if OmegaConf.is_missing(cfg, "run_name"):
        raise UserError(f"run_name is not set; say run_name={example}, and {goes_to}")
    if not re.fullmatch(r"\w[\w.+=,-]*", str(cfg.run_name)):
        raise UserError(f"run_name={cfg.run_name!r} is a folder's name: letters, digits and . _ + = , - only")


def check_options(cfg: DictConfig) -> None:
    """Raises UserError for the first option that is not what it must be; options that the config lacks are passed."""
    _check_names(cfg)
    check_values(cfg)


def check_values(cfg: DictConfig) -> None:
    """As ``check_options``, whatever the names are: evaluating has few options, which Hydra knows."""
    for name, (allows, words) in RULES.items():
        value = OmegaConf.select(cfg, name, default=_ABSENT)
        if value is not _ABSENT and not allows(value):
            raise UserError(f"{name}={value} must be {words}")
    for name, evaluator in cfg.evaluator.items():
        for option, (allows, words) in {"batch_size": COUNT, "workers": WHOLE}.items():
            if option in evaluator and not allows(evaluator[option]):
                raise UserError(f"evaluator.{name}.{option}={evaluator[option]} must be {words}")


def _check_names(cfg: DictConfig) -> None:
    """Hydra refuses a misspelt key on the command line, but merges one of an experiment file without a word."""
    known = {*RULES, *CHECKED_ELSEWHERE}
    for name in ("experiment", "debug", "sweep"):
        if name in cfg and cfg[name] is not None:
            raise UserError(f"{name}={cfg[name]}: the file must begin with the line `# @package _global_`")
    for group in ("data", "callbacks", "objective", "averaging"):
        for name in option_names(OmegaConf.to_container(cfg[group]), group, whole=CHECKED_ELSEWHERE):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)
                raise UserError(f"{name} is not an option; the nearest is {near[0]}")
    # Other keys may be a user's own, to be named in ${…}.
    top = PARTS | {name for name in known if "." not in name}
    for name in cfg.keys() - top:
        if near := difflib.get_close_matches(name, top, n=1, cutoff=0.8):
            raise UserError(f"{name} is not an option; did you mean {near[0]}?")


def option_names(node: Any, name: str = "", *, whole: Collection[str] = ()) -> Iterator[str]:
    """Dotted names of all options below a node, which has that name itself; ``whole`` are not looked into."""
    if not isinstance(node, dict) or name in whole:
        yield name
        return
    for key, inner in node.items():
        yield from option_names(inner, f"{name}.{key}" if name else str(key), whole=whole)
