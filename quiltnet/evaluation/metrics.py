"""What the numbers mean: pure functions of labels, logits and features.

One rule holds for all of them: a tie and a NaN count against the model. Otherwise a collapsed model, whose
features are all the same, or a diverged one, whose features are NaN, would score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NO_CLASS = -1


def cosine_similarity(query_features: Tensor, candidate_features: Tensor) -> Tensor:
    """Similarity of all queries (Q, D) and candidates (C, D), both of unit length: (Q, C) float32."""
    # In float64, then rounded: equal candidates must tie, but BLAS sums the columns at a block's edge in
    # another order, and in float32 seven equal features of width 64 already get two different values.
    candidates = candidate_features.double().T  # (D, C)
    return torch.cat([(chunk.double() @ candidates).float() for chunk in query_features.split(4096)])


def predict(logits: Tensor) -> Tensor:
    """The class with the largest of each row's logits (N, C): (N,) int64.

    ``NO_CLASS`` where two classes share the largest logit or one of the logits is NaN: such a row is wrong
    whatever its label is, as it is in ``recall_at_k``.
    """
    is_best = logits == logits.amax(dim=-1, keepdim=True)  # (N, C); amax hands a NaN on, and nothing equals NaN
    return torch.where(is_best.sum(dim=-1) == 1, is_best.long().argmax(dim=-1), NO_CLASS)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of samples whose class is predicted. predicted, labels: (N,) int64."""
    return (predicted == labels).double().mean().item()


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean of per-class recall; classes absent from labels are left out. predicted, labels: (N,) int64."""
    support = torch.bincount(labels)  # (C,)
    hits = torch.bincount(labels[predicted == labels], minlength=len(support))  # (C,)
    present = support > 0
    return (hits[present].double() / support[present]).mean().item()


def weighted_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean of per-class F1, weighted by the class's share of labels. predicted, labels: (N,) int64."""
    num_classes = int(torch.cat([predicted, labels]).max()) + 1
    support = torch.bincount(labels, minlength=num_classes)  # (C,)
    claimed = torch.bincount(predicted[predicted != NO_CLASS], minlength=num_classes)  # (C,)
    hits = torch.bincount(labels[predicted == labels], minlength=num_classes)  # (C,)
    f1 = 2 * hits.double() / (support + claimed).clamp(min=1)
    return ((f1 * support).sum() / support.sum()).item()


def classification_scores(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """What every classifier here reports. predicted, labels: (N,) int64."""
    return {
        "accuracy": accuracy(predicted, labels),
        "balanced_accuracy": balanced_accuracy(predicted, labels),
        "weighted_f1": weighted_f1(predicted, labels),
    }


def negatives_ahead(similarity: Tensor, positives: Tensor) -> Tensor:
    """Wrong candidates at least as similar as a query's best right one, ties and NaN counted as ahead.

    Args:
        similarity: (Q, C).
        positives: (Q, C) bool, the right candidates of each query.

    Returns:
        (Q,) int64: 0 where a right candidate leads alone, C where the query has no right candidate or a NaN
        for one.
    """
    best = similarity.masked_fill(~positives, -torch.inf).amax(dim=-1, keepdim=True)  # (Q, 1)
    ahead = (~(similarity < best) & ~positives).sum(dim=-1)  # (Q,)
    return ahead.masked_fill(best.squeeze(-1).isnan(), similarity.shape[-1])


def recall_at_k(similarity: Tensor, positives: Tensor, k: int) -> float:
    """Share of queries with a positive in their top k; ties and NaN count against.

    similarity: (Q, C); positives: (Q, C) bool.
    """
    return (negatives_ahead(similarity, positives) < k).double().mean().item()


def retrieval_recalls(
    query_features: Tensor,
    candidate_features: Tensor,
    positives: Tensor,
    ks: Sequence[int],
    chunk_size: int = 1024,
) -> dict[int, float]:
    """``recall_at_k`` for each k, without the (Q, C) matrix: memory grows with chunk_size * C.

    Args:
        query_features: (Q, D), unit length.
        candidate_features: (C, D), unit length.
        positives: (P, 2) int64, pairs of a query's and a right candidate's index.
        ks: a k larger than C is left out.
        chunk_size: queries at a time; 1024 against 13,559 candidates take about 0.25 GiB.

    Returns:
        k -> recall.
    """
    num_queries, num_candidates = len(query_features), len(candidate_features)
    ahead = []
    for start in range(0, num_queries, chunk_size):
        chunk = query_features[start : start + chunk_size]
        of_chunk = positives[(positives[:, 0] >= start) & (positives[:, 0] < start + chunk_size)]
        is_positive = torch.zeros(len(chunk), num_candidates, dtype=torch.bool)
        is_positive[of_chunk[:, 0] - start, of_chunk[:, 1]] = True
        ahead.append(negatives_ahead(cosine_similarity(chunk, candidate_features), is_positive))
    rank = torch.cat(ahead)  # (Q,)
    return {k: (rank < k).double().mean().item() for k in ks if k <= num_candidates}


def symmetric_info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> float:
    """CLIP's loss of one batch: the mean of both directions' cross-entropy, pair i being right for i.

    image_features, text_features: (B, D), unit length; logit_scale: ().
    """
    logits_per_image = logit_scale * cosine_similarity(image_features, text_features)  # (B, B)
    target = torch.arange(len(logits_per_image))  # (B,)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_image.T, target)).item() / 2
