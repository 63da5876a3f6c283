"""Finding captions for images, and images for captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.features import HeldOutPairs, PairImages, SetEncoder
from quiltnet.evaluation.gallery import build_gallery
from quiltnet.evaluation.outcome import Outcome

Candidates = Literal["unique", "rows"]


@dataclass
class Retrieval:
    """Recall@k, median rank and mean average precision of a set of pairs in both directions, all against all.

    A pair is not a class: an image's right answers are all its captions, a caption's are all images that carry it, and
    recall@k asks for one of them before k wrong ones. An equal similarity counts as a miss. The rank of a query is one
    more than the wrong candidates ahead of its best right one. A caption that all images share leaves nothing to
    confuse an image with, and is found by definition; ``right_answers`` in the details counts such queries.

    Recall falls as the gallery grows, so compare equal sizes only: they are in the details.

    Args:
        pairs: images with their captions.
        ks: a k larger than the gallery is left out.
        gallery: ``unique`` takes images of one id, and captions of one text, as one candidate; ``rows`` takes every
            row as an image and its captions as candidates of their own, as scores without regard to repeats do.
        gallery_size: images (of ``rows``: rows) to draw, with all their captions; all where not given.
        seed: of that drawing.
    """

    pairs: HeldOutPairs
    ks: Sequence[int] = (1, 5, 10, 50, 200)
    gallery: Candidates = "unique"
    gallery_size: int | None = None
    seed: int = 0
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        self.ks = tuple(self.ks)
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"ks={list(self.ks)}: give at least one, all 1 or more")
        if self.gallery not in get_args(Candidates):
            raise UserError(f"gallery={self.gallery!r} must be one of {', '.join(get_args(Candidates))}")
        check_pairs(self.pairs)
        if self.gallery_size is not None and not 2 <= self.gallery_size <= len(self.pairs):
            raise UserError(
                f"gallery_size={self.gallery_size} of {len(self.pairs)} pairs: give 2 or more, and no more than all"
            )

    @property
    def split(self) -> str:
        return self.pairs.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """Of each direction, image_to_text and text_to_image: _recall@k, _median_rank, _mean_average_precision."""
        pairs = encoder.pairs(self.pairs, batch_size=self.batch_size, workers=self.workers)
        if self.gallery_size is not None:
            pairs = self._drawn(pairs)
        gallery = build_gallery(pairs.image_ids, pairs.captions, every_row=self.gallery == "rows")
        caption_features = encoder.texts(gallery.captions, batch_size=self.batch_size)  # (U, D)
        return gallery.outcome(pairs.image_features, caption_features, self.ks)

    def describe(self) -> dict[str, Any]:
        """Data and choices; JSON types only. The gallery's sizes are in the outcome's details."""
        chosen = {"ks": list(self.ks), "gallery": self.gallery}
        if self.gallery_size is not None:
            chosen |= {"gallery_size": self.gallery_size, "seed": self.seed}
        return {**describe_pairs(self.pairs), **chosen}

    def _drawn(self, pairs: PairImages) -> PairImages:
        """All rows of as many images as the gallery should have, or as many rows."""
        of_row = list(range(len(pairs.image_ids))) if self.gallery == "rows" else pairs.image_ids
        images = list(dict.fromkeys(of_row))
        if self.gallery_size > len(images):
            raise UserError(
                f"gallery_size={self.gallery_size}, but the {len(of_row)} pairs show {len(images)} different images; "
                f"give {len(images)} or less"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        chosen = {images[place] for place in order[: self.gallery_size].tolist()}
        rows = [row for row, image in enumerate(of_row) if image in chosen]
        return PairImages(
            pairs.image_features[rows], [pairs.captions[row] for row in rows], [pairs.image_ids[row] for row in rows]
        )


def check_pairs(pairs: HeldOutPairs) -> None:
    """Raises UserError where there is nothing to confuse a pair with."""
    if len(pairs) < 2:
        raise UserError(f"{len(pairs)} held-out pairs: any model finds the right one; give at least two")


def describe_pairs(pairs: HeldOutPairs) -> dict[str, Any]:
    """How many, for what, and whatever else they say of themselves; JSON types only."""
    own = pairs.describe() if hasattr(pairs, "describe") else {}
    return {"pairs": len(pairs), "split": pairs.split, **own}
