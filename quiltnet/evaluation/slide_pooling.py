"""Scores of slides from those of their tiles: the mean of each class's best tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import balanced_accuracy, predict
from quiltnet.evaluation.outcome import Outcome


@dataclass
class SlidePooling:
    """A slide's similarity to a class is the mean of its j most similar tiles; the largest names the slide.

    The top-j pooling of MI-Zero (Lu et al., CVPR 2023). A slide of fewer than j tiles uses all of them.

    Args:
        j: tiles a class.
        validation: instead of j, the set to choose it on: the candidate with the best balanced accuracy of slides (the
            smallest of several). Never the slides that are scored, whose number it would flatter.
        candidates: what is tried there.

    Raises:
        UserError: neither or both of j and validation, one of them out of range, or a validation set that is a test
            split, has no slides, or has a slide with several labels.
    """

    j: int | None = None
    validation: LabelledSet | None = None
    candidates: Sequence[int] = (1, 5, 10, 50, 100)

    def __post_init__(self) -> None:
        if (self.j is None) == (self.validation is None):
            raise UserError(
                f"j={self.j} and {'no' if self.validation is None else 'a'} validation set; give either j, "
                "the number of tiles to average, or a validation set to choose it on"
            )
        self.candidates = tuple(sorted(set(self.candidates)))
        for j in self.candidates if self.j is None else (self.j,):
            if not isinstance(j, int) or j < 1:
                raise UserError(f"j={j!r} must be a whole number of tiles, at least 1")
        if self.validation is None:
            return
        if not self.candidates:
            raise UserError("candidates is empty; give the values of j to choose from, such as [1, 5, 10, 50, 100]")
        if self.validation.split == "test":
            raise UserError(
                "j would be chosen on a test split; give a validation set, or say split: val in it, if it is one"
            )
        slide_set(self.validation)  # raises

    def check_fits(self, dataset: LabelledSet) -> None:
        """Raises UserError where the slides of this set cannot be pooled, or j would be chosen on some of them."""
        slide_set(dataset)  # raises
        validation = self.validation
        if validation is None:
            return
        if list(validation.class_names) != list(dataset.class_names):
            raise UserError(
                f"j is chosen among the classes {list(validation.class_names)} for the classes "
                f"{list(dataset.class_names)}; give a validation set of the same classes in the same order"
            )
        for what in ("slides", "groups"):
            shared = sorted(set(getattr(validation, what) or ()) & set(getattr(dataset, what) or ()))
            if shared:
                raise UserError(
                    f"{len(shared)} {what} of the scored set are also in the validation set that j is chosen on "
                    f"(first: {shared[0]}); take them out of one of the two"
                )

    def choose(self, similarity: Tensor) -> dict[str, Any]:
        """``j``, the best candidate, and ``validation_balanced_accuracy`` of each of them, for the record.

        similarity: (N, C) of the validation set's tiles.
        """
        labels = slide_set(self.validation).labels  # (S,)
        scores = {
            j: balanced_accuracy(predict(pool_slides(similarity, self.validation.slides, j)), labels)
            for j in self.candidates
        }
        # max finds the first of equals, and candidates ascend.
        return {
            "j": max(scores, key=scores.__getitem__),
            "validation_balanced_accuracy": {str(j): score for j, score in scores.items()},
        }

    def describe(self) -> dict[str, Any]:
        """What j is or how it is chosen; JSON types only."""
        if self.validation is None:
            return {"j": self.j}
        return {"candidates": list(self.candidates), "chosen_on": self.validation.describe()}


def pool_slides(similarity: Tensor, slides: Sequence[str], j: int) -> Tensor:
    """Each class's mean over the j tiles of a slide that are the most similar to it.

    Args:
        similarity: (N, C) of tiles; a NaN is among the most similar, and makes the mean NaN.
        slides: N names.

    Returns:
        (S, C) float64, slides in the order of their first tiles.
    """
    # In float64, where sums of so few float32 are exact: classes with equal tiles tie.
    means = [similarity[rows].topk(min(j, len(rows)), dim=0).values.double().mean(dim=0) for rows in _rows(slides)]
    return torch.stack(means)


def slide_set(dataset: LabelledSet) -> LabelledSet:
    """The set of a set's slides, in the order of their first tiles, which stand for them.

    Groups are those of the tiles where no slide is part of several, so that patients stay together.

    Raises:
        UserError: the set has no slides, or one with tiles of several labels.
    """
    if dataset.slides is None:
        raise UserError("the tiles to pool do not say which slide they are of; give a set with slides, or pool none")
    rows = _rows(dataset.slides)
    for of_slide in rows:
        labels = dataset.labels[of_slide].unique().tolist()
        if len(labels) > 1:
            names = " and ".join(repr(dataset.class_names[label]) for label in labels)
            raise UserError(
                f"slide {dataset.slides[of_slide[0]]!r} has tiles of {names}; a slide has one label, "
                "which all of its tiles must have: pool no slides where labels are the tiles' own"
            )
    first = [of_slide[0] for of_slide in rows]
    slides = [dataset.slides[row] for row in first]
    groups = dataset.groups
    if groups is not None:
        is_torn = any(len({groups[row] for row in of_slide}) > 1 for of_slide in rows)
        groups = None if is_torn else [groups[row] for row in first]
    return replace(dataset.select(torch.tensor(first)), groups=groups, slides=slides, names=slides)


def with_slide_scores(tiles: Outcome, of_slides: Outcome, slides: Sequence[str]) -> Outcome:
    """One outcome of both: the slides' metrics after ``slide_``, their details under ``slides``.

    Args:
        slides: N names of the tiles' slides, part of what the items are.
    """
    items = hashlib.sha256("\n".join([tiles.items, of_slides.items, *slides]).encode())
    undefined = {
        **tiles.details.get("undefined", {}),
        **_prefixed(of_slides.details.get("undefined", {})),
    }
    details = {key: value for key, value in of_slides.details.items() if key != "undefined"}
    return Outcome(
        scores={**tiles.scores, **_prefixed(of_slides.scores)},
        replicates={**tiles.replicates, **_prefixed(of_slides.replicates)},
        details={**tiles.details, "undefined": undefined, "slides": details},
        items=items.hexdigest(),
    )


def _rows(slides: Sequence[str]) -> list[list[int]]:
    """The tiles of each slide, slides in the order of their first."""
    rows: dict[str, list[int]] = {}
    for row, slide in enumerate(slides):
        rows.setdefault(slide, []).append(row)
    return list(rows.values())


def _prefixed(of_metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"slide_{metric}": value for metric, value in of_metrics.items()}
