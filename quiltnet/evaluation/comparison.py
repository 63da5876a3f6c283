"""Several models on the same sets, side by side: the best of each number, and how sure a difference is."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from quiltnet.errors import UserError
from quiltnet.evaluation.outcome import Difference, Outcome, paired_difference

# Last word of a metric's name, its variant (what follows ``@``) taken off.
_LESS_IS_BETTER = ("rank", "loss", "error", "drop")
_LATEX_SIGNS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", **{sign: f"\\{sign}" for sign in "{}$&#_%"}
}  # fmt: skip
MISSING = "-"


def lower_is_better(metric: str) -> bool:
    """Of ``median_rank``, losses, errors of calibration and drops; of every other metric higher is better.

    Args:
        metric: its name, or ``evaluator/metric``.
    """
    return metric.rpartition("/")[2].partition("@")[0].split("_")[-1] in _LESS_IS_BETTER


@dataclass(frozen=True)
class Cell:
    """One metric of one model.

    Attributes:
        interval: 95 %, low and high; None where the metric has no replicates.
        difference: to the baseline, on the same items; None for the baseline itself and where it cannot be paired.
        is_best: of at least two models; all that share the best value are.
    """

    value: float
    interval: tuple[float, float] | None
    difference: Difference | None
    is_best: bool


@dataclass(frozen=True)
class Row:
    """One metric of one evaluator; a model that it is not defined for has no cell."""

    evaluator: str
    metric: str
    cells: Mapping[str, Cell]


class Comparison:
    """Outcomes of several models, a row a metric.

    Args:
        outcomes: model -> evaluator -> what it found.
        baseline: the model that the others are compared with; the first one by default.

    Raises:
        UserError: there is no model, or ``baseline`` is none of them.
    """

    def __init__(self, outcomes: Mapping[str, Mapping[str, Outcome]], baseline: str | None = None) -> None:
        self.outcomes = outcomes
        self.models = list(outcomes)
        if not self.models:
            raise UserError("there is no model to compare; give one at least")
        if baseline is not None and baseline not in outcomes:
            near = difflib.get_close_matches(baseline, self.models, n=1, cutoff=0.0)
            raise UserError(f"baseline={baseline} is none of the models that are compared; the nearest: {near[0]}")
        self.baseline = baseline if baseline is not None else self.models[0]

    @property
    def others(self) -> list[str]:
        """The models beside the baseline."""
        return [model for model in self.models if model != self.baseline]

    @cached_property
    def rows(self) -> list[Row]:
        """Evaluators, and the metrics of each, in the order of the first model that has them."""
        evaluators = dict.fromkeys(name for found in self.outcomes.values() for name in found)
        rows = []
        for evaluator in evaluators:
            found = {model: outcomes[evaluator] for model, outcomes in self.outcomes.items() if evaluator in outcomes}
            intervals = {model: outcome.intervals() for model, outcome in found.items()}
            for metric in dict.fromkeys(metric for outcome in found.values() for metric in outcome.scores):
                rows.append(Row(evaluator, metric, self._cells(found, intervals, metric)))
        return rows

    def values(self, metric: str) -> dict[str, dict[str, float]]:
        """model -> evaluator -> value of one metric, for a chart."""
        return {
            model: {row.evaluator: row.cells[model].value for row in self._rows_of(metric, model)}
            for model in self.models
        }

    def intervals(self, metric: str) -> dict[str, dict[str, tuple[float, float]]]:
        """model -> evaluator -> 95 % interval of one metric."""
        return {
            model: {
                row.evaluator: row.cells[model].interval
                for row in self._rows_of(metric, model)
                if row.cells[model].interval is not None
            }
            for model in self.models
        }

    def curve(self, evaluator: str, metric: str, unit: str = "") -> dict[str, dict[float, float]]:
        """model -> number -> value, of the variants ``metric@`` with a number and a unit.

        Args:
            unit: as it follows the number (``-shot``, ``%``), or, ending in ``=``, as it comes before it (``dim=``).
        """
        return {
            model: {number: cell.value for number, cell in self._variants(evaluator, metric, unit, model).items()}
            for model in self.models
        }

    def curve_intervals(
        self, evaluator: str, metric: str, unit: str = ""
    ) -> dict[str, dict[float, tuple[float, float]]]:
        """model -> number -> 95 % interval, as ``curve``."""
        variants = {model: self._variants(evaluator, metric, unit, model) for model in self.models}
        return {
            model: {number: cell.interval for number, cell in cells.items() if cell.interval is not None}
            for model, cells in variants.items()
        }

    def value_table(self) -> list[list[str]]:
        """Text, the header first: evaluator, metric, and of each model value and interval; ``*`` before the best."""
        return self._value_table(_PLAIN)

    def difference_table(self) -> list[list[str]]:
        """Text, the header first: the other models less the baseline, with the interval of the paired bootstrap.

        ``*`` before a difference whose interval leaves zero out. The header alone where nothing could be paired.
        """
        return self._difference_table(_PLAIN)

    def to_csv(self) -> str:
        """A line a metric and model, numbers unrounded."""
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(
            ["evaluator", "metric", "model", "value", "low", "high", "is_best", "baseline", "difference",
             "difference_low", "difference_high"]
        )  # fmt: skip
        for row in self.rows:
            for model, cell in row.cells.items():
                change = cell.difference
                differences = [self.baseline, change.value, change.low, change.high] if change else [""] * 4
                low, high = cell.interval or ("", "")
                best = str(cell.is_best).lower()
                writer.writerow([row.evaluator, row.metric, model, cell.value, low, high, best, *differences])
        return lines.getvalue()

    def to_markdown(self) -> str:
        """Two tables: values, the best bold; differences to the baseline, bold where the interval leaves zero out."""
        parts = [_markdown(self._value_table(_MARKDOWN))]
        differences = self._difference_table(_MARKDOWN)
        if len(differences) > 1:
            parts.append(f"Difference to {_escape_markdown(self.baseline)}, paired on the same items:\n")
            parts.append(_markdown(differences))
        return "\n".join(parts)

    def to_latex(self) -> str:
        r"""As ``to_markdown``: one or two ``tabular`` that need ``\usepackage{booktabs}``."""
        tables = [_latex(self._value_table(_LATEX))]
        differences = self._difference_table(_LATEX)
        if len(differences) > 1:
            tables.append(f"% Difference to {self.baseline}, paired on the same items.\n" + _latex(differences))
        return "\n".join(tables)

    def _cells(
        self,
        found: Mapping[str, Outcome],
        intervals: Mapping[str, Mapping[str, tuple[float, float]]],
        metric: str,
    ) -> dict[str, Cell]:
        values = {model: outcome.scores[metric] for model, outcome in found.items() if metric in outcome.scores}
        best = (min if lower_is_better(metric) else max)(values.values())
        cells = {}
        for model, value in values.items():
            difference = None
            if model != self.baseline and self.baseline in values:
                difference = paired_difference(found[model], found[self.baseline], metric)
            is_best = len(values) > 1 and value == best
            cells[model] = Cell(value, intervals[model].get(metric), difference, is_best)
        return cells

    def _rows_of(self, metric: str, model: str) -> list[Row]:
        return [row for row in self.rows if row.metric == metric and model in row.cells]

    def _variants(self, evaluator: str, metric: str, unit: str, model: str) -> dict[float, Cell]:
        before, after = (unit, "") if unit.endswith("=") else ("", unit)
        pattern = re.compile(rf"{re.escape(f'{metric}@{before}')}(\d+(?:\.\d+)?){re.escape(after)}")
        cells = {}
        for row in self.rows:
            match = pattern.fullmatch(row.metric)
            if match and row.evaluator == evaluator and model in row.cells:
                cells[float(match[1])] = row.cells[model]
        return dict(sorted(cells.items()))

    def _value_table(self, notation: _Notation) -> list[list[str]]:
        table = [["evaluator", "metric", *map(notation.escape, self.models)]]
        for row in self.rows:
            cells = [row.cells.get(model) for model in self.models]
            texts = [notation.value(cell.value, cell.interval, cell.is_best) if cell else MISSING for cell in cells]
            table.append([notation.escape(row.evaluator), notation.escape(row.metric), *texts])
        return table

    def _difference_table(self, notation: _Notation) -> list[list[str]]:
        table = [["evaluator", "metric", *map(notation.escape, self.others)]]
        for row in self.rows:
            changes = [row.cells[model].difference if model in row.cells else None for model in self.others]
            if any(change is not None for change in changes):
                texts = [notation.difference(change) if change else MISSING for change in changes]
                table.append([notation.escape(row.evaluator), notation.escape(row.metric), *texts])
        return table


def _markdown(table: list[list[str]]) -> str:
    header, *rows = table
    alignment = ["---", "---", *["---:"] * (len(header) - 2)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, alignment, *rows))


def _latex(table: list[list[str]]) -> str:
    header, *rows = table
    lines = [f"\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}", r"\toprule", _latex_line(header), r"\midrule"]
    for above, cells in zip([header, *rows], rows, strict=False):
        if above is not header and above[0] != cells[0]:
            lines.append(r"\addlinespace")
        lines.append(_latex_line(cells))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape_markdown(text: str) -> str:
    """What would end a cell or change the type; an underscore inside a word does neither."""
    return re.sub(r"[\\`*|<>\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _escape_latex(text: str) -> str:
    return "".join(_LATEX_SIGNS.get(sign, sign) for sign in text)


@dataclass(frozen=True)
class _Notation:
    """How a table's format writes a marked number, a minus and a name."""

    marked: str
    minus: str
    escape: Callable[[str], str]

    def value(self, value: float, interval: tuple[float, float] | None, is_marked: bool, sign: str = "") -> str:
        text = self.marked.format(self._number(value, sign)) if is_marked else self._number(value, sign)
        return f"{text} ({' to '.join(self._number(end, sign) for end in interval)})" if interval else text

    def difference(self, change: Difference) -> str:
        return self.value(change.value, (change.low, change.high), change.is_clear, sign="+")

    def _number(self, value: float, sign: str) -> str:
        text = f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign}.1f}"
        return text.replace("-", self.minus)


_PLAIN = _Notation("* {}", "-", str)
_MARKDOWN = _Notation("**{}**", "-", _escape_markdown)
_LATEX = _Notation(r"\textbf{{{}}}", "$-$", _escape_latex)
