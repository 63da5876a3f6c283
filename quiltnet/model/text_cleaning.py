"""open_clip's cleaning of a caption (ftfy, HTML, white space, case), without ftfy where it has nothing to do."""

from __future__ import annotations

import re
from collections.abc import Callable

from open_clip.tokenizer import canonicalize_text, get_clean_fn

# What ftfy 6 or html.unescape may change: anything but printable ASCII and white space, and what could begin an HTML
# entity. Of ASCII, ftfy changes entities, control characters (the escape of terminal codes among them) and carriage
# returns, which are white space to all that follows. Names of entities begin with two letters, so "H&E" is none.
_TOUCHED = re.compile(r"[^\t\n\f\r -~]|&(?:#|[0-9A-Za-z]{2})")


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _collapse(text: str) -> str:
    return " ".join(text.split())


# What is left of each of open_clip's cleanings where ftfy and html.unescape change nothing.
_UNTOUCHED_CLEANING = {
    get_clean_fn("lower"): _lower,
    get_clean_fn("whitespace"): _collapse,
    get_clean_fn("canonicalize"): canonicalize_text,
}


class Cleaning:
    """The same string as ``clean``, one of open_clip's; ftfy (20 µs) is left out where it has nothing to do (1 µs)."""

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._clean_untouched = _UNTOUCHED_CLEANING.get(clean, clean)

    def __call__(self, text: str) -> str:
        return self._clean(text) if _TOUCHED.search(text) else self._clean_untouched(text)
