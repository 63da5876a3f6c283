"""Which images and captions are looked for among which, who belongs to whom, and how well they are found."""

from __future__ import annotations

import hashlib
import html
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.retrieval_metrics import Ranks, medians, retrieval_ranks

MAX_POSITIVES = 50_000_000  # 16 bytes each, and some more while they are sorted


@dataclass(frozen=True, eq=False)
class Gallery:
    """M images and C captions, all of them queries in one direction and candidates in the other.

    Attributes:
        image_rows: M, the row of the pairs that each image is of.
        image_ids: M.
        captions: the U distinct captions, each in its first spelling.
        caption_of_text: (C,) int64, indices into captions.
        id_of_text: C, the image that each caption comes with first.
        caption_of_row: N lists of indices into captions, those of each row of the pairs.
        positives: (P, 2) int64, distinct pairs of an image's and a caption's place among M and C.
    """

    image_rows: list[int]
    image_ids: list[str]
    captions: list[str]
    caption_of_text: Tensor
    id_of_text: list[str]
    caption_of_row: list[list[int]]
    positives: Tensor

    def sizes(self) -> dict[str, int]:
        return {"images": len(self.image_rows), "captions": len(self.caption_of_text)}

    def sha256(self) -> str:
        """Of all queries and candidates in their order, and of who belongs together."""
        digest = hashlib.sha256()
        texts = [self.captions[index] for index in self.caption_of_text.tolist()]
        for line in [*self.image_ids, *map(" ".join, zip(self.id_of_text, texts, strict=True))]:
            digest.update(f"{line}\n".encode())
        digest.update(self.positives.numpy().tobytes())
        return digest.hexdigest()

    def outcome(
        self, image_features: Tensor, caption_features: Tensor, ks: Sequence[int], resamples: int = 1000
    ) -> Outcome:
        """Recall at each k, median rank and mean average precision, of both directions.

        Resamples are of queries, before the same candidates: of whole images with all their rows, of captions
        together with the others that come with the same image.

        image_features: (N, D), a row a pair; caption_features: (U, D), a row a distinct caption. Both of unit length.
        """
        ranks = retrieval_ranks(image_features[self.image_rows], caption_features[self.caption_of_text], self.positives)
        directions = {"image_to_text": (ranks[0], self.image_ids), "text_to_image": (ranks[1], self.id_of_text)}
        scores: dict[str, float] = {}
        replicates: dict[str, Tensor] = {}
        undefined: dict[str, str] = {}
        answers = {}
        for direction, (of_queries, groups) in directions.items():
            every_query, drawn = _scores(of_queries, ks, groups, resamples)
            scores |= {f"{direction}_{metric}": value.item() for metric, value in every_query.items()}
            replicates |= {f"{direction}_{metric}": values for metric, values in drawn.items()}
            reason = f"there are no more than {of_queries.candidates} candidates"
            undefined |= {f"{direction}_recall@{k}": reason for k in ks if k > of_queries.candidates}
            answers[direction] = _answers(of_queries)
        details = {"gallery": self.sizes(), "right_answers": answers, "undefined": undefined}
        return Outcome(scores, replicates, details, items=self.sha256())


def build_gallery(image_ids: Sequence[str], captions: Sequence[Sequence[str]], every_row: bool = False) -> Gallery:
    """Images are the same by id, captions by their text without regard to case, white space and HTML escapes.

    Args:
        image_ids: N.
        captions: N, those of each row.
        every_row: every row is another image, and its captions other candidates, than those of the rows before. What
            is right is decided by id and text all the same.

    Raises:
        UserError: a row without a caption, or with an empty one; more than 50 million right answers.
    """
    _check_captions(image_ids, captions)
    spelling: dict[str, str] = {}  # cleaned -> as written
    caption_of_row = []
    for in_row in captions:
        cleaned = [_cleaned(caption) for caption in in_row]
        for key, caption in zip(cleaned, in_row, strict=True):
            spelling.setdefault(key, caption)
        caption_of_row.append(cleaned)
    index_of = {key: index for index, key in enumerate(spelling)}
    caption_of_row = [[index_of[key] for key in cleaned] for cleaned in caption_of_row]

    image_rows = list(range(len(image_ids))) if every_row else _first_rows(image_ids)
    texts = [(caption, row) for row, in_row in enumerate(caption_of_row) for caption in dict.fromkeys(in_row)]
    if not every_row:
        texts = [texts[first] for first in _first_rows([caption for caption, _ in texts])]
    return Gallery(
        image_rows=image_rows,
        image_ids=[image_ids[row] for row in image_rows],
        captions=list(spelling.values()),
        caption_of_text=torch.tensor([caption for caption, _ in texts]),
        id_of_text=[image_ids[row] for _, row in texts],
        caption_of_row=caption_of_row,
        positives=_positives(image_ids, caption_of_row, image_rows, [caption for caption, _ in texts]),
    )


