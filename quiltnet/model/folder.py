"""A model's folder in open_clip's layout: what it is (config, tokeniser files) and its weights."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from quiltnet.errors import UserError
from quiltnet.model.adapters import save_adapters
from quiltnet.model.contrastive import ContrastiveModel, Description
from quiltnet.model.published_layouts import translate_old_keys
from quiltnet.model.timm_folder import (
    FOLDER_NAME,
    LOCAL_PREFIX,
    TIMM_KEYS,
    needs_timm_folder,
    read_timm_folder,
    window_args,
    write_timm_folder,
)

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"

_HUB_NAME = re.compile(r"(hf-hub:|hf_hub:)?\w[\w.-]*(/\w[\w.-]*)?(@[\w.-]+)?")
# What of open_clip's tokenisers a folder may choose: others reach transformers, where one of them runs code.
_TOKENIZER_OPTIONS = {
    "additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token", "tokenizer_mode"
}  # fmt: skip


def read_description(folder: Path) -> Description:
    """What the folder says of its model.

    A Hugging Face text tower and a timm image tower are read from the folder itself, so that the folder can be moved or
    downloaded: open_clip resolves ``hf_model_name`` and ``timm_model_name`` alone, as names or paths.

    Raises:
        UserError: it is no such folder, or names files outside of itself, or options that could run code.
    """
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise UserError(f"{folder} has no {CONFIG_NAME}; give a folder in open_clip's layout")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        text_cfg, vision_cfg = content["model_cfg"]["text_cfg"], content["model_cfg"]["vision_cfg"]
        translate_old_keys(text_cfg, config)
        _check_keys(text_cfg, CLIPTextCfg, config)
        _check_keys(vision_cfg, CLIPVisionCfg, config)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} is not an open_clip configuration ({type(error).__name__}: {error})") from error
    if text_cfg.get("hf_model_name") and (folder / "config.json").is_file():
        text_cfg["hf_model_name"] = str(folder.resolve())
    if text_cfg.get("hf_tokenizer_name") and (folder / "tokenizer_config.json").is_file():
        text_cfg["hf_tokenizer_name"] = str(folder.resolve())
    if str(vision_cfg.get("timm_model_name")).startswith(LOCAL_PREFIX):
        found = read_timm_folder(folder / FOLDER_NAME)
        vision_cfg.update({key: found[key] for key in TIMM_KEYS if key in found})
    _check_references(text_cfg, vision_cfg, folder)
    preprocess_cfg = {**asdict(PreprocessCfg()), **content.get("preprocess_cfg", {})}
    return Description(content["model_cfg"], preprocess_cfg)


def find_weights(folder: Path) -> Path:
    """The folder's weights, safetensors first."""
    names = [
        WEIGHTS_NAME,
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no weights; it should contain one of {', '.join(names)}")


def write_description(model: ContrastiveModel, folder: Path, *, final: Path | None = None) -> None:
    """Write config, tokeniser files and the shape of adapters: all that rebuilds the model without a network.

    Args:
        final: where the folder will stand when it is moved after writing. open_clip finds a Hugging Face text tower,
            and timm a tower with options, by absolute path (a relative one is taken from the working directory).
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = str((final or folder).resolve())
    model_cfg = deepcopy(model.description.model_cfg)
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if vision_cfg.get("timm_model_name") and needs_timm_folder(vision_cfg, model.clip.visual.trunk):
        trunk = model.clip.visual.trunk
        write_timm_folder(vision_cfg, folder / FOLDER_NAME, model.image_size, **window_args(trunk))
        vision_cfg.pop("timm_model_args", None)
        vision_cfg["timm_model_name"] = f"{LOCAL_PREFIX}{place}/{FOLDER_NAME}"
    if text_cfg.get("hf_model_name"):
        model.clip.text.config.save_pretrained(folder)
        text_cfg["hf_model_name"] = place
        text_cfg["hf_model_pretrained"] = False
    if text_cfg.get("hf_tokenizer_name"):
        text_cfg["hf_tokenizer_name"] = place
    model.tokenize.save(folder)
    save_adapters(model, folder)
    vision_cfg.pop("timm_model_pretrained", None)
    config = {"model_cfg": model_cfg, "preprocess_cfg": model.description.preprocess_cfg}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_references(text_cfg: dict[str, Any], vision_cfg: dict[str, Any], folder: Path) -> None:
    """A folder may be somebody else's: what it names is in it, or on the hub under a name."""
    own = str(folder.resolve())
    for cfg, key in ((text_cfg, "hf_model_name"), (text_cfg, "hf_tokenizer_name"), (vision_cfg, "timm_model_name")):
        name = cfg.get(key)
        if name not in (None, own) and not _HUB_NAME.fullmatch(str(name)):
            raise UserError(
                f"{folder / CONFIG_NAME}: {key} is {name}, outside of the folder; put the files that it means into "
                "the folder, or give a name of the hub"
            )
    if unknown := sorted(set(text_cfg.get("tokenizer_kwargs") or {}) - _TOKENIZER_OPTIONS):
        raise UserError(
            f"{folder / CONFIG_NAME}: tokenizer_kwargs has {', '.join(unknown)}; a folder may choose "
            f"{', '.join(sorted(_TOKENIZER_OPTIONS))}. Code of a repository is never run"
        )


def _check_keys(cfg: dict[str, Any], known: type, config: Path) -> None:
    allowed = {item.name for item in fields(known)}
    if unknown := sorted(set(cfg) - allowed):
        raise UserError(f"{config}: keys that this version of open_clip does not know: {', '.join(unknown)}")
