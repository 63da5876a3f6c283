"""Class prompts as a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quiltnet.evaluation.classification import classification_outcome
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.metrics import cosine_similarity
from quiltnet.evaluation.outcome import Outcome
from quiltnet.evaluation.prompts import PromptSet, class_features
from quiltnet.evaluation.slide_pooling import SlidePooling, pool_slides, slide_set, with_slide_scores


@dataclass
class ZeroShotClassification:
    """The class whose averaged prompts are the most similar: no training, no tuning on the set.

    Prompt text, its case, the classes left out and the split move the result of the same weights by tens of
    points (QuiltNet-B-32 on NCT-CRC-HE-100K: 28.5 to 59.6 % accuracy in public reports), so ``describe``
    records all four.

    Args:
        dataset: the images; all its class names are candidates, also those of no image.
        prompts: what is said of each class.
        slide_pooling: for scores of whole slides beside those of their tiles (``slide_accuracy`` and so on).

    Raises:
        UserError: a class has no prompt, two classes share one, or the set does not fit the slide pooling.
    """

    dataset: LabelledSet
    prompts: PromptSet
    slide_pooling: SlidePooling | None = None
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        self.prompts.fill(self.dataset.class_names)  # raises
        if self.slide_pooling is not None:
            self.slide_pooling.check_fits(self.dataset)

    @property
    def split(self) -> str:
        return self.dataset.split

    def run(self, encoder: SetEncoder) -> Outcome:  # all ranks
        """Scores of the images, and of their slides where these are asked for."""
        prompts = self.prompts.fill(self.dataset.class_names)
        of_classes = encode_classes(encoder, prompts, batch_size=self.batch_size)  # (C, D)
        similarity = self._similarity(encoder, self.dataset, of_classes)  # (N, C)
        outcome = _outcome(similarity, encoder.logit_scale, self.dataset)
        if self.slide_pooling is None:
            return outcome
        choice = self._choose_j(encoder, of_classes)
        pooled = pool_slides(similarity, self.dataset.slides, choice["j"])  # (S, C)
        of_slides = _outcome(pooled, encoder.logit_scale, slide_set(self.dataset), choice)
        return with_slide_scores(outcome, of_slides, self.dataset.slides)

    def describe(self) -> dict[str, Any]:
        """The set, its classes in order, every prompt, and how slides are pooled; JSON types only."""
        described = {
            "dataset": self.dataset.describe(),
            "class_names": list(self.dataset.class_names),
            "prompts": self.prompts.describe(self.dataset.class_names),
        }
        if self.slide_pooling is not None:
            described["slide_pooling"] = self.slide_pooling.describe()
        return described

    def _similarity(self, encoder: SetEncoder, dataset: LabelledSet, of_classes: Tensor) -> Tensor:  # all ranks
        features = encoder.images(dataset, batch_size=self.batch_size, workers=self.workers)  # (N, D)
        return cosine_similarity(features, of_classes)

    def _choose_j(self, encoder: SetEncoder, of_classes: Tensor) -> dict[str, Any]:  # all ranks
        validation = self.slide_pooling.validation
        if validation is None:
            return {"j": self.slide_pooling.j}
        return self.slide_pooling.choose(self._similarity(encoder, validation, of_classes))


def encode_classes(
    encoder: SetEncoder, prompts: Mapping[str, Sequence[str]], *, batch_size: int
) -> Tensor:  # all ranks
    """``class_features`` (C, D) of what ``PromptSet.fill`` returns; a prompt that comes again is encoded once."""
    distinct = list(dict.fromkeys(prompt for of_class in prompts.values() for prompt in of_class))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    features = encoder.texts(distinct, batch_size=batch_size)  # (P, D)
    return class_features(features[[row_of[prompt] for prompt in of_class]] for of_class in prompts.values())


def _outcome(
    similarity: Tensor, logit_scale: Tensor, dataset: LabelledSet, details: Mapping[str, Any] | None = None
) -> Outcome:
    logits = logit_scale.double() * similarity.double()  # (N, C): in float64, where scaling makes no new ties
    return classification_outcome(logits, dataset, probabilities=logits.softmax(dim=-1), details=details)
