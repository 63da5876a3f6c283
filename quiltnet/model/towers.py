"""open_clip's model of a configuration, its towers untrained or with timm's and Hugging Face's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from open_clip.model import CLIPVisionCfg
from open_clip.timm_model import TimmModel
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from quiltnet.errors import UserError
from quiltnet.model.image_size import check_image_size, fit_image_size
from quiltnet.model.timm_folder import LOCAL_PREFIX, WINDOWS, write_timm_folder
from quiltnet.model.tokenizer import refused_code
from quiltnet.model.weights import hub_access


def build_clip(
    model_cfg: Mapping[str, Any],
    *,
    timm_weights: bool = False,
    hugging_face_weights: bool = False,
    text_config: PretrainedConfig | None = None,
) -> nn.Module:
    """open_clip's ``CLIP`` or ``CustomTextCLIP``, the image tower at the configuration's image size.

    Args:
        model_cfg: open_clip's, with ``vision_cfg.timm_model_args`` beside.
        timm_weights, hugging_face_weights: load the towers' own, from the hub or the text tower's folder.
        text_config: of the Hugging Face text tower, in place of the one that its name leads to.
    """
    model_cfg = deepcopy(dict(model_cfg))
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if "multimodal_cfg" in model_cfg:
        raise UserError("CoCa models have a captioning decoder that is not trained here; choose a CLIP architecture")
    check_image_size(vision_cfg)
    vision_cfg["timm_model_pretrained"] = timm_weights
    text_cfg["hf_model_pretrained"] = hugging_face_weights
    text_tower = text_cfg.get("hf_model_name")
    custom_text = model_cfg.pop("custom_text", False) or text_tower is not None
    model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    with ExitStack() as stack:
        if text_config is not None:
            text_cfg["hf_model_name"] = stack.enter_context(TemporaryDirectory())
            text_config.save_pretrained(text_cfg["hf_model_name"])
        elif timm_weights or (text_tower is not None and not Path(text_tower).is_dir()):
            stack.enter_context(_hub_access(vision_cfg, text_tower))
        if text_tower is not None and text_config is None:
            _refuse_code(text_tower)
        if vision_cfg.get("timm_model_args"):
            folder = stack.enter_context(TemporaryDirectory())
            # Windows are those of the image size; stretched to it afterwards they would be others.
            image_size = vision_cfg.get("image_size") if WINDOWS in vision_cfg["timm_model_args"] else None
            write_timm_folder(vision_cfg, Path(folder), image_size)
            vision_cfg["timm_model_name"] = f"{LOCAL_PREFIX}{folder}"
        args = vision_cfg.pop("timm_model_args", None)
        try:
            clip = model_class(**model_cfg)
        except TypeError as error:
            if not args:
                raise
            raise UserError(f"timm_model_args={args} do not suit this timm tower ({error})") from error
    if isinstance(clip.visual, TimmModel):
        fit_image_size(clip.visual, vision_cfg.get("image_size", CLIPVisionCfg.image_size), is_pretrained=timm_weights)
    return clip


def _refuse_code(text_tower: str) -> None:
    """Asked here, as open_clip lets transformers ask on the terminal whether code of the repository shall run."""
    try:
        AutoConfig.from_pretrained(text_tower, trust_remote_code=False)
    except ValueError as error:
        raise refused_code(error, text_tower) from error


def _hub_access(vision_cfg: Mapping[str, Any], text_tower: str | None) -> Any:
    return hub_access(
        f"the towers {vision_cfg.get('timm_model_name', 'of open_clip')} and {text_tower or 'of open_clip'}",
        "give local files instead: model.image.pretrained=/path/to/weights, model.text.hf_model_name=/path/to/folder "
        "(config.json, vocabulary, model.safetensors); a model's own folder may hold the text tower's config.json too",
    )
