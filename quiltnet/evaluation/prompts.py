"""Class names to prompts, and a class's prompts to one feature."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from quiltnet.errors import UserError

SLOT = "{}"
Period = Literal["as_written", "add", "remove"]
Case = Literal["as_written", "lower", "capitalized"]


@dataclass
class PromptSet:
    """What is said of each class: every name of the class in every template, or sentences given outright.

    One set may serve many data sets, so it may speak of classes that one of them lacks.

    Args:
        templates: such as ``histopathology image of {}``; may be empty where ``prompts`` has all classes.
        synonyms: class name -> the names that stand in for it, among them itself only where it is listed. A class that
            is not here goes by its own name.
        prompts: class name -> whole sentences, in place of templates and synonyms.
        period: ``add`` to end all prompts with a full stop, ``remove`` to end none with one.
        case: of the names in templates: ``lower``, or ``capitalized`` for a capital first letter and the rest as it is.
            CLIP's tokeniser and that of PubMedBERT do not tell cases apart.
        name: what a record of results calls this set.

    Raises:
        UserError: nothing to say, a template without ``{}``, something empty or twice in a list, an unknown option.
    """

    templates: Sequence[str] = ()
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    period: Period = "as_written"
    case: Case = "as_written"
    name: str = ""

    def __post_init__(self) -> None:
        if not (self.templates or self.prompts):
            raise UserError("templates is empty; give at least one, such as 'histopathology image of {}'")
        self.templates = _texts("templates", self.templates) if self.templates else ()
        self.synonyms = {str(name): _texts(f"synonyms of {name!r}", names) for name, names in self.synonyms.items()}
        self.prompts = {str(name): _texts(f"prompts of {name!r}", texts) for name, texts in self.prompts.items()}
        for template in self.templates:
            if SLOT not in template:
                raise UserError(
                    f"template {template!r} has no {SLOT}, so every class would get the same prompt; "
                    f"write {SLOT} where the class name goes"
                )
        for key, value, known in (("period", self.period, get_args(Period)), ("case", self.case, get_args(Case))):
            if value not in known:
                raise UserError(f"{key}={value!r} must be one of {', '.join(known)}")

    def fill(self, class_names: Sequence[str]) -> dict[str, list[str]]:
        """class name -> its prompts, in the order of class_names; classes may have different numbers of them.

        Raises:
            UserError: a class has no prompt, or two classes share one.
        """
        filled = {name: self._prompts_of(name) for name in class_names}
        owners: dict[str, str] = {}
        for name, prompts in filled.items():
            for prompt in prompts:
                owner = owners.setdefault(prompt.casefold(), name)  # most tokenisers do not see the case
                if owner != name:
                    raise UserError(
                        f"{owner!r} and {name!r} share the prompt {prompt!r}, so no prompt can tell them apart; "
                        "give each class names that the other has not"
                    )
        return filled

    def describe(self, class_names: Sequence[str]) -> dict[str, Any]:
        """All prompts of these classes, in full, and how they came about; JSON types only.

        ``without_synonyms`` lists the classes that go by their own name: all, where the set's synonyms are of others.
        """
        filled = self.fill(class_names)
        known = self.synonyms.keys() | self.prompts.keys()
        return {
            "name": self.name,
            "templates": list(self.templates),
            "period": self.period,
            "case": self.case,
            "without_synonyms": [name for name in class_names if name not in known],
            "prompts": filled,
            "sha256": hashlib.sha256(json.dumps(filled).encode()).hexdigest(),
        }

    def _prompts_of(self, class_name: str) -> list[str]:
        if class_name in self.prompts:
            return [_end(prompt, self.period) for prompt in self.prompts[class_name]]
        if not self.templates:
            raise UserError(
                f"there are no prompts of class {class_name!r} and no template to make them; "
                f"give one of both (there are prompts of {', '.join(map(repr, self.prompts))})"
            )
        names = [_spell(name, self.case) for name in self.synonyms.get(class_name, (class_name,))]
        return [_end(template.replace(SLOT, name), self.period) for name in names for template in self.templates]


def class_features(prompt_features: Iterable[Tensor]) -> Tensor:
    """One feature a class: each prompt's to unit length, their mean, to unit length again.

    The ensemble of Radford et al. 2021, section 3.1.4; CONCH (Lu et al. 2024) takes it over synonyms and templates.

    Args:
        prompt_features: C of (P, D), P prompts of a class; a (C, P, D) tensor where all have as many.

    Returns:
        (C, D) float32, unit length.
    """
    # In float64: classes whose prompts all have the same feature must get the same one, however many prompts they have,
    # or a collapsed model would not tie.
    units = (F.normalize(features.double(), dim=-1) for features in prompt_features)
    return torch.stack([F.normalize(unit.mean(dim=0), dim=-1) for unit in units]).float()


def _texts(what: str, texts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str):
        raise UserError(f"{what} is the single text {texts!r}; give a list of texts")
    texts = tuple(texts)
    if not texts:
        raise UserError(f"{what} is empty; give at least one, or leave the entry out")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{what} holds {text!r}; give texts that say something, in quotes where YAML needs them")
    repeated = next((text for position, text in enumerate(texts) if text in texts[:position]), None)
    if repeated is not None:
        raise UserError(f"{what} holds {repeated!r} twice, which would count double; name it once")
    return texts


def _spell(name: str, case: Case) -> str:
    if case == "lower":
        return name.lower()
    return name[:1].upper() + name[1:] if case == "capitalized" else name


def _end(prompt: str, period: Period) -> str:
    if period == "as_written":
        return prompt
    stem = prompt.rstrip().removesuffix(".")
    return f"{stem}." if period == "add" else stem
