"""Texts longer than a model reads: a random run of whole sentences in place of the first words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# A full stop (with a closing quote or bracket), white space, a capital. An initial ("H. pylori", "J. Smith") ends none.
_BOUNDARY = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))(?<!\s[A-Z]\.)(?<!^[A-Z]\.)\s+(?=["'“‘(\[]?[A-ZÀ-ÖØ-Þ])|(?<=[。！？])\s*(?=\S)"""
)

# Tokens that a tokeniser adds of itself: start and end, or [CLS] and [SEP], and a leading space.
_ADDED_TOKENS = 4


@dataclass(frozen=True)
class SentenceLimit:
    """Cuts texts that have more tokens than the model reads, so that their later sentences are seen in training too.

    Attributes:
        count_tokens: text -> number of tokens, start and end among them, before anything is cut off.
        context_length: tokens that the model reads.
    """

    count_tokens: Callable[[str], int]
    context_length: int

    def __call__(self, text: str, rng: np.random.Generator) -> str:
        """The text if it fits, else as many whole sentences as fit, from one drawn evenly on.

        A single sentence that is too long is returned whole; the tokeniser cuts it.
        """
        if self._fits(text):
            return text
        breaks = [match.span() for match in _BOUNDARY.finditer(text)]
        starts = [0, *(end for _, end in breaks)]
        ends = [*(start for start, _ in breaks), len(text)]
        first = last = int(rng.integers(len(starts)))
        while last + 1 < len(ends) and self._fits(text[starts[first] : ends[last + 1]]):
            last += 1
        return text[starts[first] : ends[last]]

    def _fits(self, text: str) -> bool:
        # A token of plain ASCII is at least one character. Elsewhere cleaning can lengthen a text ("&nGt;", U+0958).
        if len(text) + _ADDED_TOKENS <= self.context_length and text.isascii() and "&" not in text:
            return True
        return self.count_tokens(text) <= self.context_length
