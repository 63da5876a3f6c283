"""Tables of scores, and what training made better and worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quiltnet.evaluation.comparison import lower_is_better
from quiltnet.release.report_subjects import Subject, is_number
from quiltnet.training.averaging import AVERAGE_SUFFIX

Direction = Literal["better", "worse", "unclear"]

# What stands for an evaluator where there is room for one number or two; the first of these that it has.
HEADLINES = (
    ("loss",),
    ("balanced_accuracy",),
    ("image_to_text_recall@5", "text_to_image_recall@5"),
    ("image_to_text_recall@1", "text_to_image_recall@1"),
    ("accuracy@1",),
    ("accuracy",),
)


@dataclass(frozen=True)
class Shift:
    """One metric before and after.

    Attributes:
        last: the newest value, or that of the best checkpoint where the run ended with measuring it.
        interval: of ``last``, 95 %.
        change_interval: of the paired difference, 95 %, where one was computed.
        direction: ``unclear`` where the paired interval has zero in it; without one, where the start lies within
            ``interval``; without either it is decided by the sign alone.
    """

    evaluator: str
    metric: str
    start: float
    last: float
    interval: tuple[float, float] | None
    change_interval: tuple[float, float] | None
    direction: Direction

    @property
    def change(self) -> float:
        return self.last - self.start

    @property
    def is_paired(self) -> bool:
        return self.change_interval is not None


@dataclass(frozen=True)
class Verdict:
    """What became of a subject's metrics against its start, and those that stand for their evaluators."""

    subject: str
    start_name: str
    shifts: list[Shift]
    headlines: list[Shift]

    def of(self, direction: Direction) -> list[Shift]:
        return [shift for shift in self.shifts if shift.direction == direction]

    @property
    def without_interval(self) -> int:
        return sum(shift.interval is None and shift.change_interval is None for shift in self.shifts)

    @property
    def is_paired(self) -> bool:
        return any(shift.is_paired for shift in self.shifts)


@dataclass(frozen=True)
class ScoreCell:
    value: float | None
    interval: tuple[float, float] | None = None
    note: str = ""
    is_best: bool = False
    direction: Direction | None = None


@dataclass(frozen=True)
class EvaluatorTable:
    """Attributes:
    columns: heads of the columns after that of the metric.
    rows: metric -> a cell a column.
    headlines: metrics that stand for the evaluator.
    undefined: metric -> why it is missing.
    """

    evaluator: str
    columns: list[str]
    rows: dict[str, list[ScoreCell]]
    facts: str = ""
    undefined: Mapping[str, str] = field(default_factory=dict)
    headlines: Sequence[str] = ()


def headline_metrics(metrics: Sequence[str]) -> list[str]:
    """Those of an evaluator's metrics that stand for it."""
    for group in HEADLINES:
        if found := [metric for metric in group if metric in metrics]:
            return found
    return [metric for metric in metrics if metric.startswith("balanced_accuracy@")][-1:] or list(metrics[:1])


def verdict(subject: Subject) -> Verdict | None:
    """None where there is nothing to compare: no evaluation, no start, or nothing but the start."""
    if subject.is_untrained:
        return None
    shifts = [
        _shift(subject, evaluator, metric)
        for evaluator, outcome in subject.own_outcomes.items()
        for metric, value in outcome.get("scores", {}).items()
        if is_number(value) and f"{evaluator}/{metric}" in subject.start
    ]
    chosen = {
        (evaluator, metric)
        for evaluator, outcome in subject.own_outcomes.items()
        for metric in headline_metrics(list(outcome.get("scores", {})))
    }
    headlines = [shift for shift in shifts if (shift.evaluator, shift.metric) in chosen]
    return Verdict(subject.name, subject.start_name, shifts, headlines) if shifts else None


def score_tables(subjects: Sequence[Subject]) -> list[EvaluatorTable]:
    """A table an evaluator, in the order in which they come first."""
    names = dict.fromkeys(name for subject in subjects for name in subject.own_outcomes)
    make = _table_of_one if len(subjects) == 1 else _table_of_several
    return [make(subjects, name) for name in names]


def headline_table(tables: Sequence[EvaluatorTable]) -> EvaluatorTable:
    """What stands for each evaluator, of all of them in one table."""
    rows = {f"{table.evaluator}: {metric}": table.rows[metric] for table in tables for metric in table.headlines}
    return EvaluatorTable("all evaluators", tables[0].columns, rows)


def _shift(subject: Subject, evaluator: str, metric: str) -> Shift:
    name = f"{evaluator}/{metric}"
    start, last = subject.start[name], subject.final[name]
    interval = None if subject.best else subject.interval(evaluator, metric)  # of the best checkpoint none is kept
    paired = subject.changes.get(name)
    change_interval = paired[1:] if paired else None
    if change_interval is not None:
        is_clear = change_interval[0] > 0 or change_interval[1] < 0
    elif interval is not None:
        is_clear = not interval[0] <= start <= interval[1]
    else:
        is_clear = last != start
    is_better = (last < start) == lower_is_better(metric)
    direction = ("better" if is_better else "worse") if is_clear else "unclear"
    return Shift(evaluator, metric, start, last, interval, change_interval, direction)


