"""What is reported of a classifier, whatever made its logits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quiltnet.evaluation.bootstrap import Resamples
from quiltnet.evaluation.calibration import calibration_gaps, expected_calibration_error
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import (
    ClassCounts,
    RankedScores,
    agreement_values,
    confusion_matrix,
    count_classes,
    predict,
    quadratic_kappa,
)
from quiltnet.evaluation.outcome import LEVEL, Outcome


def classification_outcome(
    logits: Tensor,
    dataset: LabelledSet,
    *,
    probabilities: Tensor | None = None,
    details: Mapping[str, Any] | None = None,
    resamples: int = 1000,
) -> Outcome:
    """Every metric of a classifier, on the set and on bootstrap resamples of it.

    Resamples keep the class sizes and are drawn by whole groups where the set has groups, by slides where it has
    only these, else by images. Classes without images are left out of balanced accuracy, macro F1 and AUROC, and
    are named in the details.

    Args:
        logits: (N, C), on any scale; the class with the single largest is predicted.
        dataset: N images of C classes, in the order of the logits.
        probabilities: (N, C), of these AUROC and calibration error, which are left out without. As float64: in float32
            those of a sure model round to 1, and its ranks are lost in ties.
        details: what else is known, to go with the outcome's own.
        resamples: R.

    Returns:
        scores: ``accuracy``, ``balanced_accuracy``, ``weighted_f1``, ``macro_f1``; ``auroc`` (of two classes, that of
        the second; of more, the mean of each class against the rest) and ``expected_calibration_error`` with
        probabilities; ``quadratic_kappa`` where the classes are ordered.
    """
    labels, logits = dataset.labels.cpu(), logits.detach().cpu()
    num_classes = len(dataset.class_names)
    assert logits.shape == (len(dataset), num_classes), f"{tuple(logits.shape)} is not {(len(dataset), num_classes)}"
    if probabilities is not None:
        probabilities = _checked(probabilities.detach().double().cpu(), logits.shape)
    metrics = _Metrics(predict(logits), labels, num_classes, probabilities, dataset.is_ordered)
    drawn = Resamples.of_set(dataset, count=resamples)
    return Outcome(
        scores={metric: value.item() for metric, value in metrics.values().items()},
        replicates=metrics.replicates(drawn),
        details={
            **metrics.details(dataset.class_names),
            "undefined": {},
            "bootstrap": {
                "resamples": len(drawn),
                "seed": drawn.seed,
                "unit": "group" if dataset.groups is not None else "slide" if dataset.slides is not None else "image",
                "units": drawn.units,
                "fewest_units_of_a_class": drawn.fewest_units,
            },
            **(details or {}),
        },
        items=hashlib.sha256(f"{dataset.sha256()} {drawn.sha256()}".encode()).hexdigest(),
    )


def mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Of repeats (seeds, episodes) on the same items: the mean of every metric, on the set and on each resample.

    Its bootstrap intervals say how far the mean depends on the items. How far it depends on the repeats is in the
    details: each repeat's scores, their standard deviation, and the Student-t 95 % interval of their mean.
    """
    from scipy.stats import t

    assert outcomes and len({outcome.items for outcome in outcomes}) == 1
    metrics = [metric for metric in outcomes[0].scores if all(metric in outcome.scores for outcome in outcomes)]
    scores, deviations, intervals = {}, {}, {}
    for metric in metrics:
        values = torch.tensor([outcome.scores[metric] for outcome in outcomes], dtype=torch.float64)
        scores[metric] = mean = values.mean().item()
        if len(outcomes) > 1:
            deviations[metric] = values.std().item()
            half = float(t.ppf((1 + LEVEL) / 2, len(outcomes) - 1)) * deviations[metric] / math.sqrt(len(outcomes))
            intervals[metric] = [mean - half, mean + half]
    return Outcome(
        scores=scores,
        replicates={
            metric: torch.stack([outcome.replicates[metric] for outcome in outcomes]).mean(dim=0)
            for metric in metrics
            if all(metric in outcome.replicates for outcome in outcomes)
        },
        details={
            "repeats": [dict(outcome.scores) for outcome in outcomes],
            "standard_deviation_over_repeats": deviations,
            "interval_over_repeats": intervals,
            "undefined": {
                metric: "not defined in every repeat"
                for outcome in outcomes
                for metric in outcome.scores
                if metric not in metrics
            },
        },
        items=outcomes[0].items,
    )


