"""Class names to prompts, and a class's prompts to one feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError

SLOT = "{}"


@dataclass
class PromptSet:
    """Templates for class names, such as ``histopathology image of {}``; every class gets all of them.

    Raises:
        UserError: there is no template, or one has no ``{}``.
    """

    templates: Sequence[str]

    def __post_init__(self) -> None:
        self.templates = tuple(self.templates)
        if not self.templates:
            raise UserError("templates is empty; give at least one, such as 'histopathology image of {}'")
        for template in self.templates:
            if SLOT not in template:
                raise UserError(
                    f"template {template!r} has no {SLOT}, so every class would get the same prompt; "
                    f"write {SLOT} where the class name goes"
                )

    def fill(self, class_names: Sequence[str]) -> list[str]:
        """C x T prompts, class after class, exactly as the templates spell them: no period is added."""
        return [template.replace(SLOT, name) for name in class_names for template in self.templates]


def class_features(prompt_features: Tensor) -> Tensor:
    """One feature a class: each prompt's to unit length, their mean, to unit length again.

    The ensemble of Radford et al. 2021, section 3.1.4.

    Args:
        prompt_features: (C, T, D).

    Returns:
        (C, D), unit length.
    """
    return F.normalize(F.normalize(prompt_features, dim=-1).mean(dim=1), dim=-1)
