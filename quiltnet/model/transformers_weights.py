"""Tensors of a CLIP model by transformers' names and by open_clip's: one table, read both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TOWERS = {"vision_model": "visual.transformer.resblocks", "text_model": "transformer.resblocks"}
_OF_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj"
}  # fmt: skip
_ELSEWHERE = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
# Linear layers there, products with a matrix in open_clip.
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
# One matrix in open_clip, three there.
_ATTENTION = ("q_proj", "k_proj", "v_proj")


def open_clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' ``CLIPModel`` under the names and in the shapes of ``open_clip.CLIP``.

    Names that are not known stay as they are, for the loading to name them.
    """
    converted: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.endswith("embeddings.position_ids"):  # a buffer of transformers before 4.31
            continue
        layer = re.fullmatch(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            transposed = name in _TRANSPOSED
            converted[_TRANSPOSED.get(name) or _ELSEWHERE.get(name, name)] = tensor.T if transposed else tensor
            continue
        tower, number, part, kind = layer.groups()
        block = f"{_TOWERS[tower]}.{number}"
        if part.removeprefix("self_attn.") in _ATTENTION:
            attention.setdefault(f"{block}.attn.in_proj_{kind}", {})[part.removeprefix("self_attn.")] = tensor
        else:
            converted[f"{block}.{_OF_LAYER.get(part, part)}.{kind}"] = tensor
    for name, parts in attention.items():
        converted[name] = torch.cat([parts[part] for part in _ATTENTION if part in parts])
    return converted


def transformers_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: tensors of ``open_clip.CLIP`` under the names and in the shapes of transformers' ``CLIPModel``.

    Names that are not known stay as they are, for the loading to name them.
    """
    names = {there: name for name, there in _ELSEWHERE.items()}
    transposed = {there: name for name, there in _TRANSPOSED.items()}
    of_layer = {there: part for part, there in _OF_LAYER.items()}
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        # The image tower's prefix holds the text tower's, so the longer one is tried first.
        layer = re.fullmatch(r"(visual\.transformer|transformer)\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        if layer is None:
            converted[transposed.get(name) or names.get(name, name)] = tensor.T if name in transposed else tensor
            continue
        tower, number, part, kind = layer.groups()
        block = f"{'vision_model' if tower.startswith('visual') else 'text_model'}.encoder.layers.{number}"
        if part == "attn.in_proj":
            for kept, third in zip(_ATTENTION, tensor.chunk(3), strict=True):
                converted[f"{block}.self_attn.{kept}.{kind}"] = third
        else:
            converted[f"{block}.{of_layer.get(part, part)}.{kind}"] = tensor
    return converted