class _Metrics:
    """All metrics of one classifier, prepared once for the set and all its resamples."""

    def __init__(
        self, predicted: Tensor, labels: Tensor, num_classes: int, probabilities: Tensor | None, is_ordered: bool
    ) -> None:
        self._predicted, self._labels, self._num_classes = predicted, labels, num_classes
        self._ranked: dict[int, RankedScores] = {}
        self._gaps = self._agreement = None
        if probabilities is not None:
            # Of two classes both have the same AUROC.
            ranked = [1] if num_classes == 2 else labels.unique().tolist()
            self._ranked = {label: RankedScores(probabilities[:, label], labels == label) for label in ranked}
            self._gaps = calibration_gaps(probabilities, predicted == labels)  # (N, bins)
        if is_ordered:
            self._agreement = agreement_values(predicted, labels, num_classes)  # (N, 5)

    def values(self, counts: Tensor | None = None) -> dict[str, Tensor]:
        """metric -> () float64 of the set, or (r,) of the resamples (r, N)."""
        of_items = None if counts is None else counts.T.contiguous()  # (N, r)
        by_class = self.by_class(of_items)
        values = {
            "accuracy": by_class.accuracy(),
            "balanced_accuracy": by_class.balanced_accuracy(),
            "weighted_f1": by_class.weighted_f1(),
            "macro_f1": by_class.macro_f1(),
        }
        if self._ranked:
            # A resample of groups may lack a class, whose AUROC is then NaN.
            values["auroc"] = torch.stack(list(self._auroc(of_items).values())).nanmean(dim=0)
        if self._gaps is not None:
            values["expected_calibration_error"] = expected_calibration_error(_means(self._gaps, counts))
        if self._agreement is not None:
            values["quadratic_kappa"] = quadratic_kappa(_means(self._agreement, counts))
        return values

    def replicates(self, resamples: Resamples) -> dict[str, Tensor]:
        """metric -> (R,) float64."""
        # Made beforehand: small tensors kept from every chunk tear the heap into pieces (387 MiB instead of 72).
        replicates = {metric: torch.empty(len(resamples), dtype=torch.float64) for metric in self.values()}
        start = 0
        for counts in resamples.counts():
            for metric, values in self.values(counts).items():
                replicates[metric][start : start + len(values)] = values
            start += len(counts)
        return replicates

    def by_class(self, of_items: Tensor | None = None) -> ClassCounts:
        return count_classes(self._predicted, self._labels, self._num_classes, of_items)

    def details(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Class by class; JSON types only."""
        by_class = self.by_class()
        columns = {
            "images": by_class.images.long().tolist(),
            "precision": by_class.precision().tolist(),
            "recall": by_class.recall().tolist(),
            "f1": by_class.f1().tolist(),
        }
        per_class = {
            name: {column: values[label] for column, values in columns.items()}
            for label, name in enumerate(class_names)
        }
        for label, auroc in self._auroc().items():
            per_class[class_names[label]]["auroc"] = auroc.item()
        return {
            "per_class": per_class,
            "confusion_matrix": confusion_matrix(self._predicted, self._labels, self._num_classes).tolist(),
            "classes_without_images": [name for name, row in per_class.items() if not row["images"]],
        }

    def _auroc(self, of_items: Tensor | None = None) -> dict[int, Tensor]:
        return {label: ranked.auroc(of_items) for label, ranked in self._ranked.items()}


def _means(values: Tensor, counts: Tensor | None) -> Tensor:
    """Means of values (N, M), of the set (M,) or of the resamples (r, N): (r, M)."""
    if counts is None:
        return values.mean(dim=0)
    counts = counts.double()
    return counts @ values / counts.sum(dim=1, keepdim=True)


def _checked(probabilities: Tensor, shape: torch.Size) -> Tensor:
    assert probabilities.shape == shape, f"{tuple(probabilities.shape)} is not {tuple(shape)}"
    assert not ((probabilities < 0) | (probabilities > 1 + 1e-6)).any(), "probabilities lie between 0 and 1"
    # One NaN among the logits of a row makes it predict nothing, so all its probabilities count against it.
    return probabilities.masked_fill(probabilities.isnan().any(dim=1, keepdim=True), torch.nan)
