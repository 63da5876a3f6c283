"""Text of a model card: what a run says of itself becomes words on a page, and never markup or code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Markdown's signs, a template's braces, HTML's, and what becomes a link by itself; as entities they are only shown.
_SIGNS = re.compile(r"[&<>{}`*\[\]#|~\\$]|(?<!\w)_|_(?!\w)|@(?!\d)|(?<!\w)@|(?<=\w):(?=//)|(?<=www)\.")
# What would make a list of a line, or underline the line above it.
_BEGINNING = re.compile(r"^([-+=]+|\d+[.)])(?=\s|$)")
_MARK = re.compile(r"<!-- yours: ([a-z][a-z-]*) -->\n(.*?)\n?<!-- end of \1 -->", re.DOTALL)


def plain(value: Any) -> str:
    """Any value as one line that Markdown, HTML and templates leave as it is."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(value)).split())
    line = _SIGNS.sub(lambda sign: _entities(sign[0]), line)
    return _BEGINNING.sub(lambda found: _entities(found[0]), line)


def _entities(signs: str) -> str:
    return "".join(f"&#{ord(sign)};" for sign in signs)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: int = 0) -> str:
    """A Markdown table of plain cells, the last ``numbers`` columns set to the right."""
    rule = ["---"] * (len(header) - numbers) + ["--:"] * numbers
    lines = [header, rule, *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts(entries: Mapping[str, Any]) -> str:
    """A two-column table of what is known; what is None is left out."""
    return table(["", ""], [(name, value) for name, value in entries.items() if value is not None])


def yours(name: str, text: str) -> str:
    """A part of the card that its owner writes, and that writing the card again leaves alone."""
    return f"<!-- yours: {name} -->\n{text.strip()}\n<!-- end of {name} -->"


def parts_of(card: str) -> dict[str, str]:
    """The owner's parts of a card by name, without their marks."""
    return {name: text.strip() for name, text in _MARK.findall(card)}


def replace_part(card: str, name: str, text: str) -> str:
    """``card`` with another text in its part ``name``, or with that part at its end where it has none such."""
    if name not in parts_of(card):
        return f"{card.rstrip()}\n\n{yours(name, text)}\n"
    return _MARK.sub(lambda found: yours(name, text) if found[1] == name else found[0], card)
