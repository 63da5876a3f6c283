"""What corruptions cost, as a chart and a table of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from quiltnet.release.report_curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    Line,
    LineChart,
    Tick,
    round_ticks,
    tick_labels,
)
from quiltnet.release.report_subjects import Subject

CLEAN = "clean"
ROOM = 64  # of a corruption's name
APART = 8  # of subjects at the same corruption


@dataclass(frozen=True)
class Robustness:
    """Attributes:
    columns: the subjects.
    drops: corruption -> of each subject what its metric lost, None where that is not defined.
    """

    evaluator: str
    metric: str
    chart: LineChart
    columns: list[str]
    drops: Mapping[str, list[float | None]]


def robustness(subjects: Sequence[Subject]) -> list[Robustness]:
    """Of the evaluators that measure drops: the metric as it is and under each corruption.

    Severities of one corruption (``hed_1``, ``hed_2``) are joined to a curve that begins with the clean value.
    """
    found = []
    for evaluator in dict.fromkeys(name for subject in subjects for name in subject.own_outcomes):
        measured = [subject.outcomes.get(evaluator, {}).get("scores", {}) for subject in subjects]
        keys = dict.fromkeys(key for scores in measured for key in scores if key.startswith("drop@"))
        corruptions = [key.removeprefix("drop@") for key in keys]
        metric = _metric(corruptions, measured)
        if metric is None:
            continue
        drops = {name: [scores.get(f"drop@{name}") for scores in measured] for name in corruptions}
        if any("mean_drop" in scores for scores in measured):
            drops["mean"] = [scores.get("mean_drop") for scores in measured]
        chart = _chart(subjects, evaluator, metric, corruptions)
        found.append(Robustness(evaluator, metric, chart, [subject.name for subject in subjects], drops))
    return found


def _metric(corruptions: Sequence[str], measured: Sequence[Mapping[str, float]]) -> str | None:
    """The metric that was measured under the corruptions."""
    ends = tuple(f"@{name}" for name in corruptions)
    keys = (key for scores in measured for key in scores if ends and key.endswith(ends) and key[:5] != "drop@")
    return next((key.partition("@")[0] for key in keys), None)


def _chart(subjects: Sequence[Subject], evaluator: str, metric: str, corruptions: Sequence[str]) -> LineChart:
    names = {CLEAN: metric, **{name: f"{metric}@{name}" for name in corruptions}}
    lows, highs = zip(
        *(
            subject.interval(evaluator, key) or (value, value)
            for subject in subjects
            for key in names.values()
            if (value := subject.scores.get(f"{evaluator}/{key}")) is not None
        ),
        strict=True,
    )
    ticks = round_ticks(min(lows), max(highs), 4)
    low, high = min(*ticks, *lows), max(*ticks, *highs)

    def down(value: float) -> float:
        return round(TOP + (high - value) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM), 1)

    width = LEFT + RIGHT + ROOM * len(names)
    places = {name: LEFT + ROOM * (number + 0.5) for number, name in enumerate(names)}
    lines = []
    for number, subject in enumerate(subjects):
        aside = APART * (number - (len(subjects) - 1) / 2)
        points = {
            name: (places[name] + aside, down(subject.scores[f"{evaluator}/{key}"]))
            for name, key in names.items()
            if f"{evaluator}/{key}" in subject.scores
        }
        ends = {name: subject.interval(evaluator, key) for name, key in names.items()}
        whiskers = "".join(
            f"M{points[name][0]:g} {down(found[0]):g}V{down(found[1]):g}"
            for name, found in ends.items()
            if found is not None and name in points
        )
        tips = [
            (*points[name], f"{subject.name}, {name}: {subject.scores[f'{evaluator}/{key}']:.3f}")
            for name, key in names.items()
            if name in points
        ]
        lines.append(Line(subject.name, subject.colour, _curves(points) + whiskers, list(points.values()), tips))
    title = f"{evaluator}: {metric.replace('_', ' ')}"
    return LineChart(
        title,
        f"{title}; {'; '.join(tip for line in lines for _, _, tip in line.tips)}",
        lines,
        [Tick(place, name.replace("_", " ")) for name, place in places.items()],
        [Tick(down(value), label) for value, label in tick_labels(ticks).items()],
        width=width,
    )


def _curves(points: Mapping[str, tuple[float, float]]) -> str:
    """A curve through each corruption of several severities that directly follows the clean value."""
    paths = []
    for family, members in groupby((name for name in points if name != CLEAN), key=_family):
        severities = list(members)
        if len(severities) > 1 and family:
            start = [CLEAN] if CLEAN in points and not paths else []
            joined = [points[name] for name in [*start, *severities]]
            paths.append("M" + "L".join(f"{x:g} {y:g}" for x, y in joined))
    return "".join(paths)


def _family(name: str) -> str:
    return re.sub(r"[_-]?\d+$", "", name)
