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
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, resize_pos_embed, resize_text_pos_embed
from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.architecture import Plan, plan_architecture, plan_towers
from quiltnet.model.contrastive import BatchNormMode, ContrastiveModel, Description
from quiltnet.model.folder import find_weights, read_description
from quiltnet.model.tokenizer import Tokenizer, bpe_tokenizer, built_in_tokenizer, hugging_face_tokenizer
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
    batchnorm: BatchNormMode = "frozen",
) -> ContrastiveModel:
    """Build a model by open_clip's name, or out of two towers, and load what ``pretrained`` names.

    Args:
        architecture: one of ``open_clip.list_models()``; excludes ``image`` and ``text``.
        pretrained: weights of the whole model: an open_clip tag (needs the hub), a file, or an open_clip folder.
        image: the image tower: keys of open_clip's ``CLIPVisionCfg``, or ``architecture`` to take an open_clip
            model's; ``pretrained`` is false, true (timm's own weights, needs the hub) or a path, and
            ``weights_by_position`` matches tensors by order where names differ.
        text: the text tower: keys of ``CLIPTextCfg`` (``hf_model_name``: hub name, folder or ``package:…``), or
            ``architecture``; ``pretrained`` is false, true (the Hugging Face model's own) or a path.
        embed_dim: D, for two towers.
        image_size, context_length: override the architecture's; position embeddings of ``pretrained`` are resized.
        quick_gelu: activation of native towers; by default that of the weights.
        mean, std: per channel; by default those of the weights or of the timm tower.
        init_logit_scale: the factor itself, not its logarithm; by default open_clip's 1 / 0.07. SigLIP began at 10.
            Weights of the whole model bring their own.
        init_logit_bias: give the model the bias that SigLIP's loss adds, with this value (-10 in Zhai et al. 2023)
            unless the weights bring one.
        batchnorm: ``frozen`` keeps pretrained statistics in training, ``train`` updates them.

    Raises:
        UserError: unknown names (with the nearest), weights of another architecture, activation or normalisation
            (with both sides), a hub that cannot be reached (with the file to give instead).
    """
    if batchnorm not in ("frozen", "train"):
        raise UserError(f"batchnorm={batchnorm!r}: choose 'frozen' or 'train'")
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
    _override(plan, image_size, context_length, quick_gelu, mean, std)
    _initialise_logits(plan, init_logit_scale, init_logit_bias)
    model = assemble(
        plan.description,
        _tokenizer(plan),
        batchnorm=batchnorm,
        timm_weights=plan.image.get("pretrained") is True,
        hugging_face_weights=plan.text.get("pretrained") is True,
    )
    _load_tower_files(model, plan)
    if plan.weights is not None:
        resized = image_size is not None or context_length is not None
        load_model_weights(model, plan.weights, resize_positions=resized)
    return model


def load_folder(
    folder: str | Path, *, weights: str | Path | None = None, batchnorm: BatchNormMode = "frozen"
) -> ContrastiveModel:
    """The model of a folder in open_clip's layout, with the folder's weights or those of another file."""
    folder = resolve_path(str(folder))
    plan = Plan(read_description(folder))
    model = assemble(plan.description, _tokenizer(plan), batchnorm=batchnorm)
    load_model_weights(model, Path(weights) if weights else find_weights(folder))
    return model


def assemble(
    description: Description,
    tokenize: Tokenizer,
    *,
    batchnorm: BatchNormMode = "frozen",
    timm_weights: bool = False,
    hugging_face_weights: bool = False,
) -> ContrastiveModel:
    """The model of a description; its towers untrained, unless timm's or the Hugging Face model's own are asked for."""
    model_cfg = deepcopy(description.model_cfg)
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if "multimodal_cfg" in model_cfg:
        raise UserError("CoCa models have a captioning decoder that is not trained here; choose a CLIP architecture")
    text_tower = text_cfg.get("hf_model_name")
    custom_text = model_cfg.pop("custom_text", False) or text_tower is not None
    vision_cfg["timm_model_pretrained"] = timm_weights
    text_cfg["hf_model_pretrained"] = hugging_face_weights
    if text_tower is not None:
        text_cfg["hf_model_name"] = _hugging_face_source(text_tower, "a text tower", ("config.json",))
    model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    names_hub = timm_weights or (text_tower is not None and not Path(text_cfg["hf_model_name"]).is_dir())
    access = hub_access(
        f"the towers {vision_cfg.get('timm_model_name', 'of open_clip')} and {text_tower or 'of open_clip'}",
        "give local files instead: model.image.pretrained=/path/to/weights, model.text.hf_model_name=/path/to/folder "
        "(config.json, vocabulary, model.safetensors)",
    )
    with access if names_hub else nullcontext():
        clip = model_class(**model_cfg)
    if getattr(clip, "logit_bias", None) is not None:
        # Part of SigLIP's loss only, whoever trains with it thaws it; a parameter without a gradient would stop DDP.
        clip.logit_bias.requires_grad_(False)
    image_size = vision_cfg.get("image_size", CLIPVisionCfg.image_size)
    _fit_image_size(clip, image_size)
    description.preprocess_cfg["size"] = image_size
    open_clip.model.set_model_preprocess_cfg(clip, description.preprocess_cfg)
    _check_text_tower(getattr(clip, "text", clip), text_tower, tokenize)
    return ContrastiveModel(clip, description, tokenize, batchnorm)


