"""timm's own description of an image tower, a folder with ``config.json``: what a name alone does not say.

open_clip builds a timm tower by its name, without options: at timm's image size, without what ``timm_model_args`` add.
But the name may be ``local-dir:FOLDER``, and then timm takes the options from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.weights import described_by

FOLDER_NAME = "timm"
LOCAL_PREFIX = "local-dir:"
CONFIG_NAME = "config.json"
TIMM_KEYS = ("timm_model_name", "timm_model_args")
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
WINDOWS = "window_size"
# Options that open_clip, or image_size, has the say over.
_NOT_ARGS = {"img_size", "num_classes", "global_pool", "in_chans"}


def check_model_args(args: Mapping[str, Any]) -> None:
    if taken := sorted(_NOT_ARGS & set(args)):
        raise UserError(
            f"timm_model_args: {', '.join(taken)} cannot be given there; say image_size for img_size and timm_pool for "
            "global_pool"
        )


def read_timm_folder(folder: Path) -> dict[str, Any]:
    """Of a folder that timm wrote, or that was downloaded from the hub: keys for an image tower, and what it is fed.

    Returns:
        ``timm_model_name``, ``timm_model_args`` (where there are any), ``image_size``, ``mean``, ``std``.

    Raises:
        UserError: no such description, or of an architecture that timm does not know.
    """
    config = folder / CONFIG_NAME
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        architecture = content["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{config} is no description of a timm model ({type(error).__name__}: {error}); give a folder with timm's "
            "config.json, or a timm model's name"
        ) from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"{config} names {architecture!r}, which this version of timm does not know")
    with described_by(config):
        args = dict(content.get("model_args") or {})
        preprocessing = {**timm.get_pretrained_cfg(architecture).to_dict(), **(content.get("pretrained_cfg") or {})}
        found = {
            "timm_model_name": architecture,
            "image_size": args.get("img_size", preprocessing["input_size"][-1]),
            "mean": tuple(preprocessing["mean"]),
            "std": tuple(preprocessing["std"]),
        }
    if kept := {name: value for name, value in args.items() if name not in _NOT_ARGS}:
        found["timm_model_args"] = kept
    return found


def timm_folder_weights(folder: Path) -> Path:
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no weights; it should contain one of {', '.join(WEIGHTS_NAMES)}")


def needs_timm_folder(vision_cfg: Mapping[str, Any], trunk: Any) -> bool:
    """Whether timm, given the name alone, builds another tower than this one."""
    if vision_cfg.get("timm_model_args"):
        return True
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if size is None and hasattr(trunk, "set_input_size"):  # no patches, and windows of the image's size: MaxViT
        size = to_2tuple(vision_cfg["image_size"])
    default = timm.get_pretrained_cfg(vision_cfg["timm_model_name"]).input_size[1:]
    return size is not None and tuple(size) != tuple(default)


def window_args(trunk: nn.Module) -> dict[str, Any]:
    """Swin's windows, stage by stage: they were scaled with the image, which timm, given its size, does not do."""
    if not isinstance(trunk, SwinTransformer):
        return {}
    return {WINDOWS: [list(stage.blocks[0].attn.window_size) for stage in trunk.layers]}


def write_timm_folder(vision_cfg: Mapping[str, Any], folder: Path, image_size: Any = None, **more: Any) -> None:
    """Write what makes timm build this tower, with its options and ``more``, and at ``image_size`` where given."""
    args = {**deepcopy(dict(vision_cfg.get("timm_model_args") or {})), **more}
    if image_size is not None:
        args["img_size"] = image_size
    name = vision_cfg["timm_model_name"]
    config = {
        "architecture": name,
        "model_args": args,
        "pretrained_cfg": timm.get_pretrained_cfg(name).to_dict(remove_source=True),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
