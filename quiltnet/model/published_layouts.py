"""Layouts that models were published in, in the terms of today's open_clip: OpenAI's, and the first QuiltNets'."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip.transform import PreprocessCfg
from torch import Tensor
from transformers import BertConfig

from quiltnet.errors import UserError
from quiltnet.model.contrastive import Description

log = logging.getLogger(__name__)

# Beside its weights OpenAI's model keeps these numbers, which no model of open_clip does.
_OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
# open_clip's names of 2022 -> its names of today, of what follows a Hugging Face text tower.
_OLD_TEXT_KEYS = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}
# Text towers whose published configuration is BERT-base's, transformers' BertConfig as it is; sizes are the weights'.
_BERTS = {
    "bert-base-uncased",
    "google-bert/bert-base-uncased",
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract",
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext",
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext",
}
_BERT = "text.transformer."


def translate_old_keys(text_cfg: dict[str, Any], config: Path) -> None:
    """Rename, in place, keys that QuiltNet-B-16-PMB was published with and open_clip no longer knows; say so."""
    for old, new in _OLD_TEXT_KEYS.items():
        if old not in text_cfg:
            continue
        value = text_cfg.pop(old)
        if text_cfg.setdefault(new, value) != value:
            raise UserError(f"{config}: text_cfg says {old}={value!r} and {new}={text_cfg[new]!r}; remove one of them")
        log.warning("%s: text_cfg.%s is an old name of open_clip's; read as %s=%r", config, old, new, value)


def known_bert(name: str | None, weights: Mapping[str, Tensor]) -> BertConfig | None:
    """The configuration of a BERT-base that is known by its name on the hub, its sizes read off a model's weights.

    So a folder that was published without it loads without the hub. What shapes do not tell (activation, epsilon, 64
    to a head) is BERT-base's. None where the name is of another model, or the weights are.
    """
    rows = f"{_BERT}embeddings.word_embeddings.weight"
    layers = {found[1] for key in weights if (found := re.match(rf"{re.escape(_BERT)}encoder\.layer\.(\d+)\.", key))}
    if name not in _BERTS or rows not in weights or not layers:
        return None
    vocab_size, width = weights[rows].shape
    log.warning("the configuration of %s is not in the folder; BERT-base's is taken, with the weights' sizes", name)
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        intermediate_size=weights[f"{_BERT}encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=weights[f"{_BERT}embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=weights[f"{_BERT}embeddings.token_type_embeddings.weight"].shape[0],
    )


def drop_openai_marks(weights: dict[str, Tensor]) -> None:
    for mark in _OPENAI_MARKS:
        weights.pop(mark, None)


def is_openai(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a model that OpenAI published: QuickGELU, CLIP's preprocessing."""
    return any(mark in weights for mark in _OPENAI_MARKS)


def openai_description(weights: Mapping[str, Tensor]) -> Description:
    """The architecture by the shapes of its tensors, as open_clip's ``build_model_from_openai_state_dict`` finds it.

    Shapes do not tell the number of heads. OpenAI's are all 64 wide.
    """
    text_width = weights["ln_final.weight"].shape[0]
    model_cfg = {
        "embed_dim": weights["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": _vision_cfg(weights),
        "text_cfg": {
            "context_length": weights["positional_embedding"].shape[0],
            "vocab_size": weights["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": _count(r"transformer\.resblocks\.(\d+)\.", weights),
        },
    }
    return Description(model_cfg, asdict(PreprocessCfg()))


def _vision_cfg(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    if "visual.proj" not in weights:
        stages = [_count(rf"visual\.layer{stage}\.(\d+)\.", weights) for stage in range(1, 5)]
        side = round((weights["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        width = weights["visual.layer1.0.conv1.weight"].shape[0]
        return {"image_size": 32 * side, "layers": stages, "width": width, "patch_size": None}
    patch_size = weights["visual.conv1.weight"].shape[-1]
    side = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": patch_size * side,
        "layers": _count(r"visual\.transformer\.resblocks\.(\d+)\.", weights),
        "width": weights["visual.conv1.weight"].shape[0],
        "patch_size": patch_size,
    }


def _count(pattern: str, names: Mapping[str, Tensor]) -> int:
    """How many numbers stand at the pattern's group."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})
