"""What a report tells of: runs, and the models that an evaluation compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quiltnet.errors import UserError
from quiltnet.redaction import redact, redact_command, redact_config
from quiltnet.release.run_files import (
    CONFIG_NAME,
    METRICS_NAME,
    RESULTS_NAME,
    RunFiles,
    by_metric,
    is_number,
    read_json,
    read_run,
)
from quiltnet.training.averaging import AVERAGE_SUFFIX

Change = tuple[float, float, float]  # value, low, high
START_COLOUR, AVERAGE_COLOUR = -1, -2  # of a start, and of averaged weights


@dataclass(frozen=True)
class Subject:
    """A run, or one model of an evaluation.

    Attributes:
        name: different from those of the other subjects.
        run: its files; None of a model of an evaluation.
        source: what ``quiltnet.load`` takes.
        outcomes: evaluator -> scores, intervals and details of the newest evaluation; ``name@ema`` of averaged weights.
        start: ``evaluator/metric`` -> value before the first step, or of the model that others were compared with.
        start_name: what that is called.
        best: ``samples_seen`` and ``scores`` of the best checkpoint, where the run ended with measuring it.
        changes: ``evaluator/metric`` -> difference of the final score to the start with its paired interval, where one
            was computed.
        evaluators: evaluator -> what it says of its data and choices.
        manifest: of the shards that it was trained on, where they are at hand.
        colour: number of its colour in every chart, from 0; below 0 that of a start.
        is_start: it is what the other models of its evaluation were compared with.
    """

    name: str
    run: RunFiles | None
    source: str
    outcomes: Mapping[str, Mapping[str, Any]]
    start: Mapping[str, float]
    start_name: str = "the start"
    best: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    evaluators: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    colour: int = 0
    is_start: bool = False

    @property
    def lines(self) -> list[dict[str, Any]]:
        return self.run.metrics if self.run is not None else []

    @property
    def is_untrained(self) -> bool:
        """Whether its only evaluation is that before the first step."""
        return self.run is not None and self.run.results.get("samples_seen") == 0

    @property
    def own_outcomes(self) -> dict[str, Mapping[str, Any]]:
        """Those of the weights themselves, without those of their average."""
        return {name: outcome for name, outcome in self.outcomes.items() if not name.endswith(AVERAGE_SUFFIX)}

    @property
    def scores(self) -> dict[str, float]:
        """``evaluator/metric`` -> newest value."""
        return _finite(by_metric(self.outcomes, "scores"))

    @property
    def final(self) -> dict[str, float]:
        """What the subject is judged by: the best checkpoint's scores where they were measured, else the newest."""
        return self.scores | _finite(self.best.get("scores", {}))

    def interval(self, evaluator: str, metric: str) -> tuple[float, float] | None:
        """95 %, of the newest value."""
        ends = self.outcomes.get(evaluator, {}).get("intervals", {}).get(metric)
        return (ends[0], ends[1]) if ends and all(map(is_number, ends)) else None

    def series(self, metric: str) -> list[tuple[int, float | None]]:
        """(samples seen, value) of every line of the log that has the metric; None where it was not finite."""
        return [(line["samples_seen"], line[metric]) for line in self.lines if metric in line]


def read_subjects(paths: Sequence[str | Path]) -> list[Subject]:
    """The runs and evaluated models in ``paths``, in their order, each under a name of its own, secrets taken out.

    The last has the first colour, as the last model of a chart has it.

    Raises:
        UserError: a path that is neither the directory of a run nor the output of an evaluation, or is given twice.
    """
    places = [Path(path) for path in paths]
    if len({place.resolve() for place in places}) < len(places):
        raise UserError(f"{', '.join(map(str, places))} name a run twice; give each once")
    subjects = [subject for place in places for subject in _read(place)]
    names = [subject.name for subject in subjects]
    return [
        replace(
            subject,
            name=subject.name if names.count(subject.name) == 1 else _longer_name(subject, number),
            colour=START_COLOUR if subject.is_start else len(subjects) - number,
        )
        for number, subject in enumerate(subjects, start=1)
    ]


def _longer_name(subject: Subject, number: int) -> str:
    parent = subject.run.path.resolve().parent.name if subject.run is not None else ""
    return f"{parent}/{subject.name} ({number})".lstrip("/")


def _read(path: Path) -> list[Subject]:
    if not path.is_dir():
        raise UserError(f"{path}: there is no such directory; give runs, such as outputs/first_try")
    if (path / CONFIG_NAME).is_file():
        return [_of_run(read_run(path))]
    results = redact_config(read_json(path / RESULTS_NAME))
    if "models" in results and "outcomes" in results:
        return _of_evaluation(path, results)
    runs = sorted(str(config.parent) for config in path.glob(f"*/{CONFIG_NAME}"))
    advice = f"; it holds runs: give {' '.join(runs[:3])}" if runs else ""
    raise UserError(
        f"{path} is neither a run's directory ({CONFIG_NAME}, {METRICS_NAME}) nor the output of an evaluation "
        f"({RESULTS_NAME}){advice}"
    )


def _of_run(run: RunFiles) -> Subject:
    results = redact_config(run.results)
    return Subject(
        name=redact(run.name),
        run=run,
        source=str(run.path),
        outcomes=results.get("outcomes", {}),
        start=_finite(results.get("start", {})),
        best=results.get("best", {}),
        changes=_changes(results.get("changes", {})),
        evaluators=results.get("evaluators", {}),
        environment=_redacted_environment(run.environment),
        config=redact_config(run.config),
    )


def _of_evaluation(path: Path, results: Mapping[str, Any]) -> list[Subject]:
    """A subject a model; the first, or what ``baseline`` says, is the start of the others."""
    baseline = results.get("baseline")
    outcomes = results["outcomes"]
    start = by_metric(outcomes.get(baseline, {}), "scores")
    return [
        Subject(
            name=name,
            run=None,
            source=str(results["models"].get(name, {}).get("source", name)),
            outcomes=found,
            start={} if name == baseline else _finite(start),
            start_name=str(baseline),
            changes=_changes(results.get("differences", {}).get(name, {})),
            evaluators=results.get("evaluators", {}),
            environment=_redacted_environment(results.get("environment", {})),
            is_start=name == baseline,
            config={key: results[key] for key in ("precision",) if key in results}
            | {"model": results["models"].get(name, {})},
        )
        for name, found in outcomes.items()
    ]


def _redacted_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    command = environment.get("command")
    return redact_config(environment) | ({"command": redact_command(command)} if isinstance(command, list) else {})


def _finite(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if is_number(value)}


def _changes(given: Mapping[str, Any]) -> dict[str, Change]:
    return {name: tuple(change) for name, change in given.items() if all(map(is_number, change))}
