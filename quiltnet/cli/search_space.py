"""What a search may choose: for each option a range of numbers, or choices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quiltnet.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

Number = int | float
Value = Number | str

_FORMS = "{low: 1e-6, high: 1e-3}, with log: true or step: …, or {choices: [a, b]}"
_FIELDS = {"low", "high", "log", "step", "choices"}
_WORDS_OF_OTHER_TYPES = {"true", "false", "null", "nan", "inf"}


@dataclass(frozen=True)
class Parameter:
    """One option of a search.

    Attributes:
        low, high: ends of a range, both included; of whole numbers where both are whole. None with ``choices``.
        log: whether equal factors are equally likely.
        step: between neighbours; None: any number of the range (of whole numbers: 1).
        choices: as they stand on a command line, behind ``name=``.
    """

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    step: Number | None = None
    choices: tuple[str, ...] = ()

    def suggest(self, name: str, trial: Trial) -> Value:
        """What ``trial`` takes; the same again when it is asked again."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        if self.is_whole:
            return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step or 1)
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def examples(self) -> tuple[Value, ...]:
        """Values that bound all others: both ends of a range, or every choice."""
        return self.choices or (self.low, self.high)

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def parse_space(tree: Mapping[str, Any]) -> dict[str, Parameter]:
    """Parameters by option, from a tree that is shaped as the options are: ``{optim: {lr: {low: …, high: …}}}``.

    Raises:
        UserError: a range or a list of choices that is none, or nothing to search.
    """
    space = dict(_leaves(tree, ""))
    if not space:
        raise UserError(f"there is nothing to search; say +search.optim.lr=… with {_FORMS}")
    return space


def as_text(value: Any) -> str:
    """A value as Hydra's command line takes it: ``name=text``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(as_text, value))}]"
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch(r"(/|\./|[A-Za-z_])[\w./+-]*", value) and value.lower() not in _WORDS_OF_OTHER_TYPES:
        return value
    quoted = value.replace("'", "\\'")
    return f"'{quoted}'"


def _leaves(node: Mapping[str, Any], above: str) -> Any:
    for key, inner in node.items():
        name = f"{above}.{key}" if above else str(key)
        if not isinstance(inner, Mapping):
            raise UserError(f"search.{name}={inner} is neither a range nor choices: {_FORMS}")
        if _FIELDS & inner.keys():
            yield name, _parse(name, {field: value for field, value in inner.items() if value is not None})
        else:
            yield from _leaves(inner, name)


def _parse(name: str, fields: Mapping[str, Any]) -> Parameter:
    for field in fields.keys() - _FIELDS:
        raise UserError(f"search.{name} has no {field}: {_FORMS}")
    if "choices" in fields:
        return _parse_choices(name, fields)
    low, high, step, log = fields.get("low"), fields.get("high"), fields.get("step"), fields.get("log", False)
    given = ", ".join(f"{field}: {value}" for field, value in fields.items())
    if not _is_number(low) or not _is_number(high) or not low < high:
        raise UserError(f"search.{name}={{{given}}} must have two numbers, low below high")
    if not isinstance(log, bool) or (step is not None and not (_is_number(step) and 0 < step <= high - low)):
        raise UserError(f"search.{name}={{{given}}}: log is true or false, step a number above 0 that fits the range")
    if log and (low <= 0 or step is not None):
        raise UserError(f"search.{name}={{{given}}}: log: true needs a low above 0, and no step")
    if isinstance(step, float):
        low, high = float(low), float(high)
    return Parameter(low, high, log, step)


def _parse_choices(name: str, fields: Mapping[str, Any]) -> Parameter:
    choices = fields["choices"]
    if fields.keys() != {"choices"}:
        raise UserError(
            f"search.{name} has choices and {', '.join(sorted(fields.keys() - {'choices'}))}: give one of {_FORMS}"
        )
    texts = tuple(map(as_text, choices)) if isinstance(choices, (list, tuple)) else ()
    if len(set(texts)) < 2 or len(set(texts)) < len(texts):
        raise UserError(f"search.{name}.choices={choices} must be a list of two or more, each once")
    return Parameter(choices=texts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
