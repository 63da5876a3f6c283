"""Curves of a report as geometry that a template draws: thinned, scaled, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quiltnet.evaluation.comparison import lower_is_better
from quiltnet.release.report_scores import headline_metrics
from quiltnet.release.report_subjects import Subject, is_number

Point = tuple[float, float | None]

# Of the drawing, in its own units: one is a pixel where a chart is as wide as this.
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST_POINTS = 240  # of a line
MOST_TIPS = 12  # places of a line that tell their value to a pointer
TRAINING = {
    "train/loss": "Training loss",
    "train/logit_scale": "Logit scale",
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm",
    "train/samples_per_s": "Throughput, pairs per second",
}


@dataclass(frozen=True)
class Tick:
    """``place``: in the units of the drawing."""

    place: float
    label: str


@dataclass(frozen=True)
class Line:
    """Attributes:
    colour: the subject's.
    path: SVG path data; a value that was not finite breaks it.
    dots: (x, y) of points that have no neighbour to be joined to.
    tips: (x, y, text).
    """

    name: str
    colour: int
    path: str
    dots: list[tuple[float, float]]
    tips: list[tuple[float, float, str]]


@dataclass(frozen=True)
class LineChart:
    title: str
    description: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def training_charts(subjects: Sequence[Subject]) -> list[LineChart]:
    """Loss, logit scale, rate, gradient norm and throughput, those that were logged."""
    return _charts(subjects, TRAINING)


def evaluation_charts(subjects: Sequence[Subject]) -> list[LineChart]:
    """What stands for each evaluator, where it was measured at least twice."""
    titles = {
        f"{evaluator}/{metric}": f"{evaluator}: {readable(metric)}"
        for subject in subjects
        for evaluator, outcome in subject.own_outcomes.items()
        for metric in headline_metrics(list(outcome.get("scores", {})))
    }
    repeated = {name: title for name, title in titles.items() if any(len(s.series(name)) > 1 for s in subjects)}
    return _charts(subjects, repeated)


def readable(name: str) -> str:
    """A metric in words; an evaluator before it (``val_pairs: median_rank``) keeps its name."""
    evaluator, colon, metric = name.rpartition(": ")
    return evaluator + colon + metric.replace("_", " ")


def line_chart(title: str, series: Mapping[str, Sequence[Point]], colours: Sequence[int]) -> LineChart | None:
    """One line a name over samples seen, from 0; None where no value is finite."""
    finite = [(x, y) for points in series.values() for x, y in points if is_number(y)]
    if not finite:
        return None
    x_low, x_high = 0, max(x for x, _ in finite)
    x_ticks = round_ticks(x_low, x_high, 4)
    values = [y for _, y in finite]
    y_ticks = round_ticks(min(values), max(values), 4)
    y_low, y_high = min(*values, *y_ticks), max(*values, *y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = (x - x_low) / ((x_high - x_low) or 1), (y_high - y) / ((y_high - y_low) or 1)
        return round(LEFT + right * (WIDTH - LEFT - RIGHT), 1), round(TOP + down * (HEIGHT - TOP - BOTTOM), 1)

    lines = [_line(name, colour, points, place) for colour, (name, points) in zip(colours, series.items(), strict=True)]
    return LineChart(
        title,
        _description(title, series),
        lines,
        [Tick(place(x, y_low)[0], label) for x, label in tick_labels(x_ticks).items() if x <= x_high],
        [Tick(place(x_low, y)[1], label) for y, label in tick_labels(y_ticks).items()],
    )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many: of each stretch the lowest and the highest, so that no spike is lost; gaps stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if is_number(point[1])]
        if not finite:
            kept.append(stretch[0])
            continue
        extremes = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose or lie within the range."""
    if high == low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> dict[float, str]:
    """``2.5k``, ``0.003``, ``1e-05``: as short as they can be and still differ from each other."""
    for digits in range(1, 9):
        labels = {tick: _short_number(tick, digits) for tick in ticks}
        if len(set(labels.values())) == len(labels) and all(_is_exact(tick, digits) for tick in ticks):
            return labels
    return {tick: str(tick) for tick in ticks}


def _is_exact(tick: float, digits: int) -> bool:
    return math.isclose(float(f"{tick:.{digits}g}"), tick, rel_tol=1e-9)


def _short_number(value: float, digits: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{max(digits, 3)}g}{letter}"
    return f"{value:.{max(digits, 3)}g}" if value else "0"


def _charts(subjects: Sequence[Subject], titles: Mapping[str, str]) -> list[LineChart]:
    charts = []
    for metric, title in titles.items():
        found = [subject for subject in subjects if subject.series(metric)]
        series = {subject.name: subject.series(metric) for subject in found}
        charts.append(line_chart(title, series, [subject.colour for subject in found]))
    return [chart for chart in charts if chart is not None]


def _line(
    name: str, colour: int, points: Sequence[Point], place: Callable[[float, float], tuple[float, float]]
) -> Line:
    path, dots, shown = [], [], thinned(points)
    pen_is_down = False
    for index, (x, y) in enumerate(shown):
        if not is_number(y):
            pen_is_down = False
            continue
        across, down = place(x, y)
        path.append(f"{'L' if pen_is_down else 'M'}{across:g} {down:g}")
        if not pen_is_down and (index + 1 == len(shown) or not is_number(shown[index + 1][1])):
            dots.append((across, down))
        pen_is_down = True
    stride = math.ceil(len(shown) / MOST_TIPS)
    told = [*shown[:-1:stride], *shown[-1:]]
    tips = [(*place(x, y), f"{name}, {x:,}: {y:.5g}") for x, y in told if is_number(y)]
    return Line(name, colour, "".join(path), dots, tips)


def _description(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """What the chart says, in words."""
    parts = []
    for name, points in series.items():
        finite = [(x, y) for x, y in points if is_number(y)]
        if finite:
            (first, start), (last, end) = finite[0], finite[-1]
            parts.append(f"{name} from {start:.4g} at {first:,} samples to {end:.4g} at {last:,}")
    direction = " (lower is better)" if lower_is_better(title.rpartition(" ")[2]) else ""
    return f"{title}{direction}: {'; '.join(parts)}"
