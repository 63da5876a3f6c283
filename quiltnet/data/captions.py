"""Which text of a sample is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quiltnet.data.sentences import SentenceLimit
from quiltnet.errors import UserError

POLICIES = ("random", "first", "longest", "joined")
_KNOWN = f"{', '.join(POLICIES)} or {{weighted: {{caption: 0.7, roi_text: 0.3}}}}"


class CaptionChoice:
    """Captions of a sample, its record and a generator -> one text, a function of these alone.

    Args:
        policy: ``random`` draws a caption evenly; ``first`` takes the first in table order; ``longest`` the one with
            most words, the first of equals; ``joined`` puts all of them behind each other (what does not fit the
            model's context is cut by its tokeniser). ``{"weighted": {field: weight}}`` draws a caption evenly, then
            a field of the record by weight among those that hold text for that caption; ``caption`` is the caption
            itself, and what is left where no named field holds text.
        sentences: cuts texts that are too long for the model; None leaves that to its tokeniser.

    Raises:
        UserError: the policy is not known, or a weight is not a positive number.
    """

    def __init__(self, policy: str | Mapping[str, Any] = "random", *, sentences: SentenceLimit | None = None) -> None:
        self.policy = policy if isinstance(policy, str) else "weighted"
        self.weights = {} if isinstance(policy, str) else _read_weights(policy)
        self.sentences = sentences
        if isinstance(policy, str) and policy not in POLICIES:
            raise UserError(f"caption_policy={policy!r} is not known; use one of {_KNOWN}")

    def __call__(self, captions: Sequence[str], record: Mapping[str, Any], rng: np.random.Generator) -> str:
        """captions: at least one. record: the sample's json, ``{}`` where it has none."""
        text = self._choose(captions, record, rng)
        return text if self.sentences is None else self.sentences(text, rng)

    def _choose(self, captions: Sequence[str], record: Mapping[str, Any], rng: np.random.Generator) -> str:
        if self.policy == "first":
            return captions[0]
        if self.policy == "longest":
            return max(captions, key=lambda caption: len(caption.split()))
        if self.policy == "joined":
            return " ".join(captions)
        number = int(rng.integers(len(captions)))
        return captions[number] if self.policy == "random" else self._draw_field(captions, number, record, rng)

    def _draw_field(
        self, captions: Sequence[str], number: int, record: Mapping[str, Any], rng: np.random.Generator
    ) -> str:
        texts = {
            name: [captions[number]] if name == "caption" else _texts_of(record, name, number) for name in self.weights
        }
        present = [name for name in texts if any(texts[name])]
        place = rng.random() * sum(self.weights[name] for name in present)
        for name in present:
            place -= self.weights[name]
            if place < 0 or name == present[-1]:  # the last one whatever rounding has left
                return texts[name][int(rng.integers(len(texts[name])))]
        return captions[number]


def _texts_of(record: Mapping[str, Any], name: str, number: int) -> list[str]:
    """What a field says of one caption, without blanks.

    Our own shards keep a column under ``metadata`` where all captions agree, else under ``caption_metadata`` with a
    value a caption. Shards of other tools have it at the top. A value is a text or a list of texts.
    """
    by_caption, common = record.get("caption_metadata"), record.get("metadata")
    if isinstance(by_caption, Mapping) and name in by_caption:
        column = by_caption[name]
        value = column[number] if isinstance(column, list) and number < len(column) else None
    elif isinstance(common, Mapping) and name in common:
        value = common[name]
    else:
        value = record.get(name)
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def _read_weights(policy: Mapping[str, Any]) -> dict[str, float]:
    weights = policy.get("weighted") if isinstance(policy, Mapping) and set(policy) == {"weighted"} else None
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"caption_policy={policy!r} is not known; use one of {_KNOWN}")
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise UserError(
                f"caption_policy: the weight of {name!r} is {weight!r}; weights are positive numbers: "
                "leave the field out to never use it"
            )
    return {str(name): float(weight) for name, weight in weights.items()}
