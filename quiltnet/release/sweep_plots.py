"""Pictures of a sweep: how much each option mattered, and which values led where.

PNG and SVG for a paper, and pages (HTML) in which one can select ranges; these hold all that they need, so that they
open without a network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quiltnet.release.charts import DARKEST_GREY, LIGHTEST_GREY, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna import Study

_TICKS = 5
_HEIGHT = 3.6  # inches


@dataclass(frozen=True)
class Scale:
    """An upright axis: a range of numbers, or choices from the bottom up."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()

    def height(self, value: Any) -> float:
        """From 0 at the bottom to 1 at the top."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high, value = (math.log(end) if self.log else end for end in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and what is written there."""
        if self.choices:
            return [(self.height(choice), choice) for choice in self.choices]
        if not self.high > self.low:
            return [(0.5, f"{self.low:.4g}")]
        values = np.linspace(self.low, self.high, _TICKS).tolist()
        if self.log:
            decades = range(math.floor(math.log10(self.low)) + 1, math.ceil(math.log10(self.high)))
            values = [self.low, *(10.0**decade for decade in decades), self.high]
        return [(self.height(value), f"{value:.3g}") for value in values]


@dataclass(frozen=True)
class TrialLine:
    """One trial: the values it took, by option, and where they led.

    Attributes:
        is_done: False for one that was ended early; ``outcome`` is its last number then.
    """

    values: Mapping[str, Any]
    outcome: float
    is_done: bool = True


def importance_chart(importances: Mapping[str, float], *, title: str = "") -> Figure:
    """A bar an option, the most important on top; shares that add up to 1."""
    from matplotlib.figure import Figure

    ordered = sorted(importances.items(), key=lambda item: item[1])
    figure = Figure(figsize=(5.5, 0.35 * len(ordered) + 1.1), layout="constrained")
    axis = figure.subplots()
    names, shares = [name for name, _ in ordered], [share for _, share in ordered]
    axis.barh(names, shares, color=PURPLE, height=0.6)
    for place, share in enumerate(shares):
        axis.annotate(f"{share:.2f}", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_xlim(0, max(1.12 * max(shares), 0.1))
    axis.set_xlabel("importance (share of the effect)", fontsize=9)
    axis.tick_params(labelsize=9, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure


def parallel_chart(
    lines: Sequence[TrialLine], scales: Mapping[str, Scale], *, outcome: str, lower_is_better: bool, title: str = ""
) -> Figure:
    """A line a trial through the values it took, to its outcome at the right.

    The best is purple, the others are the darker the better they are; those that were ended early are dashed.

    Args:
        scales: of each option, from left to right.
        outcome: name of the number at the right.
    """
    from matplotlib.figure import Figure

    ends = [line.outcome for line in lines]
    axes = {**scales, outcome: Scale(min(ends), max(ends))}
    figure = Figure(figsize=(max(1.9 * len(axes), 5.0), _HEIGHT), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(lines, key=lambda line: (line.is_done, -line.outcome if lower_is_better else line.outcome))
    done = sum(line.is_done for line in lines)
    shades = [LIGHTEST_GREY] * (len(lines) - done) + np.linspace(LIGHTEST_GREY, DARKEST_GREY, max(done, 1)).tolist()
    for place, (line, shade) in enumerate(zip(ordered, shades, strict=False)):
        is_best = place == len(ordered) - 1 and line.is_done
        heights = [scale.height({**line.values, outcome: line.outcome}[name]) for name, scale in axes.items()]
        axis.plot(
            range(len(axes)),
            heights,
            color=PURPLE if is_best else (shade,) * 3,
            linewidth=2.2 if is_best else 1.2,
            linestyle="-" if line.is_done else "--",
        )
    for place, scale in enumerate(axes.values()):
        _draw_scale(axis, place, scale)
    axis.set_xticks(range(len(axes)), list(axes), fontsize=9)
    axis.set_xlim(-0.35, len(axes) - 0.55)
    axis.set_ylim(-0.04, 1.04)
    axis.yaxis.set_visible(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure


def write_pages(study: Study, folder: Path) -> list[Path]:
    """``importance.html`` and ``parallel_coordinates.html`` of an optuna study, by optuna's own drawing."""
    from optuna.visualization import plot_parallel_coordinate, plot_param_importances

    written = []
    for name, draw in (("importance", plot_param_importances), ("parallel_coordinates", plot_parallel_coordinate)):
        written.append(folder / f"{name}.html")
        draw(study).write_html(written[-1], include_plotlyjs=True)
    return written


def _draw_scale(axis: Axes, place: int, scale: Scale) -> None:
    axis.plot([place, place], [0, 1], color="black", linewidth=0.8)
    for height, text in scale.ticks():
        axis.plot([place - 0.02, place], [height, height], color="black", linewidth=0.8)
        axis.annotate(
            text, (place, height), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        )  # fmt: skip
