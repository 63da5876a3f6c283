"""A linear classifier on frozen image features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.classification import classification_outcome, mean_outcome
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.metrics import balanced_accuracy, predict
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.probe import Probe, balanced_weights, fit_probes_on_subsets
from quiltnet.evaluation.probe_splits import TrainPart, hold_out, hold_out_folds
from quiltnet.evaluation.train_sets import check_sets, check_shots

# 45 from 1e-6 to 1e5, TITAN's grid: features of unit length need weak penalties, others strong ones.
C_VALUES = tuple(10 ** (-6 + 11 * place / 44) for place in range(45))
# Fewer held-out rows of a class than this say little of a C; folds together hold out all rows.
FEWEST_HELD_OUT = 10
FOLDS = 5


class _Fit(NamedTuple):
    """Rows (n,) of train to fit one probe to, and masks (F, n) of those held out in turn; none with a validation set.

    Several seeds that draw the same rows share the fit.
    """

    rows: Tensor
    held_out: list[Tensor]


@dataclass
class LinearProbe:
    """Logistic regression on frozen image features, its one knob chosen without a look at the test set.

    C is the one with the best balanced accuracy on ``validation``; of several, as on an easy set, the one with the
    least cross-entropy there, or the probabilities would be those of the strongest penalty. Without validation it is
    chosen on rows held out from train: whole groups if the set has groups, else single rows, class by class. Where
    each class has at least 10 rows for it, that is ``validation_fraction`` of them; with fewer, and where ``folds`` is
    given, all are held out in turn (cross-validation) and the predictions on them scored together. The probe is then
    fitted to all rows of the training part (not to those of ``validation``) and scores ``test`` once.

    Of a part so small that nothing can be held out, such as one image a class, no C is chosen: it is UNI's (Chen et al.
    2024), the features' width times the number of classes, divided by 100.

    Parts of train are drawn image by image, class by class, one draw a seed; those of a seed lie within each other.
    Seeds also decide what is held out. Numbers are means over seeds.

    Args:
        train: what is learnt from.
        test: what is scored.
        validation: what C is chosen on, for every part.
        c_values: inverse strengths of the penalty, as in scikit-learn; of a single one nothing is chosen.
        fractions: of train, 1 for all of it.
        shots: images a class, in addition to the fractions; give ``fractions=[]`` for these alone.
        seeds: one probe of each part a seed.
        class_weight: ``balanced`` lets all classes count the same, however many images they have.
        validation_fraction: of train's rows, to hold out.
        folds: of cross-validation, instead.
        projected: features of the joint space; False for those of the image tower before its projection, which are
            brought to unit length, as CLIP_benchmark does by default.

    Raises:
        UserError: the sets do not name the same classes, train shares a group with another set, validation is a test
            set, a class has fewer images than shots, or a value is out of range.
    """

    train: LabelledSet
    test: LabelledSet
    validation: LabelledSet | None = None
    c_values: Sequence[float] = C_VALUES
    fractions: Sequence[float] = (1.0,)
    shots: Sequence[int] = ()
    seeds: Sequence[int] = (0,)
    class_weight: Literal["balanced"] | None = None
    validation_fraction: float = 0.2
    folds: int | None = None
    projected: bool = True
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        self.c_values = tuple(sorted(set(self.c_values)))
        self._check_values()
        check_sets(self.train, self.test, self.validation)
        if self.shots:
            check_shots(self.train, self.shots, self.train.labels.unique().tolist())
        self._parts = [TrainPart(fraction) for fraction in sorted(set(self.fractions), reverse=True)]
        self._parts += [TrainPart(shots=shots) for shots in sorted(set(self.shots))]
        self._fits = [self._plan(part) for part in self._parts]

    @property
    def split(self) -> Split:
        return self.test.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """Every metric of a classifier for all of train, and as ``balanced_accuracy@10%`` or ``@16-shot`` for parts.

        The C chosen by each seed is in the details. Where a feature of train is not finite no row is predicted right.
        """
        train = self._encode(encoder, self.train)  # (N, D)
        validation = None if self.validation is None else self._encode(encoder, self.validation)
        test = self._encode(encoder, self.test)
        scores, replicates, undefined, parts = {}, {}, {}, {}
        for part, fits in zip(self._parts, self._fits, strict=True):
            outcome = self._score_part(fits, train, validation, test)
            ending = "" if part.is_whole else f"@{part.name}"
            scores |= {f"{metric}{ending}": value for metric, value in outcome.scores.items()}
            replicates |= {f"{metric}{ending}": values for metric, values in outcome.replicates.items()}
            undefined |= {f"{metric}{ending}": why for metric, why in outcome.details["undefined"].items()}
            parts[part.name] = outcome.details
        first = parts.pop(self._parts[0].name)
        return Outcome(scores, replicates, {**first, "undefined": undefined, "parts": parts}, outcome.items)

    def describe(self) -> dict[str, Any]:
        """The sets and every choice; JSON types only."""
        held_out = {"validation_fraction": self.validation_fraction, "folds": self.folds}
        return {
            "protocol": "linear_probe/1",
            "train": self.train.describe(),
            "test": self.test.describe(),
            "class_names": list(self.train.class_names),
            "c_values": list(self.c_values),
            "c_chosen_on": held_out if self.validation is None else self.validation.describe(),
            "fractions": list(self.fractions),
            "shots": list(self.shots),
            "seeds": list(self.seeds),
            "class_weight": self.class_weight,
            "projected": self.projected,
            "features": "unit length",
        }

    def _encode(self, encoder: SetEncoder, dataset: LabelledSet) -> Tensor:
        features = encoder.images(dataset, batch_size=self.batch_size, workers=self.workers, projected=self.projected)
        return features if self.projected else F.normalize(features, dim=-1)

    def _score_part(self, fits: Sequence[_Fit], train: Tensor, validation: Tensor | None, test: Tensor) -> Outcome:
        if not train.isfinite().all():
            nothing = torch.full((len(test), len(self.train.class_names)), torch.nan)
            return classification_outcome(nothing, self.test, details={"c": []})
        probes = [probe for fit in fits for probe in self._fit(fit, train, validation)]
        outcomes = []
        for probe in probes:
            logits = probe.logits(test)
            outcomes.append(classification_outcome(logits, self.test, probabilities=logits.softmax(dim=-1)))
        outcome = outcomes[0] if len(outcomes) == 1 else mean_outcome(outcomes)
        found = {
            "bootstrap": outcomes[0].details["bootstrap"],
            "c": [probe.c for probe in probes],
            "images_to_learn_from": len(fits[0].rows),
            "held_out_in_turn": len(fits[0].held_out[0]) if fits[0].held_out else 0,
            "c_was_chosen": self._is_chosen(fits[0]),
        }
        return replace(outcome, details={**outcome.details, **found})

    def _fit(self, fit: _Fit, train: Tensor, validation: Tensor | None) -> list[Probe]:
        """A probe for each choice of held-out rows; all are fitted in one call, and so is the one to all rows."""
        features, labels = train[fit.rows], self.train.labels[fit.rows]
        everything = torch.ones(1, len(labels), dtype=torch.bool)
        is_in = torch.cat([*(~masks for masks in fit.held_out), everything])  # (S, n)
        row_weights = balanced_weights(labels, is_in) if self.class_weight == "balanced" else is_in
        num_classes = len(self.train.class_names)
        c_values = self.c_values
        if len(c_values) > 1 and not self._is_chosen(fit):
            c_values = [train.shape[1] * num_classes / 100]
        *of_folds, of_all = fit_probes_on_subsets(
            features, labels, row_weights, num_classes=num_classes, c_values=c_values
        )
        if len(c_values) == 1:
            return of_all
        if validation is not None:
            return [_best(of_all, [probe.logits(validation) for probe in of_all], self.validation.labels)]
        chosen = []
        for masks in fit.held_out:
            of_these, of_folds = of_folds[: len(masks)], of_folds[len(masks) :]
            logits = [_held_out_logits(of_c, masks, features) for of_c in zip(*of_these, strict=True)]
            chosen.append(_best(of_all, logits, torch.cat([labels[mask] for mask in masks])))
        return chosen

    def _is_chosen(self, fit: _Fit) -> bool:
        return len(self.c_values) > 1 and (self.validation is not None or bool(fit.held_out))

    def _plan(self, part: TrainPart) -> list[_Fit]:
        """One fit a seed; seeds that draw the same rows share one, and are one where they hold out nothing."""
        if not part.is_whole:
            return [self._plan_fit(part.rows(self.train.labels, seed), [seed]) for seed in self.seeds]
        return [self._plan_fit(torch.arange(len(self.train)), self.seeds)]

    def _plan_fit(self, rows: Tensor, seeds: Sequence[int]) -> _Fit:
        if self.validation is not None or len(self.c_values) == 1:
            return _Fit(rows, [])
        labels = self.train.labels[rows]
        groups = None if self.train.groups is None else [self.train.groups[row] for row in rows.tolist()]
        fewest = labels.unique(return_counts=True)[1].min().item()
        folds = self.folds or (FOLDS if self.validation_fraction * fewest < FEWEST_HELD_OUT else None)
        held_out = []
        for seed in seeds:
            if folds is None:
                masks = hold_out(labels, groups, fraction=self.validation_fraction, seed=seed)[None]
            else:
                masks = hold_out_folds(labels, groups, folds=folds, seed=seed)
            if not masks.any() or any(len(labels[~mask].unique()) < 2 for mask in masks):
                return _Fit(rows, [])
            held_out.append(masks)
        return _Fit(rows, held_out)

    def _check_values(self) -> None:
        if not self.c_values or self.c_values[0] <= 0:
            raise UserError(f"c_values={list(self.c_values)}: give at least one, all above 0")
        if not self.fractions and not self.shots:
            raise UserError(
                "fractions and shots are both empty; give at least one part of train, such as fractions=[1]"
            )
        if any(not 0 < fraction <= 1 for fraction in self.fractions):
            raise UserError(
                f"fractions={list(self.fractions)} must each be above 0 and at most 1, which is all of train"
            )
        if any(shots < 1 for shots in self.shots):
            raise UserError(f"shots={list(self.shots)} are images a class; give 1 or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds={list(self.seeds)}: give at least one, each once, none below 0")
        if self.class_weight not in (None, "balanced"):
            raise UserError(f"class_weight={self.class_weight!r} must be 'balanced' or nothing")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if self.folds is not None and self.folds < 2:
            raise UserError(f"folds={self.folds}: give 2 or more, or none to hold out a fraction")


def _best(probes: Sequence[Probe], logits: Sequence[Tensor], labels: Tensor) -> Probe:
    """By each probe's logits (N, C) on rows that were held out; the first, so the strongest penalty, of equals."""
    scores = []
    for of_c in logits:
        loss = F.cross_entropy(of_c, labels).nan_to_num(nan=torch.inf)
        scores.append((balanced_accuracy(predict(of_c), labels), -loss.item()))
    return probes[scores.index(max(scores))]


def _held_out_logits(probes: Sequence[Probe], masks: Tensor, features: Tensor) -> Tensor:
    """Of all rows that a mask (F, n) holds out, mask after mask, by the probe of that mask: (rows, C)."""
    return torch.cat([probe.logits(features[mask]) for probe, mask in zip(probes, masks, strict=True)])
