"""An export in the layout of transformers' ``CLIPModel``, and what transformers makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.transformers_clip import WEIGHTS_NAMES
from quiltnet.model.transformers_weights import transformers_weights
from quiltnet.release.comparison import (
    HALF_LIMIT,
    LIMIT,
    RESIZING_LIMIT,
    Comparison,
    NotEqual,
    Reference,
    largest_difference,
)
from quiltnet.release.tokenizer_files import write_tokenizer
from quiltnet.release.transformers_layout import image_processor, transformers_config
from quiltnet.whole_files import as_any_file

LIBRARY = "transformers"
_TEXT_PREFIX = "text."  # of open_clip's CustomTextCLIP, whose text tower is a module of its own
_TEXT_FACTOR = ("logit_scale", "logit_bias")


def write_transformers(model: ContrastiveModel, folder: Path, *, half: bool = False) -> None:
    """``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and the tokeniser's files."""
    dtype = torch.float16 if half else torch.float32
    config = transformers_config(model)
    config.dtype = dtype
    config.save_pretrained(folder)
    image_processor(model).save_pretrained(folder)
    write_tokenizer(model.tokenize, folder)
    own = {name.removeprefix(_TEXT_PREFIX): tensor for name, tensor in model.clip.state_dict().items()}
    own.pop("logit_bias", None)  # in config.json
    # Halves, thirds and transposed matrices are views, which safetensors does not write.
    weights = {name: tensor.to(dtype).clone().contiguous() for name, tensor in transformers_weights(own).items()}
    save_file(weights, folder / WEIGHTS_NAMES[0], metadata={"format": "pt"})
    as_any_file(folder / WEIGHTS_NAMES[0])


@torch.no_grad()
def compare_with_transformers(reference: Reference, folder: Path) -> list[Comparison]:
    """Embeddings and pixels of transformers' reload of ``folder``, in the dtype of its weights.

    Raises:
        NotEqual: missing or left over tensors, other tokens, another ``logit_scale``.
    """
    theirs = _reload(folder)
    limit = LIMIT if theirs.dtype == torch.float32 else HALF_LIMIT
    reference.check_scale(LIBRARY, theirs.logit_scale.item())
    tokenizer = CLIPProcessor.from_pretrained(folder, local_files_only=True).tokenizer
    tokens = tokenizer(list(reference.captions), padding=True, truncation=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    reference.check_ids(LIBRARY, [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)])
    text_features = _pooled(theirs.get_text_features(**tokens))

    def embeddings(pixels: Tensor) -> float:
        image_features = _pooled(theirs.get_image_features(pixel_values=pixels.to(theirs.dtype)))
        return reference.features_difference(image_features, text_features)

    of_pillow = _pixels(folder, reference.images, backend="pil")
    by_default = _pixels(folder, reference.images)
    return [
        Comparison(LIBRARY, embeddings(reference.pixels), limit, "embeddings"),
        Comparison(LIBRARY, largest_difference(reference.pixels, of_pillow), LIMIT, "pixels, backend=pil"),
        Comparison(LIBRARY, embeddings(by_default), max(limit, RESIZING_LIMIT), "embeddings, default processor"),
    ]


def _reload(folder: Path) -> CLIPModel:
    theirs, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = sorted(str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key])
    if wrong:
        raise NotEqual(f"{LIBRARY} finds other tensors than its CLIPModel has: {', '.join(wrong[:6])}")
    return theirs.eval()


def _pixels(folder: Path, images: Sequence[Image.Image], **options: str) -> Tensor:
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True, **options).image_processor
    return processor(list(images), return_tensors="pt")["pixel_values"]


def _pooled(output: Any) -> Tensor:
    """transformers 5 gives a tower's whole output, whose pooled part is the projected one; 4 gave that alone."""
    return getattr(output, "pooler_output", output)
