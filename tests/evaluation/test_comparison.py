"""Tables of several models: what is best, what is surely different, and text that no format misreads."""

from __future__ import annotations

import csv
import io

import pytest
import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.comparison import Comparison, lower_is_better
from quiltnet.evaluation.outcome import Outcome, paired_difference


def spread(centre: float, width: float = 0.1) -> torch.Tensor:
    """1,000 replicates whose central 95 % is centre -+ 0.95 * width."""
    return centre + width * torch.linspace(-1, 1, 1000, dtype=torch.float64)


def outcome(items: str = "set", **scores: float) -> Outcome:
    return Outcome(scores, {metric: spread(value) for metric, value in scores.items()}, items=items)


@pytest.fixture
def comparison() -> Comparison:
    first = {"lungs": outcome(accuracy=0.5, loss=1.0, auroc=0.75), "pairs": outcome(median_rank=7.0)}
    second = {"lungs": outcome(accuracy=0.625, loss=0.5), "pairs": outcome(median_rank=3.0)}
    third = {"lungs": outcome(accuracy=0.625, loss=2.0, auroc=0.25)}
    return Comparison({"clip": first, "quilt": second, "run_3": third})


def best(comparison: Comparison) -> dict[str, list[str]]:
    return {row.metric: [model for model, cell in row.cells.items() if cell.is_best] for row in comparison.rows}


def test_the_best_is_marked_by_the_metrics_direction_and_ties_are_all_best(comparison):
    expected = {"accuracy": ["quilt", "run_3"], "loss": ["quilt"], "auroc": ["clip"], "median_rank": ["quilt"]}
    assert best(comparison) == expected


def test_a_model_alone_is_not_best_of_anything():
    alone = Comparison({"clip": {"lungs": outcome(accuracy=0.5)}})
    assert best(alone) == {"accuracy": []}
    assert alone.difference_table() == [["evaluator", "metric"]]
    assert "Difference" not in alone.to_markdown() + alone.to_latex()


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("image_to_text_median_rank", True),
        ("info_nce_loss", True),
        ("expected_calibration_error", True),
        ("expected_calibration_error@10%", True),
        ("drop@jpeg", True),
        ("balanced_accuracy", False),
        ("image_to_text_recall@5", False),
        ("balanced_accuracy@drop", False),
    ],
)
def test_direction_of_a_metric(metric, lower):
    assert lower_is_better(metric) == lower


def test_differences_are_paired_and_to_the_baseline(comparison):
    row = comparison.rows[0]
    assert row.cells["clip"].difference is None
    expected = paired_difference(
        comparison.outcomes["quilt"]["lungs"], comparison.outcomes["clip"]["lungs"], "accuracy"
    )
    assert row.cells["quilt"].difference == expected
    assert expected.value == 0.125 and expected.is_clear, "the spread is common to both and cancels out"
    other = Comparison(comparison.outcomes, baseline="quilt").rows[0]
    assert other.cells["clip"].difference.value == -0.125
    assert other.cells["run_3"].difference.value == 0 and not other.cells["run_3"].difference.is_clear


def test_outcomes_on_other_items_are_not_subtracted():
    outcomes = {"clip": {"lungs": outcome(accuracy=0.5)}, "quilt": {"lungs": outcome("other", accuracy=0.6)}}
    assert Comparison(outcomes).rows[0].cells["quilt"].difference is None
    assert Comparison(outcomes).difference_table() == [["evaluator", "metric", "quilt"]]


def test_text_tables(comparison):
    shared = "* 0.6250 (0.5300 to 0.7200)"
    assert comparison.value_table() == [
        ["evaluator", "metric", "clip", "quilt", "run_3"],
        ["lungs", "accuracy", "0.5000 (0.4050 to 0.5950)", shared, shared],
        ["lungs", "loss", "1.0000 (0.9050 to 1.0950)", "* 0.5000 (0.4050 to 0.5950)", "2.0000 (1.9050 to 2.0950)"],
        ["lungs", "auroc", "* 0.7500 (0.6550 to 0.8450)", "-", "0.2500 (0.1550 to 0.3450)"],
        ["pairs", "median_rank", "7.0000 (6.9050 to 7.0950)", "* 3.0000 (2.9050 to 3.0950)", "-"],
    ]  # fmt: skip
    assert comparison.difference_table() == [
        ["evaluator", "metric", "quilt", "run_3"],
        ["lungs", "accuracy", "* +0.1250 (+0.1250 to +0.1250)", "* +0.1250 (+0.1250 to +0.1250)"],
        ["lungs", "loss", "* -0.5000 (-0.5000 to -0.5000)", "* +1.0000 (+1.0000 to +1.0000)"],
        ["lungs", "auroc", "-", "* -0.5000 (-0.5000 to -0.5000)"],
        ["pairs", "median_rank", "* -4.0000 (-4.0000 to -4.0000)", "-"],
    ]


