"""From what a user names (an architecture, two towers, a folder) to open_clip's configuration and its weights."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import open_clip
import timm
from huggingface_hub import snapshot_download
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.model.contrastive import Description
from quiltnet.model.folder import find_weights, read_description
from quiltnet.model.published_layouts import is_openai
from quiltnet.model.timm_folder import LOCAL_PREFIX, TIMM_KEYS, check_model_args, read_timm_folder, timm_folder_weights
from quiltnet.model.weights import hub_access, read_weights, resolve_path

log = logging.getLogger(__name__)

HUB_PREFIX = "hf-hub:"
# Keys of a tower that say where it comes from; all others are open_clip's own, of CLIPVisionCfg or CLIPTextCfg.
_SOURCE_KEYS = {"architecture", "pretrained", "weights_by_position"}
_PREPROCESSING_OF_TAGS = ("mean", "std", "interpolation", "resize_mode")


@dataclass
class Plan:
    """What to build, and where its weights come from: the whole model's, or each tower's."""

    description: Description
    architecture: str | None = None
    weights: Path | None = None
    tensors: dict[str, Tensor] | None = None  # where the weights are read already
    # A tag, a folder and OpenAI's own file say what the weights were trained with, a file of tensors does not.
    tells_training: bool = False
    image: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)

    def agree(self, name: str, asked: Any, trained_with: Any) -> None:
        """Refuse an option that contradicts what the weights were trained with."""
        if self.tells_training and asked != trained_with:
            raise UserError(
                f"{name}={asked} was asked for, but the weights {self.weights} were trained with "
                f"{name}={trained_with}; leave {name} out to take the weights' own"
            )


def plan_architecture(architecture: str, pretrained: str | None) -> Plan:
    """One of open_clip's architectures; ``pretrained`` is a tag, a file or a folder."""
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        near = _nearest(architecture, open_clip.list_models())
        raise UserError(f"unknown architecture {architecture!r}; the nearest of open_clip's: {near}")
    plan = Plan(Description(model_cfg, asdict(PreprocessCfg())), architecture)
    if pretrained is None:
        return plan
    if tag := open_clip.get_pretrained_cfg(architecture, pretrained):
        _take_tag(plan, pretrained, tag)
        return plan
    try:
        plan.weights = resolve_path(pretrained)
    except UserError as error:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(f"{error}; or one of the tags of {architecture}: {tags}") from None
    if plan.weights.is_dir():
        _take_folder(plan, plan.weights)
    else:
        _take_file(plan, plan.weights)
    return plan


