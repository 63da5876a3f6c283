"""A CLIP model in the layout of transformers, as PLIP and QuiltNet are on the hub -> our own."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor
from transformers import CLIPConfig

from quiltnet.errors import UserError
from quiltnet.model.assembly import assemble, load_model_weights
from quiltnet.model.changes import Changes
from quiltnet.model.contrastive import ContrastiveModel, Description
from quiltnet.model.tokenizer import Tokenizer, bpe_tokenizer, hugging_face_tokenizer
from quiltnet.model.transformers_weights import open_clip_weights
from quiltnet.model.weights import described_by, read_weights

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
ARCHITECTURE = "CLIPModel"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
PREPROCESSING_NAMES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_NAMES = ("tokenizer.json", "vocab.json")
OWN_VOCABULARY = 49408  # of CLIP's byte-pair encoding, which is in open_clip's wheel
# The end token that transformers wrote into configurations before 4.31; there it takes the token of the highest id.
LEGACY_END_ID = 2
# Ours in config.json: the bias of a model trained by SigLIP's loss, which CLIPModel has no place for.
LOGIT_BIAS_KEY = "init_logit_bias"
PILLOW_BILINEAR, PILLOW_BICUBIC = 2, 3
INTERPOLATIONS = {PILLOW_BILINEAR: "bilinear", PILLOW_BICUBIC: "bicubic"}


def is_transformers_clip(folder: Path) -> bool:
    """Whether a folder holds a ``config.json`` of transformers' ``CLIPModel``."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    named = config.get("architectures") if isinstance(config, dict) else None
    return isinstance(named, list) and ARCHITECTURE in named


def load_transformers_clip(folder: Path, *, changes: Changes | None = None) -> ContrastiveModel:
    """The model of a folder that transformers' ``CLIPModel`` and its processor were saved to.

    Read are ``config.json``, ``model.safetensors`` (or a pickle of nothing but tensors), the tokeniser's files and
    ``preprocessor_config.json``.

    Raises:
        UserError: a part is missing, or is such that open_clip has no equal for it.
    """
    config = _read_config(folder)
    changes = changes or Changes()
    with described_by(folder):
        model_cfg = {
            "embed_dim": config.projection_dim,
            "quick_gelu": _quick_gelu(config, folder),
            "vision_cfg": _vision_cfg(config.vision_config, folder),
            "text_cfg": _text_cfg(config.text_config),
        }
        weights = open_clip_weights(_read_weights(folder))
        if (bias := getattr(config, LOGIT_BIAS_KEY, None)) is not None:
            model_cfg[LOGIT_BIAS_KEY] = bias
            weights["logit_bias"] = torch.tensor(float(bias))
        _check_patch_size(folder, config, weights)
        description = Description(model_cfg, _preprocess_cfg(folder, model_cfg["vision_cfg"]["image_size"]))
        changes.apply(description)
        tokenize = _tokenizer(folder, model_cfg["text_cfg"])
        model = assemble(description, tokenize, batchnorm=changes.batchnorm)
    load_model_weights(model, weights, str(folder), resize=changes.resize)
    return model


def _read_config(folder: Path) -> CLIPConfig:
    try:
        return CLIPConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers has no type of its own for what is wrong in a configuration
        raise UserError(
            f"{folder / CONFIG_NAME} is no configuration of a {ARCHITECTURE} ({type(error).__name__}: {error})"
        ) from error


def _check_patch_size(folder: Path, config: CLIPConfig, weights: Mapping[str, Tensor]) -> None:
    """QuiltNet-B-16 was published with the patch size of QuiltNet-B-32 in its config.json."""
    stated = config.vision_config.patch_size
    kernel = weights.get("visual.conv1.weight")
    if kernel is None or {stated} == set(kernel.shape[-2:]):
        return
    actual = kernel.shape[-1]
    raise UserError(
        f"{folder / CONFIG_NAME} says patch_size {stated}, but the weights beside it have patches of {actual} pixels "
        f"(visual.conv1.weight {tuple(kernel.shape)}), as QuiltNet-B-16 was published; open_clip's files of the "
        "same repository (open_clip_config.json, open_clip_pytorch_model.bin) are right and are taken where they lie "
        f'in the folder too; or write "patch_size": {actual} into vision_config of {CONFIG_NAME}'
    )


def _quick_gelu(config: CLIPConfig, folder: Path) -> bool:
    activations = config.vision_config.hidden_act, config.text_config.hidden_act
    if activations not in (("gelu", "gelu"), ("quick_gelu", "quick_gelu")):
        raise UserError(
            f"{folder / CONFIG_NAME}: the towers have the activations {' and '.join(activations)}; "
            "open_clip has gelu or quick_gelu, the same for both"
        )
    return activations[0] == "quick_gelu"


def _vision_cfg(config: Any, folder: Path) -> dict[str, Any]:
    if config.num_channels != 3:
        raise UserError(f"{folder / CONFIG_NAME}: images of {config.num_channels} channels; only RGB is read")
    return {
        "image_size": _side(config.image_size),
        "patch_size": _side(config.patch_size),
        "head_width": config.hidden_size // config.num_attention_heads,
        **_transformer_cfg(config),
    }