def test_a_metric_without_replicates_has_a_value_only():
    bare = Comparison({model: {"lungs": Outcome({"accuracy": 0.5}, items="set")} for model in "ab"})
    assert bare.value_table()[1:] == [["lungs", "accuracy", "* 0.5000", "* 0.5000"]]
    assert "**0.5000** |" in bare.to_markdown()


def test_csv_has_whole_numbers_and_survives_any_name():
    third = 1 / 3
    name = 'outputs/"b, 32"\nnew'
    outcomes = {"clip": {"lungs": outcome(accuracy=third)}, name: {"lungs": outcome(accuracy=0.5)}}
    first, second = csv.DictReader(io.StringIO(Comparison(outcomes).to_csv()))
    assert float(first["value"]) == third and first["difference"] == first["baseline"] == ""
    assert second["model"] == name and second["is_best"] == "true" and second["baseline"] == "clip"
    assert float(second["difference"]) == 0.5 - third
    assert float(second["low"]) < 0.5 < float(second["high"])


def test_markdown_marks_the_best_and_escapes_names():
    outcomes = {"a|b*": {"lung_set": outcome(accuracy=0.5)}, "_c_": {"lung_set": outcome(accuracy=0.25)}}
    assert Comparison(outcomes).to_markdown().splitlines() == [
        r"| evaluator | metric | a\|b\* | \_c\_ |",
        "| --- | --- | ---: | ---: |",
        "| lung_set | accuracy | **0.5000** (0.4050 to 0.5950) | 0.2500 (0.1550 to 0.3450) |",
        "",
        r"Difference to a\|b\*, paired on the same items:",
        "",
        r"| evaluator | metric | \_c\_ |",
        "| --- | --- | ---: |",
        "| lung_set | accuracy | **-0.2500** (-0.2500 to -0.2500) |",
    ]


def test_latex_is_of_booktabs_and_escapes_names():
    first = {"lung_set": outcome(accuracy=0.5), "colon": outcome(**{"recall@10%": 0.5})}
    second = {"lung_set": outcome(accuracy=0.25), "colon": outcome(**{"recall@10%": 0.75})}
    assert Comparison({r"a\b": first, "c&{d}~#$^": second}).to_latex().splitlines()[:9] == [
        r"\begin{tabular}{llrr}",
        r"\toprule",
        r"evaluator & metric & a\textbackslash{}b & c\&\{d\}\textasciitilde{}\#\$\textasciicircum{} \\",
        r"\midrule",
        r"lung\_set & accuracy & \textbf{0.5000} (0.4050 to 0.5950) & 0.2500 (0.1550 to 0.3450) \\",
        r"\addlinespace",
        r"colon & recall@10\% & 0.5000 (0.4050 to 0.5950) & \textbf{0.7500} (0.6550 to 0.8450) \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"\textbf{$-$0.2500} ($-$0.2500 to $-$0.2500)" in Comparison({"a": first, "b": second}).to_latex()


def test_values_and_curves_for_charts():
    metrics = {"accuracy@16-shot": 0.75, "accuracy@2-shot": 0.5, "accuracy@10%": 0.125, "accuracy": 0.25}
    metrics["accuracy@dim=64"] = 0.375
    comparison = Comparison({"clip": {"few": outcome(**metrics), "pairs": outcome(median_rank=3.0)}, "none": {}})
    assert comparison.values("accuracy") == {"clip": {"few": 0.25}, "none": {}}
    assert comparison.intervals("accuracy")["clip"]["few"] == pytest.approx((0.155, 0.345))
    assert comparison.curve("few", "accuracy", "-shot") == {"clip": {2.0: 0.5, 16.0: 0.75}, "none": {}}
    assert list(comparison.curve("few", "accuracy", "-shot")["clip"]) == [2.0, 16.0]
    assert comparison.curve("few", "accuracy", "dim=")["clip"] == {64.0: 0.375}
    assert comparison.curve_intervals("few", "accuracy", "%")["clip"][10.0] == pytest.approx((0.03, 0.22))


def test_a_baseline_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"baseline=quilts is none .* the nearest: quilt$"):
        Comparison({"clip": {}, "quilt": {}}, baseline="quilts")
    with pytest.raises(UserError, match="no model to compare"):
        Comparison({})
