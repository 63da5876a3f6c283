"""Charts of results: grouped bars as in the figure of Quilt-1M, confusion matrices, curves.

Figures are drawn without pyplot, so that nothing global is left behind. matplotlib is imported where it is used: a
command that draws nothing must not wait for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quiltnet.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Interval = tuple[float, float]
Colour = tuple[float, float, float]

LIGHTEST_GREY, DARKEST_GREY = 0.82, 0.28
PURPLE = (0.47, 0.18, 0.57)
MARKERS = "osD^vP"
DOTS_PER_INCH = 200
SETTINGS = {"hatch.linewidth": 1.4, "svg.hashsalt": "quiltnet"}  # without a salt each SVG has ids of its own

# Inches.
LETTER_WIDTH = 0.085  # of 9 points, on average
LINE_HEIGHT = 0.16
MAX_WIDTH = 12.0  # groups of bars that need more go on in another row
BAR_WIDTH = 0.27  # room for "100" in 8 points
BAR_HEIGHT = 2.3
GROUP_GAP = 0.35
MIN_GROUP_WIDTH = 1.15
CELL = 0.55
MARGIN = 0.2


def bar_chart(
    values: Mapping[str, Mapping[str, float]],
    *,
    intervals: Mapping[str, Mapping[str, Interval]] | None = None,
    title: str = "",
    percent: bool = True,
    lower_is_better: bool = False,
) -> Figure:
    """One metric as bars, a group an evaluator and a bar a model; the best bar of each group is hatched.

    Greys and purple, hatching, numbers above the bars and no y axis: as the zero-shot figure of Quilt-1M
    (https://github.com/wisdomikezogwo/quilt1m) has them. The last model is the purple one.

    Args:
        values: model -> evaluator -> value.
        intervals: model -> evaluator -> (low, high), drawn as error bars.
        percent: whether values are shares, written as integer percent.
        lower_is_better: which bar is the best; all that share the best value are.

    Raises:
        UserError: there is no value.
    """
    groups = list(dict.fromkeys(group for of_groups in values.values() for group in of_groups))
    if not groups:
        raise UserError("there is nothing to draw bars of; choose a metric that an evaluator has")
    group_width = max(len(values) * BAR_WIDTH + GROUP_GAP, MIN_GROUP_WIDTH)
    rows = math.ceil(len(groups) * group_width / MAX_WIDTH)
    columns = math.ceil(len(groups) / rows)
    labels = {group: _wrapped(group, int((group_width - 0.12) / LETTER_WIDTH)) for group in groups}
    label_height = LINE_HEIGHT * max(label.count("\n") + 1 for label in labels.values())
    figure = _new_figure(max(columns * group_width, 3.5), rows * (BAR_HEIGHT + label_height), values, title)
    axes = np.atleast_1d(figure.subplots(rows, 1, sharey=True))
    for row, axis in enumerate(axes):
        shown = groups[row * columns : (row + 1) * columns]
        for place, group in enumerate(shown):
            of_models = {model: of_groups.get(group) for model, of_groups in values.items()}
            ends = {model: of_groups[group] for model, of_groups in (intervals or {}).items() if group in of_groups}
            _draw_group(axis, place * group_width, of_models, ends, percent, lower_is_better)
        axis.set_xticks([place * group_width for place in range(len(shown))], [labels[group] for group in shown])
        axis.set_xlim(-group_width / 2, figure.get_figwidth() - MARGIN - group_width / 2)  # a unit an inch
        axis.tick_params(length=0, labelsize=9)
        axis.yaxis.set_visible(False)
        axis.spines[:].set_visible(False)
        axis.axhline(0, color="black", linewidth=0.8)
    axes[0].margins(y=0.1)  # for the numbers above the bars
    return figure


def confusion_chart(matrix: Sequence[Sequence[int]], class_names: Sequence[str], *, title: str = "") -> Figure:
    """A confusion matrix: percent of each true class, with counts.

    Args:
        matrix: C rows of C + 1 counts: truth in class order; predicted classes, then ``none``, which is drawn where
            it is not empty.
        class_names: C.

    Raises:
        UserError: the matrix does not fit the classes.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(class_names), len(class_names) + 1):
        raise UserError(
            f"a confusion matrix of {len(class_names)} classes has {len(class_names)} rows of "
            f"{len(class_names) + 1} counts, the last for no class; this one is of shape {counts.shape}"
        )
    predicted = [*class_names, "none"]
    if not counts[:, -1].any():
        counts, predicted = counts[:, :-1], predicted[:-1]
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    labels = [_wrapped(name, 22, lines=3) for name in predicted]
    letters = max(len(line) for label in labels for line in label.split("\n"))
    width, height = CELL * counts.shape[1] + LETTER_WIDTH * letters, CELL * len(counts) + LETTER_WIDTH * letters
    figure = _new_figure(width + 0.4, height + 0.4, [], title)
    axis = figure.subplots()
    axis.imshow(shares, cmap="Purples", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if totals[row, 0]:
            _draw_cell(axis, row, column, shares[row, column], count)
        elif column == 0:
            axis.text(0, row, "no image", ha="center", va="center", fontsize=7, color="grey")
    # Several lines are legible side by side only where they stand upright.
    rotation = 90 if any("\n" in label for label in labels) else 45
    slanted = {} if rotation == 90 else {"ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(predicted)), labels, rotation=rotation, **slanted)
    axis.set_yticks(range(len(class_names)), labels[: len(class_names)])
    axis.tick_params(length=0, labelsize=9)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.spines[:].set_visible(False)
    return figure


def line_chart(
    lines: Mapping[str, Mapping[float, float]],
    *,
    x_label: str,
    y_label: str,
    intervals: Mapping[str, Mapping[float, Interval]] | None = None,
    title: str = "",
    log_x: bool = True,
) -> Figure:
    """A curve a model, such as accuracy against the number of examples or of dimensions.

    Args:
        lines: model -> x -> value. The last model is the purple one.
        intervals: model -> x -> (low, high), drawn as error bars, those of the models beside each other.
        log_x: whether equal factors of x are equally far apart; then each x must be positive.

    Raises:
        UserError: there is no point.
    """
    from matplotlib.transforms import offset_copy

    if not any(lines.values()):
        raise UserError("there is nothing to draw a curve of; choose a metric that has several variants")
    figure = _new_figure(6.0, 3.6, lines, title, MARKERS)
    axis = figure.subplots()
    if log_x:
        axis.set_xscale("log", base=2)
    for number, (model, colour) in enumerate(zip(lines, _colours(len(lines)), strict=True)):
        points = sorted(lines[model].items())
        ends = (intervals or {}).get(model, {})
        apart = 3 * (number - (len(lines) - 1) / 2) if intervals else 0
        x, value = zip(*points, strict=True) if points else ((), ())
        drawn = axis.plot(x, value, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=5)
        drawn += [axis.plot([x, x], ends[x], color=colour, linewidth=1.0)[0] for x in ends]
        for line in drawn:  # after the axis has seen where its points are
            line.set_transform(offset_copy(axis.transData, figure, x=apart, units="points"))
    ticks = sorted({x for points in lines.values() for x in points})
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="gainsboro", linewidth=0.6)
    return figure


def save_chart(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` with the endings .png and .svg, the same bytes for the same chart; returns both."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.parent / f"{path.name}.{ending}" for ending in ("png", "svg")]
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(written[0], dpi=DOTS_PER_INCH, metadata={"Software": None})
        figure.savefig(written[1], metadata={"Date": None})
    return written


def _draw_group(
    axis: Axes,
    centre: float,
    values: Mapping[str, float | None],
    intervals: Mapping[str, Interval],
    percent: bool,
    lower_is_better: bool,
) -> None:
    there = [value for value in values.values() if value is not None]
    best = (min if lower_is_better else max)(there)
    place = centre - (len(values) - 1) * BAR_WIDTH / 2
    for (model, value), colour in zip(values.items(), _colours(len(values)), strict=True):
        if value is None:
            _write_above(axis, place, 0, "–")
        else:
            is_best = len(there) > 1 and value == best
            hatching = {"hatch": "////", "edgecolor": "white" if sum(colour) < 2 else "grey"} if is_best else {}
            axis.bar(place, value, BAR_WIDTH * 0.92, color=colour, linewidth=0, **hatching)
            low, high = intervals.get(model, (value, value))
            axis.plot([place, place], [low, high], color="black", linewidth=1.0, solid_capstyle="butt")
            text = f"{100 * value:.0f}" if percent else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
            _write_above(axis, place, max(value, high, 0), text, is_bold=is_best)
        place += BAR_WIDTH


def _write_above(axis: Axes, place: float, height: float, text: str, *, is_bold: bool = False) -> None:
    weight = "bold" if is_bold else "normal"
    axis.annotate(
        text, (place, height), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8, weight=weight
    )


def _draw_cell(axis: Axes, row: int, column: int, share: float, count: int) -> None:
    colour = "white" if share > 0.5 else "black" if count else "silver"
    axis.text(column, row - 0.13, f"{100 * share:.0f} %", ha="center", va="center", fontsize=9, color=colour)
    axis.text(column, row + 0.2, f"{count:,}", ha="center", va="center", fontsize=7, color=colour)


def _new_figure(width: float, height: float, models: Sequence[str], title: str, markers: str = "") -> Figure:
    """A figure whose axes have about this size in inches, below a title and a legend of the models.

    Args:
        markers: of the models' lines; without, the legend shows patches.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    longest = max((len(model) for model in models), default=0)
    columns = max(1, min(len(models), int(width / (longest * LETTER_WIDTH + 0.6))))
    width = max(width, longest * LETTER_WIDTH + 0.7)
    title = _wrapped(title, int(width / (1.25 * LETTER_WIDTH)))
    lines = 1.3 * math.ceil(len(models) / columns) + 1.5 * (title.count("\n") + 1) * bool(title)
    figure = Figure(figsize=(width + MARGIN, height + LINE_HEIGHT * lines + 0.1), layout="constrained")
    if not models:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        return figure
    handles = []
    for number, (model, colour) in enumerate(zip(models, _colours(len(models)), strict=True)):
        marker = {"marker": markers[number % len(markers)]} if markers else None
        handles.append(
            Line2D([], [], color=colour, label=model, **marker) if marker else Patch(color=colour, label=model)
        )
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, title=title,
        title_fontsize=11, alignment="left"
    )  # fmt: skip
    return figure


def _colours(count: int) -> list[Colour]:
    """Greys from light to dark, then purple."""
    greys = np.linspace(LIGHTEST_GREY, DARKEST_GREY, count - 1) if count > 2 else [0.65]
    return [*((float(grey),) * 3 for grey in greys), PURPLE][-count:] if count else []


def _wrapped(name: str, letters: int, *, lines: int = 4) -> str:
    """On at most so many lines of so many letters, broken after words, underscores and slashes where there are any."""
    pieces = re.findall(r"[^\s_/-]*[\s_/-]*", name)
    parts: list[str] = []
    for piece in pieces:
        if parts and len((parts[-1] + piece).rstrip()) <= letters:
            parts[-1] += piece
        else:
            parts += [piece[start : start + letters] for start in range(0, len(piece), letters)]
    shown = [part.strip() for part in parts[:lines]]
    if len(parts) > lines:
        shown[-1] = shown[-1][: letters - 1] + "…"
    return "\n".join(shown)
