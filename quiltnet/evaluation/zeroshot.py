"""Class prompts as a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quiltnet.evaluation.datasets import LabelledSet
from quiltnet.evaluation.features import EncodesImagesAndText, encode_captions, encode_labelled
from quiltnet.evaluation.metrics import classification_scores, cosine_similarity, predict
from quiltnet.evaluation.prompts import PromptSet, class_features


@dataclass
class ZeroShotClassification:
    """The class whose averaged prompts are the most similar: no training, no tuning on the set.

    Prompt text, its case, the classes left out and the split move the result of the same weights by tens of
    points (QuiltNet-B-32 on NCT-CRC-HE-100K: 28.5 to 59.6 % accuracy in public reports), so ``describe``
    records all four.
    """

    dataset: LabelledSet
    prompts: PromptSet
    batch_size: int = 64
    workers: int = 0

    def run(self, model: EncodesImagesAndText) -> Iterator[tuple[str, float]]:  # all ranks
        """accuracy, balanced_accuracy and weighted_f1."""
        prompts = self.prompts.fill(self.dataset.class_names)
        prompt_features = encode_captions(model, prompts, batch_size=self.batch_size)  # (C*T, D)
        prompt_features = prompt_features.unflatten(0, (len(self.dataset.class_names), -1))  # (C, T, D)
        image_features, labels = encode_labelled(
            model, self.dataset, batch_size=self.batch_size, workers=self.workers
        )  # (N, D), (N,)
        predicted = predict(cosine_similarity(image_features, class_features(prompt_features)))  # (N,)
        yield from classification_scores(predicted, labels).items()

    def describe(self) -> dict[str, Any]:
        """The set, its classes in order, and the prompts; JSON types only."""
        return {
            "dataset": self.dataset.describe(),
            "class_names": list(self.dataset.class_names),
            "templates": list(self.prompts.templates),
        }
