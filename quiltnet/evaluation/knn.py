"""The nearest labelled images name the class: nothing is fitted, so it shows the features as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.classification import classification_outcome
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.metrics import balanced_accuracy, cosine_similarity, predict
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.train_sets import check_sets

# Queries and labelled images at a time: 2,048 x 8,192 similarities in float64 are 128 MiB.
QUERIES, CANDIDATES = 2048, 8192


@dataclass
class KNN:
    """Majority vote of the k labelled images with the highest cosine similarity.

    Of classes with equally many votes the one with the larger sum of similarities is predicted. Where that is equal
    too, or where equally similar images of several classes compete for the last places among the k, nothing is.

    Args:
        train: the labelled images.
        test: what is scored.
        validation: where the best of ``ks`` is chosen by balanced accuracy, the smallest of several.
        ks: each is reported.
        k: reported without ``@k=`` in place of one that is chosen. Without it and without ``validation`` nothing is.
        projected: features of the joint space; False for those of the image tower before its projection.

    Raises:
        UserError: the sets do not name the same classes, train shares a group with another set, both ``k`` and
            ``validation`` are given, validation is a test set, or a k is below 1 or above train's number of images.
    """

    train: LabelledSet
    test: LabelledSet
    validation: LabelledSet | None = None
    ks: Sequence[int] = (1, 3, 5, 10, 20)
    k: int | None = None
    projected: bool = True
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        self.ks = tuple(sorted({*self.ks, *([] if self.k is None else [self.k])}))
        if not self.ks or self.ks[0] < 1 or self.ks[-1] > len(self.train):
            raise UserError(
                f"ks={list(self.ks)}: give at least one, each from 1 to the {len(self.train)} images of train"
            )
        if self.k is not None and self.validation is not None:
            raise UserError(f"k={self.k} is given, and a validation set to choose it on; give one of them")
        check_sets(self.train, self.test, self.validation)

    @property
    def split(self) -> Split:
        return self.test.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """``accuracy@k=5`` and the like for each k; for the chosen one also as they are, and with AUROC.

        Where a feature of train is not finite no image is predicted right.
        """
        logits = self._logits(encoder, self.test)
        scores, replicates = {}, {}
        for k in self.ks:
            outcome = classification_outcome(logits[k], self.test)
            scores |= {f"{metric}@k={k}": value for metric, value in outcome.scores.items()}
            replicates |= {f"{metric}@k={k}": values for metric, values in outcome.replicates.items()}
        k = self.k if self.validation is None else self._best_k(encoder, self.validation)
        details = {"k": k, "undefined": {}, "bootstrap": outcome.details["bootstrap"]}
        if k is not None:
            chosen = classification_outcome(logits[k], self.test, probabilities=vote_shares(logits[k], k))
            scores, replicates = {**chosen.scores, **scores}, {**chosen.replicates, **replicates}
            details = {**chosen.details, "k": k}
        return Outcome(scores, replicates, details, outcome.items)

    def describe(self) -> dict[str, Any]:
        """The sets, and how k is chosen; JSON types only."""
        return {
            "train": self.train.describe(),
            "test": self.test.describe(),
            "class_names": list(self.train.class_names),
            "ks": list(self.ks),
            "k": self.k,
            "k_chosen_on": None if self.validation is None else self.validation.describe(),
            "projected": self.projected,
        }

    def _logits(self, encoder: SetEncoder, dataset: LabelledSet) -> dict[int, Tensor]:
        train, queries = self._encode(encoder, self.train), self._encode(encoder, dataset)
        return knn_logits(queries, train, self.train.labels, num_classes=len(self.train.class_names), ks=self.ks)

    def _encode(self, encoder: SetEncoder, dataset: LabelledSet) -> Tensor:
        features = encoder.images(dataset, batch_size=self.batch_size, workers=self.workers, projected=self.projected)
        return features if self.projected else F.normalize(features, dim=-1)

    def _best_k(self, encoder: SetEncoder, validation: LabelledSet) -> int:
        logits = self._logits(encoder, validation)
        # max finds the first of equals, and ks ascend.
        return max(self.ks, key=lambda k: balanced_accuracy(predict(logits[k]), validation.labels))


def knn_logits(
    query_features: Tensor, train_features: Tensor, labels: Tensor, *, num_classes: int, ks: Sequence[int]
) -> dict[int, Tensor]:
    """For each k, logits (Q, C) float64: votes, and a fraction that orders equal votes by their similarities' sum.

    A row is NaN where its k nearest are not determined, or where its query has a NaN; all are where train_features
    are not finite. The (Q, N) matrix is never whole: memory grows with Q * C, and with N only by train_features.

    Args:
        query_features: (Q, D), unit length.
        train_features: (N, D), unit length.
        labels: (N,) int64 below num_classes.
        ks: each at most N.
    """
    if not train_features.isfinite().all():
        return {k: torch.full((len(query_features), num_classes), torch.nan, dtype=torch.float64) for k in ks}
    of_class = [train_features[labels == label] for label in range(num_classes)]
    chunks: dict[int, list[Tensor]] = {k: [] for k in ks}
    for queries in query_features.split(QUERIES):
        nearest = torch.stack([_most_similar(queries, features, max(ks)) for features in of_class], dim=1)  # (Q, C, K)
        for k in ks:
            chunks[k].append(_vote(nearest, k))
    return {k: torch.cat(logits) for k, logits in chunks.items()}


def vote_shares(logits: Tensor, k: int) -> Tensor:
    """Logits (Q, C) of ``knn_logits`` to the share of the k votes that each class has, NaN where they are."""
    return logits.floor() / k


def _most_similar(queries: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The ``count`` highest similarities of (Q, D) and (N, D): (Q, count) descending; -inf where there are fewer."""
    best = queries.new_full((len(queries), count), -torch.inf)
    for some in candidates.split(CANDIDATES):
        best = torch.cat([best, cosine_similarity(queries, some)], dim=1).topk(count).values
    return best


def _vote(nearest: Tensor, k: int) -> Tensor:
    """(Q, C, K) similarities of each class's nearest, K >= k, to (Q, C) logits."""
    kth = nearest.flatten(1).topk(k).values[:, -1]  # (Q,)
    is_closer = nearest > kth[:, None, None]
    votes = is_closer.sum(dim=-1)  # (Q, C)
    similarity = nearest.double().masked_fill(~is_closer, 0).sum(dim=-1)  # (Q, C)
    # As similar as the k-th: all of them fit in, or they are of one class, or it is open who is in.
    tied = (nearest == kth[:, None, None]).sum(dim=-1)  # (Q, C)
    places = k - votes.sum(dim=-1)  # (Q,)
    is_open = (tied.sum(dim=-1) > places) & ((tied > 0).sum(dim=-1) > 1)
    joining = tied.minimum(places[:, None])
    similarity += joining * kth.double()[:, None]
    fraction = 0.5 + similarity / (4 * k)  # similarity is from -k to k
    return (votes + joining + fraction).masked_fill((is_open | kth.isnan())[:, None], torch.nan)