def _text_cfg(config: Any) -> dict[str, Any]:
    pooling = {"pool_type": "argmax"}
    if config.eos_token_id != LEGACY_END_ID:
        pooling = {"pool_type": "eos", "eos_id": config.eos_token_id}
    return {
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "heads": config.num_attention_heads,
        **pooling,
        **_transformer_cfg(config),
    }


def _transformer_cfg(config: Any) -> dict[str, Any]:
    """What both towers have; open_clip's defaults are left out, as in its own configurations."""
    cfg: dict[str, Any] = {"layers": config.num_hidden_layers, "width": config.hidden_size}
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) < config.intermediate_size:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    if ratio != 4:
        cfg["mlp_ratio"] = ratio
    if config.layer_norm_eps != 1e-5:
        cfg["norm_kwargs"] = {"eps": config.layer_norm_eps}
    return cfg


def _side(size: int | Sequence[int]) -> int | tuple[int, ...]:
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else tuple(size)


def _preprocess_cfg(folder: Path, image_size: int | tuple[int, ...]) -> dict[str, Any]:
    """What ``CLIPImageProcessor`` does, in open_clip's terms; its defaults are those of CLIP."""
    place, stated = _read_preprocessing(folder)
    size, crop_size = stated.get("size", image_size), stated.get("crop_size", image_size)
    is_squashed = isinstance(size, dict) and "shortest_edge" not in size
    is_cropped = stated.get("do_center_crop", True)
    sides = _sides(size) | (_sides(crop_size) if is_cropped else set())
    if sides != {image_size} or not (is_cropped or is_squashed) or not stated.get("do_resize", True):
        raise UserError(
            f"{place}: size {size}, {f'crop_size {crop_size}' if is_cropped else 'no crop'} is not what open_clip's "
            f"transform does with images of {image_size} pixels: resize the shorter side to that and crop to the same"
        )
    interpolation = INTERPOLATIONS.get(stated.get("resample", PILLOW_BICUBIC))
    if interpolation is None:
        raise UserError(f"{place}: resample must be one of {INTERPOLATIONS}, not {stated['resample']}")
    if not stated.get("do_rescale", True) or not math.isclose(255 * stated.get("rescale_factor", 1 / 255), 1):
        raise UserError(f"{place}: pixels must be divided by 255, by do_rescale and rescale_factor")
    is_normalised = stated.get("do_normalize", True)
    return {
        **asdict(PreprocessCfg()),
        "size": image_size,
        "mean": tuple(stated.get("image_mean", PreprocessCfg.mean)) if is_normalised else (0.0, 0.0, 0.0),
        "std": tuple(stated.get("image_std", PreprocessCfg.std)) if is_normalised else (1.0, 1.0, 1.0),
        "interpolation": interpolation,
        "resize_mode": "squash" if is_squashed else "shortest",
    }


def _sides(size: int | Sequence[int] | Mapping[str, int]) -> set[int]:
    if isinstance(size, Mapping):
        return {side for key, side in size.items() if key in ("shortest_edge", "height", "width") and side is not None}
    return {size} if isinstance(size, int) else set(size)


def _read_preprocessing(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that states it, and what it states. transformers 5 has it inside the processor's configuration."""
    for name in PREPROCESSING_NAMES:
        place = folder / name
        if place.is_file():
            try:
                stated = json.loads(place.read_bytes())
            except ValueError as error:
                raise UserError(f"{place} is no JSON ({error})") from error
            stated = stated.get("image_processor", stated)
            if "size" in stated:
                return place, stated
    raise UserError(
        f"{folder} does not say how images are resized and normalised; it should contain {PREPROCESSING_NAMES[0]}"
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return read_weights(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():  # in several files
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if outside := [file for file in files if Path(file).name != file]:
                raise UserError(f"{index} names {outside[0]}; weights lie beside it: get the folder anew")
            return {key: tensor for file in files for key, tensor in read_weights(folder / file).items()}
    raise UserError(f"{folder} holds no weights; it should contain one of {', '.join(WEIGHTS_NAMES)}")


def _tokenizer(folder: Path, text_cfg: dict[str, Any]) -> Tokenizer:
    context_length = text_cfg["context_length"]
    if any((folder / name).is_file() for name in TOKENIZER_NAMES):
        text_cfg["hf_tokenizer_name"] = str(folder.resolve())
        return hugging_face_tokenizer(text_cfg["hf_tokenizer_name"], context_length)
    if text_cfg["vocab_size"] == OWN_VOCABULARY:
        log.warning("%s has no tokeniser; CLIP's own is taken, which has as many tokens as its text tower", folder)
        return bpe_tokenizer(context_length)
    raise UserError(f"{folder} has no tokeniser; it should contain one of {', '.join(TOKENIZER_NAMES)}")
