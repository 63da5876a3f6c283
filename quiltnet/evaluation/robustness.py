"""What a model loses when its images come from another scanner or laboratory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from quiltnet.errors import UserError
from quiltnet.evaluation.corruptions import CorruptedImages, Corruption
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.measuring import Evaluator
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.variants import check_is_measured, gather_variants


@dataclass
class Robustness:
    """An evaluator's metric on its test images as they are and under each corruption.

    Only what is scored is corrupted: a probe is fitted to clean images, each time to the same ones with the same
    seeds. Corruptions leave labels and groups alone, so the replicates of a drop are differences on the same
    resamples. A model that cannot do the task loses nothing either: read a drop beside the clean score.

    Args:
        evaluator: a dataclass with a LabelledSet in its field ``test`` or else ``dataset``.
        corruptions: name -> corruption.
        metric: one of the evaluator's, of which more is better.

    Raises:
        UserError: the evaluator has no such field, or there is no corruption; when it runs, no such metric.
    """

    evaluator: Evaluator
    corruptions: Mapping[str, Corruption]
    metric: str = "balanced_accuracy"

    def __post_init__(self) -> None:
        if not self.corruptions:
            raise UserError("corruptions is empty; give at least one, by name")
        if self._field() is None:
            raise UserError(
                f"{type(self.evaluator).__name__} has no labelled set to corrupt in a field called test or dataset; "
                "give an evaluator of labelled images"
            )

    @property
    def split(self) -> str:
        return self.evaluator.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """``balanced_accuracy``; for each corruption ``balanced_accuracy@NAME``, and ``drop@NAME``, their difference.

        ``mean_drop`` is the mean over corruptions; absent where the metric is undefined under one of them.
        """
        clean = self.evaluator.run(encoder)
        check_is_measured(self.metric, clean)
        corrupted = {name: self._corrupted(corruption).run(encoder) for name, corruption in self.corruptions.items()}
        found = gather_variants(clean, corrupted, self.metric)
        drops = _drops(found.scores, self.metric, list(self.corruptions))
        drop_replicates = _drops(found.replicates, self.metric, list(self.corruptions))
        return replace(found, scores={**found.scores, **drops}, replicates={**found.replicates, **drop_replicates})

    def describe(self) -> dict[str, Any]:
        """The evaluator's, and every corruption; JSON types only."""
        corruptions = {name: corruption.describe() for name, corruption in self.corruptions.items()}
        return {"evaluator": self.evaluator.describe(), "corruptions": corruptions, "metric": self.metric}

    def _field(self) -> str | None:
        """Where the evaluator keeps the images that it scores."""
        if not is_dataclass(self.evaluator):
            return None
        values = {field.name: getattr(self.evaluator, field.name) for field in fields(self.evaluator)}
        return next((name for name in ("test", "dataset") if isinstance(values.get(name), LabelledSet)), None)

    def _corrupted(self, corruption: Corruption) -> Evaluator:
        field = self._field()
        dataset = getattr(self.evaluator, field)
        names = [dataset.name(index) for index in range(len(dataset))]
        corrupted = replace(dataset, images=CorruptedImages(dataset, corruption), names=names)
        return replace(self.evaluator, **{field: corrupted})


def _drops(values: Mapping[str, Any], metric: str, names: list[str]) -> dict[str, Any]:
    """Of scores or of replicates, (R,): those that are defined, and their mean if all are."""
    drops = {
        f"drop@{name}": values[metric] - values[f"{metric}@{name}"]
        for name in names
        if metric in values and f"{metric}@{name}" in values
    }
    return {**drops, "mean_drop": sum(drops.values()) / len(drops)} if len(drops) == len(names) else drops
