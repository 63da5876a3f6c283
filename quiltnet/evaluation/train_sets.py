"""What a classifier learns from, beside what it is scored on: whether the two go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.labelled_set import LabelledSet


def check_sets(train: LabelledSet, test: LabelledSet, validation: LabelledSet | None) -> None:
    """Both go with train, and something may be chosen on ``validation``.

    Raises:
        UserError: they do not, or it is a test set.
    """
    check_goes_with_train(train, test, "test")
    if validation is None:
        return
    check_goes_with_train(train, validation, "validation")
    if validation.split == "test":
        raise UserError("validation is a test set, on which nothing is chosen; say split: val in it, if it is one")


def check_shots(train: LabelledSet, shots: Sequence[int], classes: Sequence[int]) -> None:
    """Raises UserError where train has fewer images of one of the classes (labels) than the most shots."""
    images = torch.bincount(train.labels, minlength=len(train.class_names))  # (C,)
    rarest = min(classes, key=lambda label: images[label])
    if images[rarest] < max(shots):
        raise UserError(
            f"shots={list(shots)}, but train has {images[rarest]} images of {train.class_names[rarest]!r}; ask for "
            "fewer shots, or give more images"
        )


def check_goes_with_train(train: LabelledSet, other: LabelledSet, name: str) -> None:
    """``other`` numbers the same classes alike, and shares no group with train.

    Args:
        name: what to call ``other`` in a message, such as ``test``.

    Raises:
        UserError: it does not.
    """
    if list(other.class_names) != list(train.class_names):
        raise UserError(
            f"train has the classes {list(train.class_names)}, {name} {list(other.class_names)}; "
            "give sets of the same classes in the same order"
        )
    shared = sorted(set(train.groups or ()) & set(other.groups or ()))
    if shared:
        raise UserError(
            f"{len(shared)} groups are in both train and {name} (first: {shared[0]}), so what is scored may be known "
            "by heart; split by group, or give no groups where the official split tears them apart"
        )