def _table_of_one(subjects: Sequence[Subject], evaluator: str) -> EvaluatorTable:
    """Columns: start, last, change, best of several evaluations, average of the weights."""
    (subject,) = subjects
    averaged = f"{evaluator}{AVERAGE_SUFFIX}"
    metrics = _metrics(subjects, evaluator)
    evaluations = max((len(subject.series(f"{evaluator}/{metric}")) for metric in metrics), default=0)
    has_start = any(f"{evaluator}/{metric}" in subject.start for metric in metrics)
    columns = ["Start", "Last", "Change"] if has_start else ["Last"]
    columns += [_best_title(subject)] * (evaluations > 2 or bool(subject.best)) + ["Average (EMA)"] * (
        averaged in subject.outcomes
    )
    rows = {}
    for metric in metrics:
        name = f"{evaluator}/{metric}"
        last = ScoreCell(subject.scores.get(name), subject.interval(evaluator, metric))
        row = [ScoreCell(subject.start.get(name)), last, _change_cell(subject, evaluator, metric)]
        rows[metric] = row if has_start else [last]
        if subject.best:
            rows[metric].append(ScoreCell(subject.best["scores"].get(name)))
        elif evaluations > 2:
            rows[metric].append(_best_of_log(subject, name, metric))
        if averaged in subject.outcomes:
            value = subject.scores.get(f"{averaged}/{metric}")
            rows[metric].append(ScoreCell(value, subject.interval(averaged, metric)))
    undefined = subject.outcomes[evaluator].get("undefined", {})
    return EvaluatorTable(evaluator, columns, rows, _facts(subjects, evaluator), undefined, headline_metrics(metrics))


def _table_of_several(subjects: Sequence[Subject], evaluator: str) -> EvaluatorTable:
    """A column a subject, another for the average of its weights; the best of a row is marked."""
    sources = [
        (subject, subject.name + suffix.replace(AVERAGE_SUFFIX, " (EMA)"), evaluator + suffix)
        for subject in subjects
        for suffix in ("", AVERAGE_SUFFIX)
        if not suffix or any(name.endswith(suffix) for name in subject.outcomes)
    ]
    rows = {}
    metrics = _metrics(subjects, evaluator)
    for metric in metrics:
        values = [subject.scores.get(f"{name}/{metric}") for subject, _, name in sources]
        there = [value for value in values if value is not None]
        best = (min if lower_is_better(metric) else max)(there, default=None)
        rows[metric] = [
            ScoreCell(value, subject.interval(name, metric), is_best=len(there) > 1 and value == best)
            for value, (subject, _, name) in zip(values, sources, strict=True)
        ]
    undefined = {
        metric: why
        for subject in subjects
        for metric, why in subject.outcomes.get(evaluator, {}).get("undefined", {}).items()
    }
    columns = [label for _, label, _ in sources]
    return EvaluatorTable(evaluator, columns, rows, _facts(subjects, evaluator), undefined, headline_metrics(metrics))


def _change_cell(subject: Subject, evaluator: str, metric: str) -> ScoreCell:
    name = f"{evaluator}/{metric}"
    if name not in subject.start or name not in subject.scores:
        return ScoreCell(None)
    shift = _shift(subject, evaluator, metric)
    return ScoreCell(shift.change, shift.change_interval, direction=shift.direction)


def _best_title(subject: Subject) -> str:
    return f"Best checkpoint ({subject.best['samples_seen']:,})" if subject.best else "Best of log"


def _best_of_log(subject: Subject, name: str, metric: str) -> ScoreCell:
    points = [(value, samples) for samples, value in subject.series(name) if is_number(value)]
    if not points:
        return ScoreCell(None)
    value, samples = (min if lower_is_better(metric) else max)(points, key=lambda point: point[0])
    return ScoreCell(value, note=f"at {samples:,}")


def _metrics(subjects: Sequence[Subject], evaluator: str) -> list[str]:
    return list(
        dict.fromkeys(
            metric for subject in subjects for metric in subject.outcomes.get(evaluator, {}).get("scores", {})
        )
    )


def _facts(subjects: Sequence[Subject], evaluator: str) -> str:
    """Of the set: how many images or pairs, and what it may be used for."""
    said: Mapping[str, Any] = next(
        (subject.evaluators[evaluator] for subject in subjects if evaluator in subject.evaluators), {}
    )
    said = said.get("evaluator", said)  # of a robustness evaluator, the one that it repeats
    of_set = next((said[key] for key in ("dataset", "test") if isinstance(said.get(key), Mapping)), said)
    counted = [f"{of_set[unit]:,} {unit}" for unit in ("images", "pairs") if isinstance(of_set.get(unit), int)]
    split = of_set.get("split", said.get("split"))
    return ", ".join(counted + ([f"split {split}"] if split else []))
