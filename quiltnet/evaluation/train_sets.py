"""What a classifier learns from, beside what it is scored on: whether the two go together."""

from __future__ import annotations

from quiltnet.errors import UserError
from quiltnet.evaluation.labelled_set import LabelledSet


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
