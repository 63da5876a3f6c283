"""WiSE-FT in benchmarks/quality.py: a narrow fine-tuning, and what it forgets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality_data import Part, Tile, evaluators, final_part
from quality_run import Recipe, between, fine_tune

from quiltnet.evaluation.measuring import measure
from quiltnet.evaluation.outcome import Outcome
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.release.charts import save_chart
from quiltnet.release.curves import trade_off_chart

ALPHAS = tuple(step / 10 for step in range(11))
TARGET = ("atlas", "image_to_text_mean_average_precision")
GENERAL = ("zeroshot", "balanced_accuracy")


def trace_curve(start: ContrastiveModel, tiles: Sequence[Tile], recipe: Recipe, file: Path) -> list[dict[str, Any]]:
    """A point an alpha, from a model tuned on all of train to the same after as many samples of the atlas alone.

    The target is retrieval in the atlas; the general score is zero-shot on LC25000, of which the second run sees
    nothing. Both are of val. The points stay in ``file``.
    """
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    part = final_part(tiles, 1.0)
    base = fine_tune(start, part, recipe, 0)["last"]
    atlas = [tile for tile in part.train if tile.class_name is None]
    tuned = fine_tune(base, Part(atlas, part.held_out), replace(recipe, ema_decay=None), 0)["last"]
    scored = {name: evaluator for name, evaluator in evaluators(part).items() if name in ("zeroshot", "atlas")}
    points = []
    for alpha in ALPHAS:
        outcomes = measure(between(base, tuned, alpha), scored)
        points.append({"alpha": alpha, "target": _score(outcomes, *TARGET), "general": _score(outcomes, *GENERAL)})
    file.write_text(json.dumps(points), encoding="utf-8")
    return points


def draw_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Target against general score in percent, as png and svg."""
    places = {f"{point['alpha']:g}": (100 * point["general"][0], 100 * point["target"][0]) for point in points}
    labels = {"x_label": "LC25000 zero-shot, balanced accuracy (%)", "y_label": "atlas image to text, mAP (%)"}
    save_chart(trade_off_chart(places, **labels), path)


def curve_table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown, with intervals."""
    lines = ["| alpha | atlas image to text, mAP | LC25000 zero-shot, balanced accuracy |", "|---|---|---|"]
    for point in points:
        cells = [f"{100 * v:.1f} ({100 * low:.1f} to {100 * high:.1f})" for v, low, high in map(point.get, _NAMES)]
        lines.append(f"| {point['alpha']:g} | {' | '.join(cells)} |")
    return lines


_NAMES = ("target", "general")


def _score(outcomes: Mapping[str, Outcome], evaluator: str, metric: str) -> list[float]:
    """Value, low, high."""
    outcome = outcomes[evaluator]
    return [outcome.scores[metric], *outcome.intervals()[metric]]
