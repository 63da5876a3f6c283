"""Pictures of a report: what a model finds for held-out images and captions, and why it finds them alike.

They show captions and tiles, which may be a patient's: made only where the user asks for it.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.features import HeldOutPairs, SetEncoder
from quiltnet.evaluation.gallery import Gallery, build_gallery
from quiltnet.evaluation.measuring import evaluation_mode
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.release.explaining import explain, overlay

QUERIES, HITS, EXPLAINED = 6, 5, 4
TILE, EXPLAINED_TILE = 128, 224  # pixels of the longer side
JPEG_QUALITY = 80
BATCH = 32


@dataclass(frozen=True)
class Tile:
    """``uri``: a JPEG within the page."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Hit:
    """A candidate: an image by its tile, or a caption. ``is_right``: it belongs to the query."""

    similarity: float
    is_right: bool
    tile: Tile | None = None
    caption: str = ""


@dataclass(frozen=True)
class Query:
    """What was looked for, the most similar candidates, and what would have been right (a caption of an image)."""

    hits: list[Hit]
    tile: Tile | None = None
    caption: str = ""

    @property
    def is_found(self) -> bool:
        return any(hit.is_right for hit in self.hits)


@dataclass(frozen=True)
class Example:
    """A held-out pair: the tile as the model saw it, its relevance, and the words with theirs in [-1, 1]."""

    tile: Tile
    relevance: Tile
    words: list[tuple[str, float]]
    similarity: float


@dataclass(frozen=True)
class Samples:
    """Attributes:
    images, captions: how many candidates the queries looked among.
    notes: why something is missing.
    """

    subject: str
    images: int
    captions: int
    image_queries: list[Query]
    caption_queries: list[Query]
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def absent(cls, subject: str, note: str) -> Samples:
        return cls(subject, 0, 0, [], [], notes=[note])


def make_samples(subject: str, model: ContrastiveModel, pairs: HeldOutPairs) -> Samples:
    """Queries at even distances through the set, good and bad as they come, both ways; relevance of four pairs.

    Args:
        pairs: all are candidates.
    """
    if len(pairs) < 2:
        return Samples.absent(subject, "No samples: with less than two held-out pairs there is nothing to find.")
    with evaluation_mode(model):
        encoder = SetEncoder(model)
        encoded = encoder.pairs(pairs, batch_size=BATCH)
        gallery = build_gallery(encoded.image_ids, encoded.captions)
        image_features = encoded.image_features[gallery.image_rows]  # (M, D)
        caption_features = encoder.texts(gallery.captions, batch_size=BATCH)[gallery.caption_of_text]  # (C, D)
    similarity = image_features.double() @ caption_features.double().T  # (M, C)
    is_right = torch.zeros_like(similarity, dtype=torch.bool)
    is_right[gallery.positives[:, 0], gallery.positives[:, 1]] = True
    tiles = _Tiles(pairs, gallery)
    image_queries = [
        Query(_captions_found(gallery, similarity[image], is_right[image]), tile=tiles[image])
        for image in _spread(len(similarity), QUERIES)
    ]
    caption_queries = [
        Query(_images_found(tiles, similarity[:, text], is_right[:, text]), caption=_caption(gallery, text))
        for text in _spread(similarity.shape[1], QUERIES)
    ]
    examples, notes = _examples(model, pairs)
    return Samples(subject, *similarity.shape, image_queries, caption_queries, examples, notes)


class _Tiles:
    """Small pictures of the gallery's images, each made once."""

    def __init__(self, pairs: HeldOutPairs, gallery: Gallery) -> None:
        self._pairs = pairs
        self._gallery = gallery
        self._made: dict[int, Tile] = {}

    def __getitem__(self, image: int) -> Tile:
        if image not in self._made:
            self._made[image] = _tile(self._pairs[self._gallery.image_rows[image]][0], TILE)
        return self._made[image]


def _captions_found(gallery: Gallery, similarity: Tensor, is_right: Tensor) -> list[Hit]:
    """similarity, is_right: (C,)."""
    values, texts = similarity.topk(min(HITS, len(similarity)))
    return [
        Hit(value, bool(is_right[text]), caption=_caption(gallery, text))
        for value, text in zip(values.tolist(), texts.tolist(), strict=True)
    ]


def _images_found(tiles: _Tiles, similarity: Tensor, is_right: Tensor) -> list[Hit]:
    """similarity, is_right: (M,)."""
    values, images = similarity.topk(min(HITS, len(similarity)))
    return [
        Hit(value, bool(is_right[image]), tile=tiles[image])
        for value, image in zip(values.tolist(), images.tolist(), strict=True)
    ]


def _caption(gallery: Gallery, text: int) -> str:
    return gallery.captions[gallery.caption_of_text[text]]


def _examples(model: ContrastiveModel, pairs: HeldOutPairs) -> tuple[list[Example], list[str]]:
    examples = []
    for number in _spread(len(pairs), EXPLAINED):
        image, captions, _ = pairs[number]
        try:
            found = explain(model, image, captions[0])
        except UserError as error:
            return [], [f"No relevance examples: {error}."]
        pictures = (_tile(picture, EXPLAINED_TILE) for picture in (found.image, overlay(found)))
        examples.append(Example(*pictures, found.words, found.similarity))
    return examples, []


def _spread(count: int, wanted: int) -> list[int]:
    """At most so many numbers below ``count``, at even distances."""
    wanted = min(count, wanted)
    return [int((number + 0.5) * count / wanted) for number in range(wanted)]


def _tile(image: Image.Image, longest: int) -> Tile:
    small = image.convert("RGB")
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return Tile(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", *small.size)