def plan_towers(
    image: Mapping[str, Any] | None,
    text: Mapping[str, Any] | None,
    embed_dim: int | None,
    pretrained: str | None,
) -> Plan:
    """An image and a text tower, each by its own keys; ``pretrained`` is a file with the whole model's weights."""
    if image is None or text is None or embed_dim is None:
        raise UserError("two towers need all of: image, text, embed_dim")
    image, preprocessing = _open_timm_folder(image)
    vision_cfg = _tower_cfg("image", image, CLIPVisionCfg)
    text_cfg = _tower_cfg("text", text, CLIPTextCfg)
    preprocess_cfg = asdict(PreprocessCfg())
    if timm_name := vision_cfg.get("timm_model_name"):
        default = _timm_default(timm_name)
        preprocess_cfg.update(mean=tuple(default.mean), std=tuple(default.std))
        vision_cfg.setdefault("image_size", default.input_size[-1])
        check_model_args(vision_cfg.get("timm_model_args") or {})
    preprocess_cfg.update(preprocessing)
    if image.get("pretrained") is True and "timm_model_name" not in vision_cfg:
        raise UserError("image.pretrained=true asks for timm's weights; an open_clip tower takes a path")
    if image.get("pretrained") is True and vision_cfg.get("timm_model_args"):
        raise UserError("image.pretrained=true: timm's own weights are of a tower without timm_model_args; give a path")
    if text.get("pretrained") is True and "hf_model_name" not in text_cfg:
        raise UserError(
            "text.pretrained=true asks for the Hugging Face model's weights; an open_clip tower takes a path"
        )
    model_cfg = {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    activations = {open_clip.get_model_config(name).get("quick_gelu", False) for name in _named(image, text)}
    if len(activations) > 1:
        raise UserError(f"the towers of {' and '.join(_named(image, text))} have different activations; choose alike")
    model_cfg["quick_gelu"] = activations == {True}
    plan = Plan(Description(model_cfg, preprocess_cfg), image=image, text=text)
    if pretrained:
        weights = resolve_path(pretrained)
        if weights.is_dir():
            raise UserError(
                f"pretrained={pretrained} is a folder, which says itself what it is of: model=start "
                f"model.source={pretrained}; two towers take a file of weights"
            )
        _take_file(plan, weights)
    return plan


def _take_tag(plan: Plan, pretrained: str, tag: Mapping[str, Any]) -> None:
    """Download a tag's weights and take over what they were trained with."""
    with hub_access(
        f"the weights {plan.architecture}:{pretrained}",
        "give a file or an open_clip folder instead: model.pretrained=/path/to/open_clip_model.safetensors",
    ):
        plan.weights = Path(open_clip.download_pretrained(tag))
    plan.tells_training = True
    if "quickgelu" in str(plan.architecture):
        plan.agree("quick_gelu", True, tag.get("quick_gelu", False))
    plan.description.model_cfg["quick_gelu"] = tag.get("quick_gelu", False)
    plan.description.preprocess_cfg.update({name: tag[name] for name in _PREPROCESSING_OF_TAGS if name in tag})


def _take_folder(plan: Plan, folder: Path) -> None:
    """An open_clip folder brings its own description, which must be of the architecture that was asked for."""
    found = read_description(folder)
    for section in ("vision_cfg", "text_cfg"):
        asked, theirs = plan.description.model_cfg[section], found.model_cfg[section]
        differing = [f"{key} {asked[key]} / {theirs.get(key)}" for key in asked if asked[key] != theirs.get(key)]
        if differing:
            raise UserError(
                f"{folder} does not hold a {plan.architecture} ({section}, asked / found: {'; '.join(differing)}); "
                f"model=start model.source={folder} takes the architecture from the folder"
            )
    plan.description, plan.weights, plan.tells_training = found, find_weights(folder), True


def _take_file(plan: Plan, file: Path) -> None:
    """A file of tensors, which tells nothing of how it was trained, unless it is OpenAI's."""
    plan.weights, plan.tensors = file, read_weights(file, torchscript=True)
    if is_openai(plan.tensors):
        plan.tells_training = True
        plan.description.model_cfg["quick_gelu"] = True
        log.info("%s is OpenAI's file: its towers have QuickGELU", file)


def _open_timm_folder(image: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """An image tower that is named by a folder of timm's, by name and options instead; its mean and std."""
    name = str(image.get("timm_model_name"))
    if name.startswith(HUB_PREFIX):
        repository = name.removeprefix(HUB_PREFIX)
        with hub_access(f"the timm model {repository}", "give its folder: timm_model_name=local-dir:/path"):
            name = LOCAL_PREFIX + snapshot_download(repository)
    if not name.startswith(LOCAL_PREFIX):
        return image, {}
    folder = resolve_path(name.removeprefix(LOCAL_PREFIX))
    found = read_timm_folder(folder)
    tower = {"image_size": found["image_size"], **image, **{key: found[key] for key in TIMM_KEYS if key in found}}
    if image.get("pretrained") is True:
        tower["pretrained"] = str(timm_folder_weights(folder))
    return tower, {"mean": found["mean"], "std": found["std"]}


def _named(*towers: Mapping[str, Any]) -> list[str]:
    """The open_clip architectures that towers are taken from."""
    return [tower["architecture"] for tower in towers if tower.get("architecture")]


def _tower_cfg(which: str, tower: Mapping[str, Any], known: type) -> dict[str, Any]:
    """open_clip's section for one tower."""
    cfg = {name: value for name, value in tower.items() if name not in _SOURCE_KEYS}
    allowed = {item.name for item in fields(known)} | ({"timm_model_args"} if which == "image" else set())
    if unknown := sorted(set(cfg) - allowed):
        raise UserError(f"{which} tower: unknown keys {unknown}; it takes {', '.join(sorted(allowed | _SOURCE_KEYS))}")
    if architecture := tower.get("architecture"):
        section = "vision_cfg" if which == "image" else "text_cfg"
        cfg = {**plan_architecture(architecture, None).description.model_cfg[section], **cfg}
    return cfg


def _timm_default(name: str) -> Any:
    if not timm.is_model(name):
        raise UserError(f"unknown timm model {name!r}; the nearest names: {_nearest(name, timm.list_models())}")
    return timm.get_pretrained_cfg(name)


def _nearest(name: str, known: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.3))
