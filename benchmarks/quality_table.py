"""Tables of benchmarks/quality.py, from what its runs have left on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from quality_run import Records
from torch import Tensor

from quiltnet.evaluation.classification import mean_outcome
from quiltnet.evaluation.outcome import Difference, Outcome, paired_difference, percentile_interval

# Said before val was scored for the first time.
METRICS = (
    ("zeroshot", "balanced_accuracy", "LC25000 zero-shot, balanced accuracy"),
    ("probe", "balanced_accuracy", "LC25000 linear probe, balanced accuracy"),
    ("lc25000", "image_to_text_recall@5", "LC25000 image to text, recall@5"),
    ("lc25000", "image_to_text_mean_average_precision", "LC25000 image to text, mAP"),
    ("lc25000", "text_to_image_recall@5", "LC25000 text to image, recall@5"),
    ("lc25000", "text_to_image_mean_average_precision", "LC25000 text to image, mAP"),
    ("atlas", "image_to_text_recall@5", "atlas image to text, recall@5"),
    ("atlas", "image_to_text_mean_average_precision", "atlas image to text, mAP"),
    ("atlas", "text_to_image_recall@5", "atlas text to image, recall@5"),
    ("atlas", "text_to_image_mean_average_precision", "atlas text to image, mAP"),
)
# What recipes are chosen by on the inner fold: the mean of these.
CHOSEN_BY = (
    ("zeroshot", "balanced_accuracy"),
    ("probe", "balanced_accuracy"),
    ("lc25000", "image_to_text_recall@5"),
    ("lc25000", "text_to_image_mean_average_precision"),
    ("atlas", "image_to_text_mean_average_precision"),
    ("atlas", "text_to_image_mean_average_precision"),
)

Outcomes = Mapping[str, Outcome]  # evaluator -> outcome


def over_seeds(records: Records, runs: Sequence[str], weights: str) -> dict[str, Outcome]:
    """The mean over seeds of every metric, on the set and on each of its resamples."""
    of_runs = [records.outcomes(run)[weights] for run in runs]
    return {name: mean_outcome([outcomes[name] for outcomes in of_runs]) for name in of_runs[0]}


def comparison_table(ours: Outcomes, peer: Outcomes) -> list[str]:
    """Markdown: a line a metric, with intervals, the paired difference and what it says."""
    lines = [
        "| metric | open_clip | ours | difference | |",
        "|---|---|---|---|---|",
    ]
    counts = {"better": 0, "worse": 0, "not significant": 0}
    for evaluator, metric, title in METRICS:
        difference = paired_difference(ours[evaluator], peer[evaluator], metric)
        verdict = said_of(difference)
        counts[verdict] += 1
        cells = [_cell(outcomes[evaluator], metric) for outcomes in (peer, ours)]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {_difference(difference)} | {verdict} |")
    total = composite_difference(ours, peer)
    cells = [f"{100 * composite(outcomes)[0]:.1f}" for outcomes in (peer, ours)]
    lines.append(f"| mean of six | {cells[0]} | {cells[1]} | {_difference(total)} | {said_of(total)} |")
    lines.append("")
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return lines


def said_of(difference: Difference) -> str:
    if not difference.is_clear:
        return "not significant"
    return "better" if difference.value > 0 else "worse"


def composite(outcomes: Outcomes) -> tuple[float, Tensor]:
    """The mean of the metrics that recipes are chosen by, and its replicates (R,).

    Sets are resampled apart, so the composite's interval takes zero-shot and retrieval errors as independent.
    """
    score = sum(outcomes[name].scores[metric] for name, metric in CHOSEN_BY) / len(CHOSEN_BY)
    replicates = torch.stack([outcomes[name].replicates[metric] for name, metric in CHOSEN_BY]).mean(dim=0)
    return score, replicates


def composite_difference(outcomes: Outcomes, baseline: Outcomes) -> Difference:
    (score, replicates), (other, of_other) = composite(outcomes), composite(baseline)
    return Difference(score - other, *percentile_interval(replicates - of_other))


def ablation_table(full: Outcomes, ablated: Mapping[str, Outcomes]) -> list[str]:
    """Markdown: scores of the recipe in percent, and by how many points it is above itself with each change.

    A star: the interval of the difference leaves zero out.
    """
    heads = ["zero-shot", "probe", "LC25000 i→t", "LC25000 t→i", "atlas i→t", "atlas t→i"]
    lines = [
        f"| | mean of six | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(heads),
        f"| the recipe | {100 * composite(full)[0]:.1f} | {' | '.join(_points(full))} |",
    ]
    for name, outcomes in ablated.items():
        total = composite_difference(full, outcomes)
        parts = [paired_difference(full[evaluator], outcomes[evaluator], metric) for evaluator, metric in CHOSEN_BY]
        cells = [f"{100 * part.value:+.1f}" + ("*" if part.is_clear else "") for part in parts]
        lines.append(f"| {name} | {_difference(total)}{'*' if total.is_clear else ''} | {' | '.join(cells)} |")
    return lines


def _points(outcomes: Outcomes) -> list[str]:
    return [f"{100 * outcomes[name].scores[metric]:.1f}" for name, metric in CHOSEN_BY]


def _cell(outcome: Outcome, metric: str) -> str:
    low, high = percentile_interval(outcome.replicates[metric])
    deviation = outcome.details["standard_deviation_over_repeats"].get(metric, 0.0)
    return f"{100 * outcome.scores[metric]:.1f} ({100 * low:.1f} to {100 * high:.1f}), sd {100 * deviation:.1f}"


def _difference(difference: Difference) -> str:
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
