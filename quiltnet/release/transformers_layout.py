"""A native CLIP model in the terms of transformers: configuration and image processor, or why there are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from transformers import CLIPConfig, CLIPImageProcessor

from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.transformers_clip import ARCHITECTURE, INTERPOLATIONS, LEGACY_END_ID, LOGIT_BIAS_KEY
from quiltnet.release.tokenizer_files import transformers_tokenizer

# What has a place in transformers' configuration, or nothing to do with a trained model's features.
_SHARED = {"layers", "width", "mlp_ratio", "norm_kwargs", "output_tokens"}
_KNOWN_VISION = _SHARED | {"head_width", "patch_size", "image_size", "patch_dropout"}
_KNOWN_TEXT = _SHARED | {
    "heads", "context_length", "vocab_size", "pad_id", "pool_type", "eos_id", "hf_tokenizer_name", "hf_model_pretrained"
}  # fmt: skip
_KNOWN_MODEL = {
    "embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "custom_text", "vision_cfg", "text_cfg"
}  # fmt: skip


def check_transformers(model: ContrastiveModel) -> None:
    """Raises UserError, with all reasons, where transformers' ``CLIPModel`` cannot be this model."""
    reasons = list(_differences(model))
    if reasons:
        raise UserError(
            f"--format transformers: this model is no {ARCHITECTURE}, since {'; '.join(reasons)}. Export it as "
            "--format open_clip or --format onnx"
        )


def transformers_config(model: ContrastiveModel) -> CLIPConfig:
    """Read off the model's description; ``check_transformers`` comes first."""
    model_cfg, tokenizer = model.description.model_cfg, transformers_tokenizer(model.tokenize)
    vision_cfg = _complete(CLIPVisionCfg, model_cfg["vision_cfg"])
    text_cfg = _complete(CLIPTextCfg, model_cfg["text_cfg"])
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    embed_dim = {"projection_dim": model_cfg["embed_dim"]}
    vision = {
        "image_size": vision_cfg["image_size"],
        "patch_size": vision_cfg["patch_size"],
        **_tower(vision_cfg, vision_cfg["width"] // vision_cfg["head_width"], activation),
        **embed_dim,
    }
    text = {
        "vocab_size": text_cfg["vocab_size"],
        "max_position_embeddings": text_cfg["context_length"],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": _end_id(text_cfg, tokenizer.eos_token_id, len(tokenizer)),
        "pad_token_id": tokenizer.pad_token_id,
        **_tower(text_cfg, text_cfg["heads"], activation),
        **embed_dim,
    }
    scale = {"logit_scale_init_value": model.clip.logit_scale.item()}
    bias = {} if model.logit_bias is None else {LOGIT_BIAS_KEY: model.logit_bias.item()}
    towers = {"vision_config": vision, "text_config": text}
    return CLIPConfig(**towers, **embed_dim, **scale, **bias, architectures=[ARCHITECTURE])


def image_processor(model: ContrastiveModel) -> CLIPImageProcessor:
    """What does to an image as the model's own transform does."""
    cfg, side = model.description.preprocess_cfg, model.image_size
    is_squashed = cfg.get("resize_mode") == "squash"
    square = {"height": side, "width": side}
    resample = next(number for number, name in INTERPOLATIONS.items() if name == _interpolation(cfg))
    return CLIPImageProcessor(
        size=square if is_squashed else {"shortest_edge": side},
        do_center_crop=not is_squashed,
        crop_size=square,
        resample=resample,
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )


def _tower(cfg: Mapping[str, Any], heads: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": cfg["width"],
        "intermediate_size": int(cfg["width"] * cfg["mlp_ratio"]),  # rounded down, as open_clip does
        "num_hidden_layers": cfg["layers"],
        "num_attention_heads": heads,
        "hidden_act": activation,
        "layer_norm_eps": (cfg["norm_kwargs"] or {}).get("eps", 1e-5),
    }


def _end_id(text_cfg: Mapping[str, Any], end_id: int, tokens: int) -> int:
    """The token at which transformers takes a text's features; ``LEGACY_END_ID``: wherever the highest id stands."""
    if text_cfg["pool_type"] == "eos":
        return text_cfg["eos_id"]
    return end_id if end_id == tokens - 1 else LEGACY_END_ID


def _interpolation(preprocess_cfg: Mapping[str, Any]) -> str:
    """``random`` is for training; open_clip evaluates with ``bicubic`` then."""
    return "bilinear" if preprocess_cfg.get("interpolation") == "bilinear" else "bicubic"


def _complete(cfg_class: type, cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: cfg.get(item.name, item.default) for item in fields(cfg_class)}


def _differences(model: ContrastiveModel) -> Iterator[str]:
    model_cfg, preprocess_cfg = model.description.model_cfg, model.description.preprocess_cfg
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    is_native = True
    if vision_cfg.get("timm_model_name"):
        yield f"its image tower is timm's {vision_cfg['timm_model_name']}"
        is_native = False
    elif not isinstance(vision_cfg.get("layers", CLIPVisionCfg.layers), int):
        yield "its image tower is a ResNet"
        is_native = False
    if text_cfg.get("hf_model_name"):
        yield f"its text tower is the Hugging Face model {text_cfg['hf_model_name']}"
        is_native = False
    if not is_native:  # the options that follow are those of native towers
        return
    yield from _unknown("vision_cfg", vision_cfg, CLIPVisionCfg, _KNOWN_VISION)
    yield from _unknown("text_cfg", text_cfg, CLIPTextCfg, _KNOWN_TEXT)
    yield from (f"{key} has no place there" for key in sorted(set(model_cfg) - _KNOWN_MODEL))
    yield from _pooling_differences(text_cfg)
    if transformers_tokenizer(model.tokenize) is None:
        yield "its tokeniser has options that CLIPTokenizer does not have"
    if not isinstance(model.image_size, int):
        yield f"its images are not square ({model.image_size})"
    if preprocess_cfg.get("resize_mode") == "longest":
        yield "it pads images (resize_mode longest)"


def _unknown(name: str, cfg: Mapping[str, Any], cfg_class: type, known: set[str]) -> Iterator[str]:
    """Options that are not open_clip's defaults, and that ``CLIPConfig`` does not have."""
    defaults = {item.name: item.default for item in fields(cfg_class)}
    for key, value in cfg.items():
        if key not in known and value != defaults.get(key) and value not in ({}, None):
            yield f"{name}.{key}={value} has no place there"
    if odd := sorted(set(cfg.get("norm_kwargs") or {}) - {"eps"}):
        yield f"{name}.norm_kwargs has {', '.join(odd)}"


def _pooling_differences(text_cfg: Mapping[str, Any]) -> Iterator[str]:
    pool_type = text_cfg.get("pool_type", CLIPTextCfg.pool_type)
    if pool_type not in ("argmax", "eos"):
        yield f"its text tower pools by {pool_type}, not at the end token"
    elif pool_type == "eos" and text_cfg.get("eos_id", CLIPTextCfg.eos_id) == LEGACY_END_ID:
        yield f"its end token is {LEGACY_END_ID}, which transformers takes for the highest of all ids"
