"""What an image was taken from, by a regular expression of its path."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa

from quiltnet.errors import UserError


class SourcePattern:
    """Image path -> source: the group ``source`` of a regular expression, or its first group, or all that it matches.

    A path that it does not match is its own source. Among the filters of rows it keeps all, and has the last word if
    it has matched nothing.

    Raises:
        UserError: it is no regular expression.
    """

    reason = "filtered_source"

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--source-pattern {pattern}: {error}; it takes a regular expression of Python") from error
        self._group: str | int = "source" if "source" in self._pattern.groupindex else min(self._pattern.groups, 1)
        self._is_met = False

    def __call__(self, path: str) -> str:
        found = self._pattern.search(path)
        source = found[self._group] if found else None
        self._is_met |= bool(source)
        return source or path

    def keep(self, batch: pa.RecordBatch) -> np.ndarray:
        return np.ones(len(batch), bool)

    def check(self, where: str) -> None:
        if not self._is_met:
            raise UserError(f"--source-pattern {self._pattern.pattern} matches no image path of {where}; see its paths")

    def identity(self) -> Any:
        return self._pattern.pattern
