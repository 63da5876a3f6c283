"""Which text of a sample is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quiltnet.errors import UserError

POLICIES = ("random", "first", "joined")


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise UserError(f"caption_policy={policy!r} is not known; use one of {', '.join(POLICIES)}")


def choose_caption(captions: Sequence[str], policy: str, rng: np.random.Generator) -> str:
    """One text for a sample that has one or more captions.

    Args:
        captions: at least one.
        policy: ``random`` draws one evenly from ``rng``; ``first`` takes the first in table order; ``joined``
            puts all of them behind each other (what does not fit the model's context is cut by its
            tokeniser).
    """
    if policy == "random":
        return captions[rng.integers(len(captions))]
    if policy == "joined":
        return " ".join(captions)
    return captions[0]
