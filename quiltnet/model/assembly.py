"""One way to build a model: open_clip native, timm image tower, Hugging Face text tower -> one CLIP face."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from transformers import PretrainedConfig

from quiltnet.errors import UserError
from quiltnet.model.architecture import Plan, plan_architecture, plan_towers
from quiltnet.model.changes import Changes
from quiltnet.model.contrastive import BatchNormMode, ContrastiveModel, Description
from quiltnet.model.image_size import resize_positions, resize_timm_positions
from quiltnet.model.published_layouts import drop_openai_marks
from quiltnet.model.tokenizer import Tokenizer, bpe_tokenizer, built_in_tokenizer, hugging_face_tokenizer
from quiltnet.model.towers import build_clip
from quiltnet.model.weights import hub_access, load_by_position, load_exactly, read_weights, resolve_path

log = logging.getLogger(__name__)


def build_model(
    architecture: str | None = None,
    *,
    pretrained: str | None = None,
    image: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    embed_dim: int | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    quick_gelu: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    tokenizer: str | None = None,
    batchnorm: BatchNormMode = "frozen",
) -> ContrastiveModel:
    """Build a model by open_clip's name, or out of two towers, and load what ``pretrained`` names.

    Args:
        architecture: one of ``open_clip.list_models()``; excludes ``image`` and ``text``.
        pretrained: weights of the whole model: an open_clip tag (needs the hub), a file (OpenAI's own too), or an
            open_clip folder.
        image: the image tower: keys of open_clip's ``CLIPVisionCfg``, or ``architecture`` to take an open_clip
            model's; ``timm_model_name`` may be ``local-dir:/folder`` or ``hf-hub:org/name`` of timm's layout, and
            ``timm_model_args`` are options of timm's constructor; ``pretrained`` is false, true (timm's own weights,
            needs the hub) or a path, and ``weights_by_position`` matches tensors by order where names differ.
        text: the text tower: keys of ``CLIPTextCfg`` (``hf_model_name``: hub name, folder or ``package:…``), or
            ``architecture``; ``pretrained`` is false, true (the Hugging Face model's own) or a path.
        embed_dim: D, for two towers.
        image_size, context_length: override the architecture's; position embeddings of ``pretrained`` are resized.
        quick_gelu: activation of native towers; by default that of the weights, or the architecture's where a file of
            tensors does not say it, which is logged.
        mean, std: per channel; by default those of the weights or of the timm tower.
        init_logit_scale: the factor itself, not its logarithm; by default open_clip's 1 / 0.07. SigLIP began at 10.
            Weights of the whole model bring their own.
        init_logit_bias: give the model the bias that SigLIP's loss adds, with this value (-10 in Zhai et al. 2023)
            unless the weights bring one.
        tokenizer: a folder with the vocabulary of the text tower, in place of the one that the architecture names.
        batchnorm: as in ``Changes``.

    Raises:
        UserError: unknown names (with the nearest), weights of another architecture, activation or normalisation
            (with both sides), a hub that cannot be reached (with the file to give instead).
    """
    changes = Changes(image_size, context_length, init_logit_bias, batchnorm)
    if (architecture is None) == (image is None and text is None):
        raise UserError("give either an open_clip architecture, or an image and a text tower")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and len(value) != 3:
            raise UserError(f"{name}={list(value)} must have three numbers, one a channel")
    if architecture is not None:
        if embed_dim is not None:
            raise UserError(f"embed_dim={embed_dim} is for two towers; {architecture} has its own")
        plan = plan_architecture(architecture, pretrained)
    else:
        plan = plan_towers(image, text, embed_dim, pretrained)
    _override(plan, quick_gelu, mean, std)
    changes.apply(plan.description)
    if init_logit_scale is not None:
        _initialise_scale(plan, init_logit_scale)
    if tokenizer is not None:
        plan.description.model_cfg["text_cfg"]["hf_tokenizer_name"] = str(resolve_path(tokenizer).resolve())
    model = assemble(
        plan.description,
        build_tokenizer(plan.description, plan.architecture),
        batchnorm=batchnorm,
        timm_weights=plan.image.get("pretrained") is True,
        hugging_face_weights=plan.text.get("pretrained") is True,
    )
    _load_tower_files(model, plan)
    if plan.weights is not None:
        tensors = plan.tensors if plan.tensors is not None else read_weights(plan.weights)
        load_model_weights(model, tensors, str(plan.weights), resize=changes.resize)
    return model


def assemble(
    description: Description,
    tokenize: Tokenizer,
    *,
    batchnorm: BatchNormMode = "frozen",
    timm_weights: bool = False,
    hugging_face_weights: bool = False,
    text_config: PretrainedConfig | None = None,
) -> ContrastiveModel:
    """The model of a description; its towers untrained, unless timm's or the Hugging Face model's own are asked for.

    Args:
        text_config: of the Hugging Face text tower, where its name leads to none.
    """
    model_cfg = deepcopy(description.model_cfg)
    text_tower = model_cfg["text_cfg"].get("hf_model_name")
    if text_tower is not None and text_config is None:
        source = _hugging_face_source(text_tower, "a text tower", ("config.json",))
        model_cfg["text_cfg"]["hf_model_name"] = source
    clip = build_clip(
        model_cfg,
        timm_weights=timm_weights,
        hugging_face_weights=hugging_face_weights,
        text_config=text_config,
    )
    if getattr(clip, "logit_bias", None) is not None:
        # Part of SigLIP's loss only, whoever trains with it thaws it; a parameter without a gradient would stop DDP.
        clip.logit_bias.requires_grad_(False)
    image_size = model_cfg["vision_cfg"].get("image_size", CLIPVisionCfg.image_size)
    description.preprocess_cfg["size"] = image_size
    open_clip.model.set_model_preprocess_cfg(clip, description.preprocess_cfg)
    _check_text_tower(getattr(clip, "text", clip), text_tower, tokenize)
    return ContrastiveModel(clip, description, tokenize, batchnorm)


def load_model_weights(
    model: ContrastiveModel, tensors: Mapping[str, Tensor], source: str, *, resize: bool = False
) -> None:
    """Load weights of a whole model, in any layout that open_clip knows, and refuse those of another architecture.

    Args:
        resize: position embeddings, where the model is for another image size or context length.
    """
    clip = model.clip
    weights = open_clip.convert.convert_state_dict(clip, dict(tensors))
    drop_openai_marks(weights)
    if "positional_embedding" in weights and not hasattr(clip, "positional_embedding"):
        weights = open_clip.model.convert_to_custom_text_state_dict(weights)
    weights.pop("text.transformer.embeddings.position_ids", None)  # a buffer of transformers before 4.31
    if getattr(clip, "logit_bias", None) is not None and "logit_bias" not in weights:
        log.warning("%s has no logit_bias; it begins at %g", source, clip.logit_bias.item())
        weights["logit_bias"] = clip.logit_bias.detach()
    if resize:
        resize_positions(weights, clip, source)
    load_exactly(clip, weights, source)


def _override(
    plan: Plan,
    quick_gelu: bool | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    model_cfg, preprocess_cfg = plan.description.model_cfg, plan.description.preprocess_cfg
    if quick_gelu is not None:
        plan.agree("quick_gelu", quick_gelu, model_cfg.get("quick_gelu", False))
        model_cfg["quick_gelu"] = quick_gelu
    elif _is_untold(plan):
        assumed = model_cfg.get("quick_gelu", False)
        log.warning(
            "%s does not say the activation of its towers; %s is assumed, and model.quick_gelu=%s is the other",
            plan.weights or "a file of a single tower",
            "QuickGELU" if assumed else "GELU",
            "false" if assumed else "true",
        )
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            plan.agree(name, tuple(value), tuple(preprocess_cfg[name]))
            preprocess_cfg[name] = tuple(value)


def _is_untold(plan: Plan) -> bool:
    """Whether the activation of a native tower would be assumed: nothing but tensors, and no name that tells it."""
    cfg = plan.description.model_cfg
    image_file = plan.weights or isinstance(plan.image.get("pretrained"), str)
    text_file = plan.weights or isinstance(plan.text.get("pretrained"), str)
    is_native = (image_file and "timm_model_name" not in cfg["vision_cfg"]) or (
        text_file and "hf_model_name" not in cfg["text_cfg"]
    )
    return bool(is_native) and not plan.tells_training and "quickgelu" not in str(plan.architecture)


def _initialise_scale(plan: Plan, init_logit_scale: float) -> None:
    if not 1 <= init_logit_scale <= 100:
        raise UserError(
            f"init_logit_scale={init_logit_scale} is the factor of the cosines, which training keeps from 1 to 100;"
            " CLIP began at 14.3, SigLIP at 10"
        )
    if plan.weights is not None:
        raise UserError(
            f"init_logit_scale={init_logit_scale} was asked for, but the weights {plan.weights} bring their own "
            "logit_scale; leave one of them out"
        )
    plan.description.model_cfg["init_logit_scale"] = math.log(init_logit_scale)


def _hugging_face_source(name_or_folder: str, what: str, files: Sequence[str]) -> str:
    """A hub name as it is; a folder as an absolute path, since the description may be read from another directory."""
    looks_like_path = name_or_folder.startswith(("package:", "/", ".", "~")) or Path(name_or_folder).is_dir()
    if not looks_like_path:
        return name_or_folder
    folder = resolve_path(name_or_folder).resolve()
    if not any((folder / file).is_file() for file in files):
        raise UserError(f"{folder} has no {' or '.join(files)}; {what}'s folder is one that transformers saved")
    return str(folder)


def build_tokenizer(description: Description, architecture: str | None = None) -> Tokenizer:
    """The tokeniser that a description names, or that open_clip has for one of its architectures."""
    text_cfg = description.model_cfg["text_cfg"]
    context_length = text_cfg.setdefault("context_length", CLIPTextCfg.context_length)
    name = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    options = text_cfg.get("tokenizer_kwargs") or {}
    is_open_clips = architecture is not None and not Path(name or "").is_dir()
    if is_open_clips and (name is not None or "siglip" in architecture.lower()):
        with hub_access(f"the tokeniser of {architecture}", "give its folder: model.tokenizer=/path/to/folder"):
            return built_in_tokenizer(architecture, context_length)
    if name is None:
        return bpe_tokenizer(context_length, **options)
    files = ("tokenizer_config.json", "config.json")
    text_cfg["hf_tokenizer_name"] = _hugging_face_source(name, "a tokeniser", files)
    is_local = Path(text_cfg["hf_tokenizer_name"]).is_dir()
    remedy = "give a local folder with its vocabulary: model.text.hf_tokenizer_name=/path/to/folder"
    with nullcontext() if is_local else hub_access(f"the tokeniser {name}", remedy):
        return hugging_face_tokenizer(text_cfg["hf_tokenizer_name"], context_length, **options)


def _load_tower_files(model: ContrastiveModel, plan: Plan) -> None:
    """Weights of single towers, from files; a tower's projection into the joint space stays as it was initialised."""
    if isinstance(source := plan.image.get("pretrained"), str):
        load = load_by_position if plan.image.get("weights_by_position") else load_exactly
        tower = getattr(model.clip.visual, "trunk", model.clip.visual)
        weights = read_weights(resolve_path(source), torchscript=True)
        resize_timm_positions(weights, tower, source)
        load(tower, weights, source)
    if isinstance(source := plan.text.get("pretrained"), str):
        tower = getattr(model.clip, "text", model.clip).transformer
        load_exactly(tower, read_weights(resolve_path(source)), source)


def _check_text_tower(text_tower: nn.Module, name: str | None, tokenize: Tokenizer) -> None:
    # A Hugging Face tower's context_length is its number of position embeddings, an upper bound.
    if name is not None and tokenize.context_length > text_tower.context_length:
        raise UserError(
            f"context_length={tokenize.context_length} exceeds the {text_tower.context_length} positions of {name}; "
            f"use at most {text_tower.context_length}"
        )
    if tokenize.vocab_size > text_tower.vocab_size:
        raise UserError(
            f"the tokeniser knows {tokenize.vocab_size} tokens, the text tower embeds {text_tower.vocab_size}; "
            "they belong to different models"
        )