def _positives(
    image_ids: Sequence[str], caption_of_row: list[list[int]], image_rows: list[int], texts: list[int]
) -> Tensor:
    """All pairs of places (P, 2) whose image id has the caption in any row, ascending."""
    belong = {(image_ids[row], caption) for row, in_row in enumerate(caption_of_row) for caption in in_row}
    places_of_image, places_of_caption = defaultdict(list), defaultdict(list)
    for place, row in enumerate(image_rows):
        places_of_image[image_ids[row]].append(place)
    for place, caption in enumerate(texts):
        places_of_caption[caption].append(place)
    count = sum(len(places_of_image[image_id]) * len(places_of_caption[caption]) for image_id, caption in belong)
    if count > MAX_POSITIVES:
        raise UserError(
            f"{count} pairs of an image and a caption would be right, more than {MAX_POSITIVES}: the same captions "
            "come again and again; take equal images and captions as one (gallery: unique), or draw fewer "
            "(gallery_size)"
        )
    pairs = (product(places_of_image[image_id], places_of_caption[caption]) for image_id, caption in belong)
    return torch.tensor(sorted(pair for places in pairs for pair in places))


def _scores(
    ranks: Ranks, ks: Sequence[int], groups: Sequence[str], resamples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """metric -> its value (1,) of all queries, and its values (R,) of resamples."""
    ahead = ranks.best()  # (Q,)
    ks = [k for k in ks if k <= ranks.candidates]
    names = [*(f"recall@{k}" for k in ks), "mean_average_precision"]
    of_queries = torch.stack([*((ahead < k).double() for k in ks), ranks.average_precision()], dim=1)  # (Q, metrics)

    def of(counts: Tensor) -> Tensor:
        counts = counts.double()
        means = counts @ of_queries / counts.sum(dim=1, keepdim=True)
        return torch.cat([means, medians(ahead + 1, counts)[:, None]], dim=1)

    drawn = torch.cat([of(counts) for counts in Resamples(len(ahead), groups=groups, count=resamples).counts()])
    names.append("median_rank")
    every_query = of(torch.ones(1, len(ahead)))
    return dict(zip(names, every_query.T, strict=True)), dict(zip(names, drawn.T.contiguous(), strict=True))


def _answers(ranks: Ranks) -> dict[str, Any]:
    """What of a recall is owed to the set: the more answers are right, the easier the question."""
    right = ranks.right_answers()
    return {
        "mean": right.double().mean().item(),
        "most": right.max().item(),
        "queries_without_a_wrong_answer": int((right == ranks.candidates).sum()),
    }


def _check_captions(image_ids: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
    bare = [
        image_id
        for image_id, in_row in zip(image_ids, captions, strict=True)
        if not in_row or not all(_cleaned(caption) for caption in in_row)
    ]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(image_ids)} held-out pairs have no caption, or an empty one "
            f"(first: image {bare[0]}); take them out of the set"
        )


def _first_rows(keys: Sequence[Any]) -> list[int]:
    """Where each key comes first."""
    first: dict[Any, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return list(first.values())


def _cleaned(caption: str) -> str:
    """Equal for captions that a tokeniser reads as equal, which are no two candidates."""
    # Twice, as open_clip's tokeniser does: captions from the web come escaped twice.
    unescaped = html.unescape(html.unescape(caption))
    return " ".join(unicodedata.normalize("NFC", unescaped).lower().split())