def load_model_weights(model: ContrastiveModel, path: Path, *, resize_positions: bool = False) -> None:
    """Load weights of a whole model, in any layout that open_clip knows, and refuse those of another architecture."""
    clip = model.clip
    weights = open_clip.convert.convert_state_dict(clip, read_weights(path))
    if "positional_embedding" in weights and not hasattr(clip, "positional_embedding"):
        weights = open_clip.model.convert_to_custom_text_state_dict(weights)
    weights.pop("text.transformer.embeddings.position_ids", None)  # a buffer of transformers before 4.31
    if getattr(clip, "logit_bias", None) is not None and "logit_bias" not in weights:
        log.warning("%s has no logit_bias; it begins at %g", path, clip.logit_bias.item())
        weights["logit_bias"] = clip.logit_bias.detach()
    if resize_positions:
        log.warning("position embeddings of %s are resized where the image size or context length differ", path)
        resize_pos_embed(weights, clip)
        resize_text_pos_embed(weights, clip)
    load_exactly(clip, weights, str(path))


def _override(
    plan: Plan,
    image_size: int | None,
    context_length: int | None,
    quick_gelu: bool | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    model_cfg, preprocess_cfg = plan.description.model_cfg, plan.description.preprocess_cfg
    if quick_gelu is not None:
        plan.agree("quick_gelu", quick_gelu, model_cfg.get("quick_gelu", False))
        model_cfg["quick_gelu"] = quick_gelu
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            plan.agree(name, tuple(value), tuple(preprocess_cfg[name]))
            preprocess_cfg[name] = tuple(value)
    if image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        model_cfg["text_cfg"]["context_length"] = context_length


def _initialise_logits(plan: Plan, init_logit_scale: float | None, init_logit_bias: float | None) -> None:
    if init_logit_scale is not None:
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
    if init_logit_bias is not None:
        plan.description.model_cfg["init_logit_bias"] = init_logit_bias


def _hugging_face_source(name_or_folder: str, what: str, files: Sequence[str]) -> str:
    """A hub name as it is; a folder as an absolute path, since the description may be read from another directory."""
    looks_like_path = name_or_folder.startswith(("package:", "/", ".", "~")) or Path(name_or_folder).is_dir()
    if not looks_like_path:
        return name_or_folder
    folder = resolve_path(name_or_folder).resolve()
    if not any((folder / file).is_file() for file in files):
        raise UserError(f"{folder} has no {' or '.join(files)}; {what}'s folder is one that transformers saved")
    return str(folder)


def _tokenizer(plan: Plan) -> Tokenizer:
    text_cfg = plan.description.model_cfg["text_cfg"]
    context_length = text_cfg.setdefault("context_length", CLIPTextCfg.context_length)
    remedy = "give a local folder with its vocabulary: model.text.hf_tokenizer_name=/path/to/folder"
    name = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    options = text_cfg.get("tokenizer_kwargs") or {}
    if plan.architecture is not None and (name is not None or "siglip" in plan.architecture.lower()):
        with hub_access(f"the tokeniser of {plan.architecture}", remedy):
            return built_in_tokenizer(plan.architecture, context_length)
    if name is None:
        return bpe_tokenizer(context_length, **options)
    files = ("tokenizer_config.json", "config.json")
    text_cfg["hf_tokenizer_name"] = _hugging_face_source(name, "a tokeniser", files)
    is_local = Path(text_cfg["hf_tokenizer_name"]).is_dir()
    with nullcontext() if is_local else hub_access(f"the tokeniser {name}", remedy):
        return hugging_face_tokenizer(text_cfg["hf_tokenizer_name"], context_length, **options)


def _load_tower_files(model: ContrastiveModel, plan: Plan) -> None:
    """Weights of single towers, from files; a tower's projection into the joint space stays as it was initialised."""
    if isinstance(source := plan.image.get("pretrained"), str):
        load = load_by_position if plan.image.get("weights_by_position") else load_exactly
        tower = getattr(model.clip.visual, "trunk", model.clip.visual)
        load(tower, read_weights(resolve_path(source)), source)
    if isinstance(source := plan.text.get("pretrained"), str):
        tower = getattr(model.clip, "text", model.clip).transformer
        load_exactly(tower, read_weights(resolve_path(source)), source)


def _fit_image_size(clip: nn.Module, image_size: int) -> None:
    """timm vision transformers are built at their own size whatever the config says; set it, or say so."""
    trunk = getattr(clip.visual, "trunk", None)
    built_size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if built_size is not None and tuple(built_size) != (image_size, image_size):
        try:
            clip.visual.set_input_size(image_size)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise UserError(f"image_size={image_size} does not suit this timm tower ({error})") from error


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
