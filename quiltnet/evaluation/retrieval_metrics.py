"""Ranks of right answers among all candidates, in both directions at once: pure functions of features.

Ties and NaN count against the model, as in every score here: a wrong candidate is ahead of a right one unless it is
less similar to the query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 2.0**26  # steps of the unit


def on_grid(features: Tensor) -> Tensor:
    """Features (N, D) of unit length, or NaN, as whole numbers of 2^-26: (N, D) float64.

    Products of such features are exact, in whatever order a BLAS adds: no partial sum of whole numbers exceeds
    2^26 * 2^26 by much, and float64 holds every whole number up to 2^53. So equal candidates tie, on every device and
    in tiles of every size, while a float32 product gives seven equal features of width 64 two different values.
    Rounding moves a similarity by about 1e-8, which is less than float32 resolves near 1.
    """
    # Up to a length of 1.4 the sums stay below 2^53; in a comparison that is true of NaN as well.
    assert not (torch.linalg.vector_norm(features, dim=-1) > 1.1).any(), "features must be of unit length"
    return (features.double() * GRID).round_()


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where Q queries find their P right answers among C candidates.

    Attributes:
        query: (P,) int64, ascending.
        place: (P,) int64, how many right answers of the same query come before this one.
        wrong_ahead: (P,) int64, the wrong candidates that are not less similar than this right one; C for all right
            answers of a query that has a NaN among them.
        queries: Q.
        candidates: C.
    """

    query: Tensor
    place: Tensor
    wrong_ahead: Tensor
    queries: int
    candidates: int

    def best(self) -> Tensor:
        """Wrong candidates ahead of the best right one: (Q,) int64, C where there is no right one."""
        ahead = torch.full((self.queries,), self.candidates)
        is_first = self.place == 0
        ahead[self.query[is_first]] = self.wrong_ahead[is_first]
        return ahead

    def average_precision(self) -> Tensor:
        """The mean, over a query's right answers, of the share of right ones from the top down to it: (Q,) float64.

        It is scikit-learn's ``average_precision_score`` where no wrong candidate ties with a right one, and 0 where
        there is no right one.
        """
        rank_among_right = (self.place + 1).double()
        precision = rank_among_right / (self.wrong_ahead + rank_among_right)
        precision[self.wrong_ahead == self.candidates] = 0.0  # only a NaN is behind everything, itself included
        total = torch.zeros(self.queries, dtype=torch.float64).index_add_(0, self.query, precision)
        return total / self.right_answers().clamp(min=1)

    def right_answers(self) -> Tensor:
        """How many candidates are right: (Q,) int64."""
        return torch.bincount(self.query, minlength=self.queries)


def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, positives: Tensor, tile: int = 1024
) -> tuple[Ranks, Ranks]:
    """Ranks of images' texts among all texts and of texts' images among all images, by one product of each tile.

    Memory is O(M + C + P + tile * tile), on the features' device; time O((M + C + P) * D + (M + P) * C + P * M).

    Args:
        image_features: (M, D), unit length.
        text_features: (C, D), unit length.
        positives: (P, 2) int64, distinct pairs of an image's and a text's index that belong together.
        tile: images, and texts, at a time.

    Returns:
        Image to text, text to image; on the CPU.
    """
    image, text = positives.to(image_features.device).T
    value = _paired_similarity(image_features, text_features, image, text, tile)  # (P,)
    of_images = _Thresholds(image, value, len(image_features), tile)
    of_texts = _Thresholds(text, value, len(text_features), tile)
    for image_start in range(0, len(image_features), tile):
        image_tile = on_grid(image_features[image_start : image_start + tile])
        for text_start in range(0, len(text_features), tile):
            text_tile = on_grid(text_features[text_start : text_start + tile])
            similarity = image_tile @ text_tile.T  # (tile, tile)
            of_images.compare(similarity, image_start)
            of_texts.compare(similarity.T, text_start)
    return of_images.ranks(len(text_features)), of_texts.ranks(len(image_features))


