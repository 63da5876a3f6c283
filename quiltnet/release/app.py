"""What the app says of a tile: how probable texts are, where the model looks, what of a gallery is the nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from quiltnet.errors import UserError
from quiltnet.evaluation.prompts import SLOT, PromptSet, class_features
from quiltnet.model.embedder import Embedder
from quiltnet.release.explaining import Explanation, explain

AS_TYPED = "as typed"
MAX_TEXTS = 100
MAX_CHARACTERS = 2000
NEAREST = 5


@dataclass(frozen=True, eq=False)
class AppGallery:
    """What a tile is compared with.

    Attributes:
        labels: N, what is shown of each entry.
        features: (N, D) float32, unit length, of captions or of images.
        shows: ``caption`` or ``image``, what an entry is.
    """

    labels: Sequence[str]
    features: Tensor
    shows: str = "caption"

    def nearest(self, image_features: Tensor, count: int = NEAREST) -> list[tuple[float, str]]:
        """(cosine similarity, label) of the most similar entries, the best first. image_features: (1, D)."""
        similarity = (image_features.double() @ self.features.double().T).squeeze(0)  # (N,)
        best = similarity.topk(min(count, len(similarity)))
        return [
            (value, self.labels[row]) for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Look:
    """The answer about a tile.

    Attributes:
        similarities: text -> cosine similarity, in the order typed.
        probabilities: text -> probability; empty where one text has nothing to be compared with.
        nearest: (cosine similarity, label), the best first; empty without a gallery.
    """

    similarities: dict[str, float]
    probabilities: dict[str, float]
    nearest: list[tuple[float, str]]

    @property
    def best(self) -> str:
        return max(self.similarities, key=self.similarities.__getitem__)


class Answers:
    """A model, wordings for class names, and a gallery to look in.

    Args:
        prompt_sets: by name; captions and class names can be taken ``as typed`` in any case.
    """

    def __init__(
        self, embedder: Embedder, prompt_sets: Mapping[str, PromptSet] | None = None, gallery: AppGallery | None = None
    ) -> None:
        self.embedder = embedder
        self.prompt_sets = {AS_TYPED: PromptSet([SLOT], name=AS_TYPED), **(prompt_sets or {})}
        self.gallery = gallery

    @property
    def is_siglip(self) -> bool:
        """Whether each text has a probability by itself, as SigLIP's loss trains it."""
        return self.embedder.model.logit_bias is not None

    def look(self, image: Image.Image, typed: str, wording: str = AS_TYPED) -> Look:
        """
        Args:
            image: RGB, of any size.
            typed: class names or captions, one a line.
            wording: the prompt set that makes prompts of them.

        Raises:
            UserError: no text, too many or too long ones, two that are the same prompt.
        """
        prompts = self._prompt_set(wording).fill(read_texts(typed))
        image_features = self.embedder.encode_images([image])  # (1, D)
        of_texts = class_features(self.embedder.encode_text(of_text) for of_text in prompts.values())  # (C, D)
        similarity = (image_features.double() @ of_texts.double().T).squeeze(0)  # (C,)
        similarities = dict(zip(prompts, similarity.tolist(), strict=True))
        probabilities = dict(zip(prompts, self._probabilities(similarity).tolist(), strict=True))
        is_compared = self.is_siglip or len(prompts) > 1
        nearest = self.gallery.nearest(image_features) if self.gallery else []
        return Look(similarities, probabilities if is_compared else {}, nearest)

    def relevance(self, image: Image.Image, text: str, wording: str = AS_TYPED) -> Explanation:
        """Where the model looks for a caption, or for the first prompt of a class.

        Raises:
            UserError: no text or more than one, or a model whose towers cannot be explained.
        """
        texts = read_texts(text)
        if len(texts) > 1:
            raise UserError(f"{len(texts)} texts were given; a relevance map is of one")
        prompts = self._prompt_set(wording).fill(texts)[texts[0]]
        return explain(self.embedder.model, image, prompts[0])

    def _prompt_set(self, wording: str) -> PromptSet:
        if wording not in self.prompt_sets:
            raise UserError(f"there is no wording {wording!r}; choose one of {', '.join(self.prompt_sets)}")
        return self.prompt_sets[wording]

    @torch.no_grad()
    def _probabilities(self, similarity: Tensor) -> Tensor:
        """(C,) cosine similarities -> (C,): softmax over the texts, or the sigmoid of each where there is a bias."""
        model = self.embedder.model
        logits = model.logit_scale.double().cpu() * similarity
        if model.logit_bias is None:
            return logits.softmax(dim=-1)
        return torch.sigmoid(logits + model.logit_bias.double().cpu())


def read_texts(typed: str) -> list[str]:
    """The lines that say something, each once, in the order typed. Raises UserError: none, too many, too long."""
    texts = list(dict.fromkeys(line.strip() for line in typed.splitlines() if line.strip()))
    if not texts:
        raise UserError("no text is given; type class names or captions, one a line")
    if len(texts) > MAX_TEXTS:
        raise UserError(f"{len(texts)} texts are given; type at most {MAX_TEXTS}")
    longest = max(map(len, texts))
    if longest > MAX_CHARACTERS:
        raise UserError(f"a text has {longest} characters; type at most {MAX_CHARACTERS} in a line")
    return texts
