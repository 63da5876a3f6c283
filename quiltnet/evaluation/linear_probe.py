"""A linear classifier on frozen image features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.datasets import LabelledSet
from quiltnet.evaluation.features import EncodesImagesAndText, encode_labelled
from quiltnet.evaluation.metrics import NO_CLASS, balanced_accuracy, classification_scores, predict
from quiltnet.evaluation.probe import Probe, fit_probes, hold_out

# Features of unit length need weak penalties: on drawn ones (see fit_probes) 1e-2 is chance, 1e5 equals 1e3.
C_VALUES = (1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3, 1e4, 1e5)


@dataclass
class LinearProbe:
    """Logistic regression on frozen image features, its one knob chosen without a look at the test set.

    C is the one with the best balanced accuracy on ``validation`` (the smallest of several) or, where there
    is none, on a part held out from ``train``: whole groups if the set has groups, else single rows, class by
    class. The probe is then fitted to all rows of ``train`` (not to those of ``validation``) and scores
    ``test`` once.

    Raises:
        UserError: the sets do not name the same classes, train and test share a group, a value is out of
            range, or train is too small to hold out a part of it.
    """

    train: LabelledSet
    test: LabelledSet
    validation: LabelledSet | None = None
    c_values: Sequence[float] = C_VALUES
    validation_fraction: float = 0.2
    seed: int = 0
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        self.c_values = tuple(sorted(self.c_values))
        if not self.c_values or self.c_values[0] <= 0:
            raise UserError(f"c_values={list(self.c_values)}: give at least one, all above 0")
        for name, other in (("test", self.test), ("validation", self.validation)):
            if other is not None:
                self._check_fits_train(name, other)
        if self.validation is None:
            self._check_hold_out()

    def run(self, model: EncodesImagesAndText) -> Iterator[tuple[str, float]]:  # all ranks
        """accuracy, balanced_accuracy and weighted_f1 on the test set, and the c that was chosen.

        Where the features to train on are not finite no row is predicted right, and there is no c.
        """
        train_features, train_labels = self._encode(model, self.train)  # (N, D), (N,)
        validation = None if self.validation is None else self._encode(model, self.validation)
        test_features, test_labels = self._encode(model, self.test)
        if not train_features.isfinite().all():
            yield from classification_scores(torch.full_like(test_labels, NO_CLASS), test_labels).items()
            return
        c = self._choose_c(train_features, train_labels, validation)
        (probe,) = self._fit(train_features, train_labels, [c])
        yield from classification_scores(predict(probe.logits(test_features)), test_labels).items()
        yield "c", probe.c

    def describe(self) -> dict[str, Any]:
        """The sets and how C is chosen; JSON types only."""
        chosen_on = {"fraction_of_train": self.validation_fraction, "seed": self.seed}
        return {
            "train": self.train.describe(),
            "test": self.test.describe(),
            "class_names": list(self.train.class_names),
            "c_values": list(self.c_values),
            "c_chosen_on": chosen_on if self.validation is None else self.validation.describe(),
        }

    def _encode(self, model: EncodesImagesAndText, dataset: LabelledSet) -> tuple[Tensor, Tensor]:
        return encode_labelled(model, dataset, batch_size=self.batch_size, workers=self.workers)

    def _choose_c(self, features: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor] | None) -> float:
        if validation is None:
            held_out = self._held_out()  # (N,)
            validation = features[held_out], labels[held_out]
            features, labels = features[~held_out], labels[~held_out]
        probes = self._fit(features, labels, self.c_values)
        # index finds the first of equals, and c_values ascend: the strongest penalty that is as good.
        scores = [balanced_accuracy(predict(probe.logits(validation[0])), validation[1]) for probe in probes]
        return probes[scores.index(max(scores))].c

    def _fit(self, features: Tensor, labels: Tensor, c_values: Sequence[float]) -> list[Probe]:
        return fit_probes(features, labels, num_classes=len(self.train.class_names), c_values=c_values)

    def _held_out(self) -> Tensor:
        train = self.train
        return hold_out(train.labels, train.groups, fraction=self.validation_fraction, seed=self.seed)

    def _check_fits_train(self, name: str, other: LabelledSet) -> None:
        if list(other.class_names) != list(self.train.class_names):
            raise UserError(
                f"train has the classes {list(self.train.class_names)}, {name} {list(other.class_names)}; "
                "a probe needs the same classes in the same order"
            )
        shared = sorted(set(self.train.groups or ()) & set(other.groups or ()))
        if shared:
            raise UserError(
                f"{len(shared)} groups are in both train and {name} (first: {shared[0]}), which a probe can "
                "know by heart; split by group, or give no groups where the official split tears them apart"
            )

    def _check_hold_out(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1")
        held_out = self._held_out()
        if not held_out.any() or len(self.train.labels[~held_out].unique()) < 2:
            raise UserError(
                f"train ({len(self.train)} images) has too few images or groups a class to hold out "
                f"{self.validation_fraction:.0%} for the choice of C; give a validation set, or more groups"
            )
