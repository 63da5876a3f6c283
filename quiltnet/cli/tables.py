"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_before_and_after(
    start: Mapping[str, float], last: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> None:
    """What training changed, a metric a line; ``intervals`` of the change, for those that have one."""
    if not last:
        return
    table = Table("metric", "before", "after", "change", "95 % interval")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in last.items():
        before = start.get(name, float("nan"))
        interval = "{:+.4f} to {:+.4f}".format(*intervals[name]) if name in intervals else ""
        table.add_row(name, f"{before:.4f}", f"{value:.4f}", f"{value - before:+.4f}", interval)
    print_table(table)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Rows of text, the header first."""
    header, *rest = rows
    table = Table(*header)
    for row in rest:
        table.add_row(*map(escape, row))
    print_table(table)


def print_trials(rows: Sequence[tuple[str, str, str]], outcome: str) -> None:
    """Trials of a sweep: where each lies, what it changed, what came of it."""
    table = Table("trial", "overrides", outcome)
    for row in rows:
        table.add_row(*map(escape, row))
    print_table(table)


def print_table(table: Table) -> None:
    """Names are never cut or broken: where no terminal says how wide it is, a line is as long as it needs."""
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