class _Thresholds:
    """How many candidates stay below each right answer's similarity, counted tile by tile.

    query: (P,) int64; value: (P,), the similarity to its query.
    """

    def __init__(self, query: Tensor, value: Tensor, queries: int, tile: int) -> None:
        by_value = value.argsort(descending=True, stable=True)  # NaN first
        order = by_value[query[by_value].argsort(stable=True)]  # queries ascending, each one's best first
        query, value = query[order], value[order]
        count = torch.bincount(query, minlength=queries)  # (Q,)
        self.query, self.tile = query, tile
        self.place = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]
        # Right answers that are equal for a query, as repeated rows are, are one threshold.
        is_new = torch.ones_like(query, dtype=torch.bool)
        is_new[1:] = (query[1:] != query[:-1]) | (value[1:] != value[:-1])
        self.threshold = is_new.cumsum(0) - 1  # (P,), ascending
        # The best of every query needs no lookup of rows, and most queries have no other.
        is_best, is_other = self.place == 0, is_new & (self.place > 0)
        self.best = value.new_full((queries,), -torch.inf)
        self.best[query[is_best]] = value[is_best]
        self.below_best = torch.zeros(queries, dtype=torch.int64, device=query.device)
        self.other_query, self.other_value = query[is_other], value[is_other]
        self.below_other = torch.zeros_like(self.other_query)
        self.is_other = is_other[is_new]  # (thresholds,)

    def compare(self, similarity: Tensor, start: int) -> None:
        """similarity: (q, c), queries from start on with any candidates; each pair must come once."""
        stop = start + len(similarity)
        self.below_best[start:stop] += _below(similarity, self.best[start:stop])
        bounds = torch.tensor([start, stop], device=similarity.device)
        first, last = torch.searchsorted(self.other_query, bounds).tolist()
        if first < last:
            similarity = similarity.contiguous()  # or looking rows up takes several times as long
        for low in range(first, last, self.tile):
            high = min(low + self.tile, last)
            rows = similarity[self.other_query[low:high] - start]  # (tile, c)
            self.below_other[low:high] += _below(rows, self.other_value[low:high])

    def ranks(self, candidates: int) -> Ranks:
        below = torch.empty(len(self.is_other), dtype=torch.int64, device=self.query.device)  # of each threshold
        below[~self.is_other] = self.below_best[self.query[self.place == 0]]
        below[self.is_other] = self.below_other
        # Right answers that are at least as similar, each itself included.
        right = torch.zeros_like(below).scatter_reduce_(0, self.threshold, self.place + 1, "amax")
        wrong = candidates - (below + right)[self.threshold]
        wrong[self.best[self.query].isnan()] = candidates
        return Ranks(self.query.cpu(), self.place.cpu(), wrong.cpu(), len(self.best), candidates)


def _below(similarity: Tensor, threshold: Tensor) -> Tensor:
    """How many of each row (q, c) are less than its threshold (q,): (q,) int32. Nothing is less than NaN, nor NaN."""
    return (similarity < threshold[:, None]).sum(dim=1, dtype=torch.int32)


def _paired_similarity(
    image_features: Tensor, text_features: Tensor, image: Tensor, text: Tensor, chunk: int
) -> Tensor:
    """Similarity of image[i] and text[i]: (P,), the very numbers that the product of tiles has."""
    parts = [
        (on_grid(image_features[image_part]) * on_grid(text_features[text_part])).sum(dim=1)
        for image_part, text_part in zip(image.split(chunk), text.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def medians(values: Tensor, counts: Tensor) -> Tensor:
    """Median of the values (N,) with each taken as often as a row of counts (R, N) says: (R,) float64."""
    order = values.argsort()
    seen = counts[:, order].double().cumsum(dim=1)  # (R, N)
    size = seen[:, -1:]
    # Of an even number of values, the mean of the middle two.
    middle = torch.cat([((size - 1) / 2).floor(), (size / 2).floor()], dim=1)  # (R, 2)
    return values[order][torch.searchsorted(seen, middle, right=True)].double().mean(dim=1)
