"""What the images of a split may be used for, by the name that its publisher gave it."""

from __future__ import annotations

from quiltnet.evaluation.labelled_set import Split

# Anything else, as the number of a fold, is a test set until its user says otherwise: the mistake to avoid is to
# choose by the images that results are reported on.
SPLIT_ROLES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_role(split: str | None, used_as: Split | None = None) -> Split:
    """The use of a publisher's split, whatever its case; ``used_as`` where that is given."""
    return used_as or SPLIT_ROLES.get(str(split).strip().lower(), "test")
