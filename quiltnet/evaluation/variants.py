"""One metric of one evaluator, as it is and under changed conditions."""

from __future__ import annotations

from collections.abc import Mapping

from quiltnet.errors import UserError
from quiltnet.evaluation.outcome import Outcome


def check_is_measured(metric: str, outcome: Outcome) -> None:
    """Raises UserError where the evaluator knows no such metric; one that is undefined on the set is known."""
    if metric in outcome.scores or metric in outcome.details.get("undefined", {}):
        return
    known = ", ".join(sorted(outcome.scores))
    raise UserError(f"metric={metric!r} is not one that the evaluator has; choose one of {known}")


def gather_variants(original: Outcome, variants: Mapping[str, Outcome], metric: str) -> Outcome:
    """The metric of the original under its own name, of each variant as ``metric@variant``.

    All are of the same items, so their replicates are of the same resamples. The details are the original's, but for
    what is undefined.
    """
    found = {metric: original, **{f"{metric}@{name}": outcome for name, outcome in variants.items()}}
    return Outcome(
        scores={name: outcome.scores[metric] for name, outcome in found.items() if metric in outcome.scores},
        replicates={
            name: outcome.replicates[metric] for name, outcome in found.items() if metric in outcome.replicates
        },
        details={
            **original.details,
            "undefined": {
                name: outcome.details["undefined"][metric]
                for name, outcome in found.items()
                if metric not in outcome.scores
            },
        },
        items=original.items,
    )
