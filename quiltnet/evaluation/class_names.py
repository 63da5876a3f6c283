"""Labels as a set spells them -> class names as they go into prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quiltnet.errors import UserError

# YAML reads a label such as 0 as a number. A list names the labels 0, 1, 2 …
ClassNames = Mapping[Any, str] | Sequence[str]


def sort_labels(
    labels: Iterable[str], class_names: ClassNames | None, of: str, *, are_grades: bool = False
) -> list[str]:
    """Each label once: whole numbers by their value, all others as text.

    Args:
        of: whose labels they are, for messages.
        are_grades: the least first, as numbers tell or as class_names lists them.

    Raises:
        UserError: grades that are no numbers, without class_names.
    """
    distinct = set(labels)
    if all(label.removeprefix("-").isdecimal() for label in distinct):
        return sorted(distinct, key=lambda label: (int(label), label))
    if not are_grades:
        return sorted(distinct)
    if class_names is None:
        raise UserError(
            f"the grades of {of} are no numbers ({', '.join(sorted(distinct)[:5])}), so their order is not known; "
            "give class_names, the least grade first"
        )
    places = {label: place for place, label in enumerate(_by_label(class_names))}
    return sorted(distinct, key=lambda label: (places.get(label, len(places)), label))


def bind_names(labels: Sequence[str], class_names: ClassNames | None, of: str, remedy: str) -> dict[str, str]:
    """label -> class name, in the order of labels; labels as they are where no names are given.

    Args:
        of: whose labels they are, for messages.
        remedy: what else can be done with a label that has no name.

    Raises:
        UserError: a label without a name, or a name without a label.
    """
    if class_names is None:
        return {label: label for label in labels}
    names = _by_label(class_names)
    nameless = [label for label in labels if not names.get(label)]
    if nameless:
        raise UserError(f"{nameless[0]!r}, one of {of}, has no class name; give it one, or {remedy}")
    unused = sorted(set(names) - set(labels))
    if unused:
        raise UserError(f"class_names names {unused[0]!r}, which is not among {of}: {', '.join(labels)}")
    return {label: names[label] for label in labels}


def named_labels(class_names: ClassNames | None) -> set[str]:
    """The labels that have a name, for sets that may lack images of some class."""
    return set() if class_names is None else set(_by_label(class_names))


def index_labels(labels: Sequence[str], names: Mapping[str, str]) -> Tensor:
    """(N,) int64: the place of each label among the names."""
    place = {label: index for index, label in enumerate(names)}
    return torch.tensor([place[label] for label in labels], dtype=torch.int64)


def _by_label(class_names: ClassNames) -> dict[str, str]:
    named = class_names.items() if isinstance(class_names, Mapping) else enumerate(class_names)
    return {str(label): name for label, name in named}
