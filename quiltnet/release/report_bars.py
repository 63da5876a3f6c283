"""Grouped bars and confusion matrices of a report as geometry that a template draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quiltnet.release.report_subjects import AVERAGE_COLOUR, START_COLOUR, Subject
from quiltnet.training.averaging import AVERAGE_SUFFIX

Interval = tuple[float, float]

BAR_WIDTH, BAR_GAP, BAR_HEIGHT, ROOM_ABOVE = 26, 4, 150, 18
MOST_CLASSES = 24  # of a confusion matrix that is shown
ZEROSHOT_TYPE = "ZeroShotClassification"


@dataclass(frozen=True)
class Bar:
    """Heights are in the units of the drawing, from the base line up.

    Attributes:
        ends: of its interval.
    """

    name: str
    colour: int
    x: float
    height: float
    label: str
    ends: tuple[float, float] | None
    is_best: bool


@dataclass(frozen=True)
class BarGroup:
    title: str
    description: str
    bars: list[Bar]
    width: int
    height: int = BAR_HEIGHT + ROOM_ABOVE


@dataclass(frozen=True)
class BarChart:
    """``legend``: (name, colour)."""

    title: str
    groups: list[BarGroup]
    legend: list[tuple[str, int]]


@dataclass(frozen=True)
class HeatRow:
    """A true class. ``cells``: (percent of its images, images); ``images``: how many it has."""

    name: str
    images: int
    cells: list[tuple[float, int]]


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix; ``predicted`` ends with ``none`` where some image had no single best class."""

    subject: str
    evaluator: str
    predicted: list[str]
    rows: list[HeatRow]


def zeroshot_bars(subjects: Sequence[Subject]) -> BarChart | None:
    """Balanced accuracy of class prompts, a group an evaluator, the best bar of each group hatched.

    One subject is drawn beside its start and the average of its weights, several beside each other. None where no
    evaluator classifies by prompts.
    """
    metric = "balanced_accuracy"
    names = [
        name for name in dict.fromkeys(n for s in subjects for n in s.own_outcomes) if _is_zeroshot(subjects, name)
    ]
    columns: list[tuple[str, int, Any]] = []
    for subject in subjects:
        if len(subjects) == 1:
            columns.append(
                (subject.start_name, START_COLOUR, lambda name, s=subject: (s.start.get(f"{name}/{metric}"), None))
            )
            columns.append(
                ("Average (EMA)", AVERAGE_COLOUR, lambda name, s=subject: _scored(s, name + AVERAGE_SUFFIX, metric))
            )
        columns.append((subject.name, subject.colour, lambda name, s=subject: _scored(s, name, metric)))
    columns = [column for column in columns if any(column[2](name)[0] is not None for name in names)]
    groups = [_group(name, [(label, colour, *of(name)) for label, colour, of in columns]) for name in names]
    groups = [group for group in groups if group is not None]
    legend = [(label, colour) for label, colour, _ in columns]
    return BarChart("Zero-shot balanced accuracy, percent", groups, legend) if groups else None


def confusions(subjects: Sequence[Subject]) -> list[Confusion]:
    """Of every evaluator that has one of at most 24 classes; zero-shot first."""
    found = [
        _confusion(subject.name, evaluator, outcome)
        for evaluator in dict.fromkeys(name for subject in subjects for name in subject.own_outcomes)
        for subject in subjects
        if (outcome := subject.outcomes.get(evaluator, {})).get("confusion_matrix")
        and len(outcome["confusion_matrix"]) <= MOST_CLASSES
    ]
    return sorted(found, key=lambda matrix: not _is_zeroshot(subjects, matrix.evaluator))


def _is_zeroshot(subjects: Sequence[Subject], evaluator: str) -> bool:
    """By its class in the config; of an evaluation, which keeps no config, by its name or its prompts."""
    for subject in subjects:
        made = (subject.config.get("evaluator") or {}).get(evaluator)
        if isinstance(made, Mapping):
            return str(made.get("_target_", "")).endswith(ZEROSHOT_TYPE)
    return any("prompts" in subject.evaluators.get(evaluator, {}) for subject in subjects)


def _scored(subject: Subject, evaluator: str, metric: str) -> tuple[float | None, Interval | None]:
    return subject.scores.get(f"{evaluator}/{metric}"), subject.interval(evaluator, metric)


def _group(name: str, columns: Sequence[tuple[str, int, float | None, Interval | None]]) -> BarGroup | None:
    there = [value for _, _, value, _ in columns if value is not None]
    if not there:
        return None
    bars = []
    for place, (label, colour, value, interval) in enumerate(columns):
        ends = (interval[0] * BAR_HEIGHT, interval[1] * BAR_HEIGHT) if interval else None
        bars.append(
            Bar(
                name=label,
                colour=colour,
                x=place * (BAR_WIDTH + BAR_GAP),
                height=round((value or 0) * BAR_HEIGHT, 1),
                label="–" if value is None else f"{100 * value:.0f}",
                ends=ends,
                is_best=len(there) > 1 and value == max(there),
            )
        )
    said = ", ".join(f"{bar.name} {bar.label}" for bar in bars)
    title = name.removeprefix("zeroshot_").replace("_", " ")
    return BarGroup(title, f"{name}: {said}", bars, len(bars) * (BAR_WIDTH + BAR_GAP) - BAR_GAP)


def _confusion(subject: str, evaluator: str, outcome: Mapping[str, Any]) -> Confusion:
    matrix = outcome["confusion_matrix"]
    names = list(outcome.get("per_class") or map(str, range(1, len(matrix) + 1)))
    predicted = [*names, "none"]
    if not any(row[-1] for row in matrix):
        matrix, predicted = [row[:-1] for row in matrix], predicted[:-1]
    rows = [
        HeatRow(name, sum(row), [(100 * count / max(sum(row), 1), count) for count in row])
        for name, row in zip(names, matrix, strict=True)
    ]
    return Confusion(subject, evaluator, predicted, rows)
