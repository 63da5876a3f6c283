"""Finding captions for images, and images for captions."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.features import (
    EncodesImagesAndText,
    HeldOutPairs,
    encode_captions,
    encode_pair_images,
)
from quiltnet.evaluation.metrics import retrieval_recalls


@dataclass(frozen=True)
class Gallery:
    """The distinct images (M) and captions (C) of N many-to-many pairs, and which belong together.

    Args:
        first_rows: M indices, the row in which each image comes first.
        captions: C captions, each in its first spelling.
        caption_of_row: N lists of indices into captions.
        positives: (P, 2) int64, distinct pairs of an image's and a caption's index.
    """

    first_rows: list[int]
    captions: list[str]
    caption_of_row: list[list[int]]
    positives: Tensor

    def sizes(self) -> dict[str, int]:
        return {"images": len(self.first_rows), "captions": len(self.captions)}

    def recalls(self, image_features: Tensor, text_features: Tensor, ks: Sequence[int]) -> Iterator[tuple[str, float]]:
        """Both directions, for each k that is at most the number of candidates.

        image_features: (N, D), a row a pair; text_features: (C, D), a row a distinct caption. Both of unit
            length.
        """
        image_features = image_features[self.first_rows]  # (M, D)
        for k, recall in retrieval_recalls(image_features, text_features, self.positives, ks).items():
            yield f"image_to_text_recall@{k}", recall
        for k, recall in retrieval_recalls(text_features, image_features, self.positives.flip(1), ks).items():
            yield f"text_to_image_recall@{k}", recall


def build_gallery(image_ids: Sequence[str], captions: Sequence[Sequence[str]]) -> Gallery:
    """Images are the same by id, captions by their text without regard to case, white space and HTML escapes.

    image_ids: N; captions: N, those of each row.
    """
    first_row: dict[str, int] = {}
    spelling: dict[str, str] = {}  # cleaned -> as written
    for row, (image_id, in_row) in enumerate(zip(image_ids, captions, strict=True)):
        first_row.setdefault(image_id, row)
        for caption in in_row:
            spelling.setdefault(_cleaned(caption), caption)
    image_index = {image_id: index for index, image_id in enumerate(first_row)}
    caption_index = {cleaned: index for index, cleaned in enumerate(spelling)}
    caption_of_row = [[caption_index[_cleaned(caption)] for caption in in_row] for in_row in captions]
    positives = {
        (image_index[image_id], caption)
        for image_id, in_row in zip(image_ids, caption_of_row, strict=True)
        for caption in in_row
    }
    return Gallery(list(first_row.values()), list(spelling.values()), caption_of_row, torch.tensor(sorted(positives)))


@dataclass
class Retrieval:
    """Recall@k of a held-out set in both directions, all of it against all of it.

    A pair is not a class: an image's right answers are all its captions, a caption's are all images that
    carry it. An equal similarity counts as a miss. Recall falls as the gallery grows, so compare equal sizes
    only; ``describe`` has them.

    Args:
        pairs: held-out images with their captions.
        ks: a k larger than the gallery is left out.
    """

    pairs: HeldOutPairs
    ks: Sequence[int] = (1, 5, 10, 50)
    batch_size: int = 64
    workers: int = 0
    _sizes: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.ks = tuple(self.ks)
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"ks={list(self.ks)}: give at least one, all 1 or more")
        check_pairs(self.pairs)

    def run(self, model: EncodesImagesAndText) -> Iterator[tuple[str, float]]:  # all ranks
        """image_to_text_recall@k and text_to_image_recall@k."""
        image_features, captions, image_ids = encode_pair_images(
            model, self.pairs, batch_size=self.batch_size, workers=self.workers
        )
        gallery = build_gallery(image_ids, captions)
        self._sizes = gallery.sizes()
        text_features = encode_captions(model, gallery.captions, batch_size=self.batch_size)  # (C, D)
        yield from gallery.recalls(image_features, text_features, self.ks)

    def describe(self) -> dict[str, Any]:
        """JSON types only; the sizes of the gallery are known once ``run`` has read the pairs."""
        return {"pairs": len(self.pairs), "ks": list(self.ks), **self._sizes}


def check_pairs(pairs: HeldOutPairs) -> None:
    """Raises UserError where there is nothing to confuse a pair with."""
    if len(pairs) < 2:
        raise UserError(f"{len(pairs)} held-out pairs: any model finds the right one; give at least two")


def _cleaned(caption: str) -> str:
    """Equal for captions that a tokeniser reads as equal, which are no two candidates."""
    # Twice, as open_clip's tokeniser does: captions from the web come escaped twice.
    unescaped = html.unescape(html.unescape(caption))
    return " ".join(unicodedata.normalize("NFC", unescaped).lower().split())
