"""The folder that an evaluation leaves: results.json, tables, charts."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quiltnet.cli.run_directory import check_writable, describe_environment
from quiltnet.errors import UserError
from quiltnet.evaluation.comparison import Comparison, lower_is_better
from quiltnet.evaluation.outcome import json_ready
from quiltnet.release.charts import bar_chart, confusion_chart, line_chart, save_chart
from quiltnet.release.run_files import RESULTS_NAME

log = logging.getLogger(__name__)

MOST_CLASSES = 16  # of a confusion matrix that can still be read as a picture
# Variants of a metric that make a curve: ``metric@4-shot``, ``metric@10%``, ``metric@dim=256``.
CURVES = {
    "-shot": ("shots", "images a class"),
    "%": ("fractions", "percent of the training images"),
    "dim=": ("dimensions", "dimensions of the embedding"),
}


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raises UserError where the results could not be written hours later, or would replace others unasked."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file; give a folder: it gets results.json, tables and charts")
    if (folder / RESULTS_NAME).exists() and not overwrite:
        raise UserError(f"output={folder} holds results already; give another folder, or say overwrite=true")
    check_writable(folder / RESULTS_NAME)


def write_comparison(folder: Path, comparison: Comparison, choices: Mapping[str, Any], *, chart_metric: str) -> None:
    """All files of a comparison; each appears when it is whole, results.json last.

    Args:
        choices: whatever else ``results.json`` has to say: models, evaluators, precision.
        chart_metric: of the bars.
    """
    results = {**choices, **_outcomes(comparison), "environment": describe_environment()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        place = Path(unfinished)
        (place / "results.csv").write_text(comparison.to_csv(), encoding="utf-8")
        (place / "results.md").write_text(comparison.to_markdown(), encoding="utf-8")
        (place / "results.tex").write_text(comparison.to_latex(), encoding="utf-8")
        _draw_charts(place, comparison, chart_metric)
        for file in sorted(place.iterdir()):
            file.replace(folder / file.name)
        (place / RESULTS_NAME).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (place / RESULTS_NAME).replace(folder / RESULTS_NAME)


def _outcomes(comparison: Comparison) -> dict[str, Any]:
    differences: dict[str, dict[str, Any]] = {model: {} for model in comparison.others}
    for row in comparison.rows:
        for model, cell in row.cells.items():
            if cell.difference is not None:
                change = cell.difference
                differences[model][f"{row.evaluator}/{row.metric}"] = [change.value, change.low, change.high]
    return {
        "outcomes": {
            model: {evaluator: outcome.as_json() for evaluator, outcome in found.items()}
            for model, found in comparison.outcomes.items()
        },
        "baseline": comparison.baseline,
        "differences": json_ready(differences),
    }


def _draw_charts(folder: Path, comparison: Comparison, metric: str) -> None:
    values = comparison.values(metric)
    if any(values.values()):
        bars = bar_chart(
            values,
            intervals=comparison.intervals(metric),
            title=metric.replace("_", " "),
            percent=max(max(of_model.values()) for of_model in values.values() if of_model) <= 1,
            lower_is_better=lower_is_better(metric),
        )
        save_chart(bars, folder / metric)
    else:
        known = ", ".join(dict.fromkeys(row.metric for row in comparison.rows))
        log.warning("no bars are drawn: nothing measures chart_metric=%s; there are %s", metric, known)
    for model, found in comparison.outcomes.items():
        for evaluator, outcome in found.items():
            matrix = outcome.details.get("confusion_matrix")
            if matrix is not None and len(matrix) <= MOST_CLASSES:
                chart = confusion_chart(matrix, list(outcome.details["per_class"]), title=f"{evaluator}: {model}")
                save_chart(chart, folder / f"confusion-{evaluator}-{_file_name(model)}")
    for evaluator in dict.fromkeys(row.evaluator for row in comparison.rows):
        for unit in CURVES:
            _draw_curve(folder, comparison, evaluator, metric, unit)


def _draw_curve(folder: Path, comparison: Comparison, evaluator: str, metric: str, unit: str) -> None:
    curve = comparison.curve(evaluator, metric, unit)
    if max(map(len, curve.values())) > 1:
        name, x_label = CURVES[unit]
        intervals = comparison.curve_intervals(evaluator, metric, unit)
        y_label = metric.replace("_", " ")
        chart = line_chart(curve, x_label=x_label, y_label=y_label, intervals=intervals, title=evaluator)
        save_chart(chart, folder / f"curve-{evaluator}-{name}")


def _file_name(model: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", model).strip("_")
