"""The curve of one score against another, along a path between two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quiltnet.release.charts import PURPLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY = (0.45, 0.45, 0.45)


def trade_off_chart(
    points: Mapping[str, tuple[float, float]], *, x_label: str, y_label: str, chosen: str | None = None
) -> Figure:
    """What is lost of one score where another is won, as figure 1 of WiSE-FT (Wortsman et al. 2022) has it.

    Args:
        points: alpha as it is written -> (x, y), in the order of the path.
        chosen: the alpha whose point is marked.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    axis = figure.subplots()
    x, y = zip(*points.values(), strict=True)
    axis.plot(x, y, color=_GREY, marker="o", markersize=4, linewidth=1.2)
    if chosen is not None:
        axis.plot(*points[chosen], color=PURPLE, marker="*", markersize=14, linestyle="none")
    for alpha, place in points.items():
        weight, colour = ("bold", PURPLE) if alpha == chosen else ("normal", "black")
        axis.annotate(alpha, place, (6, 5), textcoords="offset points", fontsize=8, color=colour, fontweight=weight)
    axis.margins(0.1)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.set_title("alpha: 0 the base, 1 the tuned model", loc="left", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="gainsboro", linewidth=0.6)
    return figure
