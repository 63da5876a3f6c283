"""Why a model finds an image and a text similar, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.relevance import relevance


@dataclass(frozen=True)
class Explanation:
    """Where the similarity of an image and a text comes from.

    Attributes:
        image: as the image tower saw it, scaled and cut.
        similarity: the cosine of the two.
        image_map: (H, W) float32 in [0, 1], relevance of each pixel of ``image``.
        words: the caption's pieces as the tokeniser cuts them, each with its relevance: the largest is 1 (or -1, or all
            are 0). Scores below 0, for words that speak against the image, only come from text towers whose attention
            cannot be read.
    """

    image: Image.Image
    text: str
    similarity: float
    image_map: np.ndarray
    words: list[tuple[str, float]]


def explain(model: ContrastiveModel, image: Image.Image, text: str) -> Explanation:
    """Relevance of places and of words for the similarity (see ``quiltnet.model.relevance``).

    Raises:
        UserError: a text without a token, an image tower for which no method is known.
    """
    pieces = model.tokenize.pieces(text)
    if not any(piece is not None for piece in pieces):
        raise UserError(f"the text {text!r} has no token but those that the tokeniser adds; say something of the image")
    pixels = model.transform(image)
    found = relevance(model, pixels[None], model.batch_tokenizer()([text])[0])
    places = [place for place, piece in enumerate(pieces) if piece is not None]
    scores = found.token_scores[places]
    largest = scores.abs().max()
    scores = scores / largest if largest > 0 else torch.zeros_like(scores)
    words = [(pieces[place], score) for place, score in zip(places, scores.tolist(), strict=True)]
    return Explanation(_as_seen(model, pixels), text, found.similarity, found.image_map.numpy(), words)


def overlay(explanation: Explanation) -> Image.Image:
    """The image under its relevance map, half and half, in the colours of ``jet``."""
    mixed = 0.5 * 255 * jet(explanation.image_map) + 0.5 * np.asarray(explanation.image, np.float32)
    return Image.fromarray(mixed.round().astype(np.uint8))


def jet(values: np.ndarray) -> np.ndarray:
    """The colours of that name: (...) in [0, 1] -> (..., 3) red, green, blue in [0, 1]; 0 is blue and 1 is red."""
    red_green_blue = np.array([3, 2, 1], np.float32)
    return (1.5 - np.abs(4 * values[..., None] - red_green_blue)).clip(0, 1)


def _as_seen(model: ContrastiveModel, pixels: Tensor) -> Image.Image:
    """(3, H, W) from the model's transform -> a picture."""
    mean, std = (torch.tensor(model.description.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    levels = ((pixels * std + mean) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
