"""A model's folder in open_clip's layout: what it is (config, tokeniser files) and its weights."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

from open_clip.transform import PreprocessCfg

from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel, Description

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


def read_description(folder: Path) -> Description:
    """What the folder says of its model.

    A Hugging Face text tower is read from the folder itself, so that the folder can be moved or downloaded: open_clip
    resolves ``hf_model_name`` alone, as a hub name or a path.
    """
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise UserError(f"{folder} has no {CONFIG_NAME}; give a folder in open_clip's layout")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        text_cfg = content["model_cfg"]["text_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} is not an open_clip configuration ({type(error).__name__}: {error})") from error
    if text_cfg.get("hf_model_name") and (folder / "config.json").is_file():
        text_cfg["hf_model_name"] = str(folder.resolve())
    if text_cfg.get("hf_tokenizer_name") and (folder / "tokenizer_config.json").is_file():
        text_cfg["hf_tokenizer_name"] = str(folder.resolve())
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
    """Write config and tokeniser files, all that rebuilds the untrained model without a network.

    Args:
        final: where the folder will stand when it is moved after writing. open_clip finds a Hugging Face text tower by
            absolute path (a relative one would be taken from the reader's working directory).
    """
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = deepcopy(model.description.model_cfg)
    text_cfg = model_cfg["text_cfg"]
    if text_cfg.get("hf_model_name"):
        model.clip.text.config.save_pretrained(folder)
        text_cfg["hf_model_name"] = str((final or folder).resolve())
        text_cfg["hf_model_pretrained"] = False
    if text_cfg.get("hf_tokenizer_name"):
        text_cfg["hf_tokenizer_name"] = str((final or folder).resolve())
    model.tokenize.save(folder)
    model_cfg["vision_cfg"].pop("timm_model_pretrained", None)
    config = {"model_cfg": model_cfg, "preprocess_cfg": model.description.preprocess_cfg}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
