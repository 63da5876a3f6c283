"""What the numbers mean: pure functions of labels and logits.

One rule holds for all of them: a tie and a NaN count against the model. Otherwise a collapsed model, whose
features are all the same, or a diverged one, whose features are NaN, would score.

``counts`` (N, R) float32 says how often each of N items is in each of R resamples; a metric then has R values.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    whatever its label is.
    """
    is_best = logits == logits.amax(dim=-1, keepdim=True)  # (N, C); amax hands a NaN on, and nothing equals NaN
    return torch.where(is_best.sum(dim=-1) == 1, is_best.long().argmax(dim=-1), NO_CLASS)


@dataclass(frozen=True)
class ClassCounts:
    """How often each class is there, is predicted, and is predicted rightly; all (..., C) float64.

    ``...`` is nothing for a set and R for its resamples, and so is the shape of every metric's value. ``NO_CLASS`` is
    predicted of no class, so ``predicted`` may sum to less than ``images``.
    """

    images: Tensor
    predicted: Tensor
    right: Tensor

    def recall(self) -> Tensor:
        """(..., C); 0 for a class without images."""
        return self.right / self.images.clamp(min=1)

    def precision(self) -> Tensor:
        """(..., C); 0 for a class that is never predicted."""
        return self.right / self.predicted.clamp(min=1)

    def f1(self) -> Tensor:
        """(..., C); 0 for a class that neither is there nor is predicted."""
        return 2 * self.right / (self.images + self.predicted).clamp(min=1)

    def accuracy(self) -> Tensor:
        """Share of images whose class is predicted."""
        return self.right.sum(dim=-1) / self.images.sum(dim=-1)

    def balanced_accuracy(self) -> Tensor:
        """Mean recall of the classes that have images."""
        return self._mean_of_present(self.recall())

    def macro_f1(self) -> Tensor:
        """Mean F1 of the classes that have images.

        scikit-learn by default takes in the classes that are only predicted, so that the number of classes would
        depend on the model; this is its ``f1_score(labels=np.unique(y_true), average="macro")``.
        """
        return self._mean_of_present(self.f1())

    def weighted_f1(self) -> Tensor:
        """Mean F1, each class weighted by its share of the images."""
        return (self.f1() * self.images).sum(dim=-1) / self.images.sum(dim=-1)

    def _mean_of_present(self, values: Tensor) -> Tensor:
        is_present = self.images > 0  # (..., C)
        return (values * is_present).sum(dim=-1) / is_present.sum(dim=-1)


def count_classes(predicted: Tensor, labels: Tensor, num_classes: int, counts: Tensor | None = None) -> ClassCounts:
    """Of a set, or of its resamples. predicted, labels: (N,) int64; counts: (N, R)."""
    right = torch.where(predicted == labels, labels, NO_CLASS)
    return ClassCounts(*(_sum_by_class(classes, num_classes, counts) for classes in (labels, predicted, right)))


def _sum_by_class(classes: Tensor, num_classes: int, counts: Tensor | None) -> Tensor:
    """(N,) classes or NO_CLASS, (N, R) -> (R, C) float64, or (C,) without counts."""
    column = torch.where(classes == NO_CLASS, num_classes, classes)
    if counts is None:
        return torch.bincount(column, minlength=num_classes + 1)[:-1].double()
    # float32 is exact for whole numbers below 2**24, more images than a set has.
    sums = counts.new_zeros(num_classes + 1, counts.shape[1]).index_add_(0, column, counts)
    return sums[:-1].T.double()


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of samples whose class is predicted. predicted, labels: (N,) int64."""
    return _count_named(predicted, labels).accuracy().item()


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean of per-class recall; classes absent from labels are left out. predicted, labels: (N,) int64."""
    return _count_named(predicted, labels).balanced_accuracy().item()


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean of per-class F1; classes absent from labels are left out. predicted, labels: (N,) int64."""
    return _count_named(predicted, labels).macro_f1().item()


def weighted_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean of per-class F1, weighted by the class's share of labels. predicted, labels: (N,) int64."""
    return _count_named(predicted, labels).weighted_f1().item()


def _count_named(predicted: Tensor, labels: Tensor) -> ClassCounts:
    """Counts of as many classes as are named."""
    return count_classes(predicted, labels, int(torch.cat([predicted, labels]).max()) + 1)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, C + 1) int64: images of each class (row) by what is predicted; the last column is ``NO_CLASS``."""
    column = torch.where(predicted == NO_CLASS, num_classes, predicted)
    cells = torch.bincount(labels * (num_classes + 1) + column, minlength=num_classes * (num_classes + 1))
    return cells.view(num_classes, num_classes + 1)


def agreement_values(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(N, 5) float64 of which ``quadratic_kappa`` needs the means.

    A row without a prediction is taken for one of the class that is furthest from its label.
    """
    furthest = torch.where(2 * labels < num_classes - 1, num_classes - 1, 0)
    chosen = torch.where(predicted == NO_CLASS, furthest, predicted).double()
    truth = labels.double()
    return torch.stack([truth, chosen, truth**2, chosen**2, truth * chosen], dim=1)


def quadratic_kappa(means: Tensor) -> Tensor:
    """Cohen's kappa with quadratic weights, of the means (..., 5) of ``agreement_values``: (...).

    1 minus the mean squared distance of label and prediction over that of a label and a prediction of independent
    images. NaN where all labels and predictions are of one class: then any two agree.
    """
    truth, chosen, truth_squared, chosen_squared, product = means.unbind(dim=-1)
    observed = truth_squared - 2 * product + chosen_squared
    expected = truth_squared - 2 * truth * chosen + chosen_squared
    return 1 - observed / expected


class RankedScores:
    """One class's scores, sorted once, so that the AUROC of any resample is a few sums.

    AUROC is the share of pairs of an image of the class and one of another in which the first has the higher score;
    a pair with equal scores counts half, one with a NaN not at all.

    Args:
        scores: (N,) of the class, such as its probability.
        is_positive: (N,) bool, whether the image is of the class.
    """

    def __init__(self, scores: Tensor, is_positive: Tensor) -> None:
        self._size = len(scores)
        is_number = ~scores.isnan()
        self._positives = is_positive.nonzero().squeeze(1)  # (P,)
        comparable = (~is_positive & is_number).nonzero().squeeze(1)
        ascending, order = scores[comparable].sort()
        own = scores[self._positives]
        below = torch.searchsorted(ascending, own, right=False).where(is_number[self._positives], 0)  # (P,)
        not_above = torch.searchsorted(ascending, own, right=True).where(is_number[self._positives], 0)  # (P,)
        # Between two of these places no positive stands: the negatives there count together.
        self._ends, place = torch.cat([below, not_above]).unique(return_inverse=True)  # (E,), (2 * P,)
        self._below, self._not_above = place.chunk(2)
        self._ranked = comparable[order]

    def auroc(self, counts: Tensor | None = None) -> Tensor:
        """Of the set, () float64, or of resamples, (N, R) -> (R,); NaN where all images are of the class, or none."""
        if counts is None:
            return self.auroc(torch.ones(self._size, 1)).squeeze(0)
        own = counts[self._positives].double()  # (P, R)
        pairs = own.sum(dim=0) * (counts.sum(dim=0).double() - own.sum(dim=0))  # (R,)
        if not len(self._positives):
            return torch.full_like(pairs, torch.nan)
        starts = torch.cat([self._ends.new_zeros(1), self._ends[:-1]])
        ranked = self._ranked[: self._ends[-1]]
        between = F.embedding_bag(ranked, counts, starts, mode="sum")  # (E, R)
        beaten = between.cumsum(dim=0)  # (E, R): negatives before each end
        won = (own * (beaten[self._below] + beaten[self._not_above])).sum(dim=0) / 2
        return won / pairs
