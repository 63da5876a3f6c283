"""One page that tells of runs: what became of them, and everything that it depends on.

The page is whole in itself: no script, and nothing is loaded from anywhere, which its own policy forbids browsers too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quiltnet
from quiltnet.errors import UserError
from quiltnet.release import report_bars, report_curves, report_facts, report_robustness, report_scores
from quiltnet.release.report_subjects import Subject
from quiltnet.whole_files import whole_file

if TYPE_CHECKING:
    from quiltnet.release.report_samples import Samples

MARK = '<meta name="generator" content="quiltnet report">'  # of a page that may be written anew
COLOURS = 8  # the style sheet's, of subjects
MOST_TILES, MOST_SHIFTS = 8, 12  # of the verdict
MOST_OPEN_ROWS = 12  # of a table that is not folded


def render_report(subjects: Sequence[Subject], samples: Sequence[Samples] = (), *, share_samples: bool = False) -> str:
    """The page as text. What comes from runs is escaped wherever it stands.

    Args:
        subjects: at least one, as ``read_subjects`` gives them.
        samples: of some of them; the page shows captions and tiles of these alone.
        share_samples: whether names of files and folders may be read in it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("quiltnet.release", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(number=number, signed=signed, interval=interval, readable=report_curves.readable)
    content = _content(subjects, share_samples)
    return templates.get_template("report.html").render(
        **content,
        samples=list(samples),
        sections=_sections(content),
        style=(Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8"),
        mark=MARK,
        shade=lambda colour: colour if colour < 0 else colour % COLOURS,
        colours=COLOURS,
        bar_width=report_bars.BAR_WIDTH,
        most_tiles=MOST_TILES,
        most_shifts=MOST_SHIFTS,
        most_open_rows=MOST_OPEN_ROWS,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=quiltnet.__version__,
    )


def check_report_path(out: Path, *, is_own: bool, overwrite: bool) -> None:
    """Raises UserError where the page would replace a file unasked.

    Args:
        is_own: ``out`` is the place in a run directory that belongs to its report.
        overwrite: replace whatever file is there.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; name a file, such as {out / 'report.html'}")
    if out.exists() and not overwrite and not (is_own and is_report(out)):
        raise UserError(f"{out} exists already; give another --out, or say --overwrite to replace it")


def is_report(path: Path) -> bool:
    """Whether the file is a page that ``quiltnet report`` wrote."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(2000)


def write_report(page: str, out: Path) -> None:
    """The file appears under its name when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def number(value: float | None) -> str:
    """Three decimals, fewer of larger numbers; a dash for what is missing."""
    if value is None:
        return "–"
    size = abs(value)
    if size > 1 and float(2 * value).is_integer():  # a rank
        return f"{value:g}" if size < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def signed(value: float | None) -> str:
    """With a sign, a real minus among them."""
    if value is None:
        return "–"
    text = number(abs(value))
    return text if not text.strip("0.") else f"{'+' if value > 0 else '−'}{text}"


def interval(ends: tuple[float, float], with_sign: bool = False) -> str:
    write = signed if with_sign else number
    return f"{write(ends[0])} to {write(ends[1])}" if with_sign else f"{write(ends[0])}–{write(ends[1])}"


def status(subject: Subject) -> list[str]:
    """How far a run came, when it started and with which code."""
    facts = [] if subject.run is None else [_progress(subject)]
    environment = subject.environment
    if environment.get("time"):
        facts.append(
            f"{'started' if subject.run is not None else 'evaluated'} {environment['time'][:16].replace('T', ' ')}"
        )
    if environment.get("git"):
        facts.append(f"code {environment['git'][:9]}{' (changed)' if environment['git'].endswith('-dirty') else ''}")
    return facts


def _progress(subject: Subject) -> str:
    total = subject.config.get("total_samples")
    if not subject.lines:
        return "nothing logged yet"
    of_total = f" of {total:,}" if isinstance(total, int) else ""
    state = "finished" if subject.run.is_finished else "not finished"
    return f"{state}, {subject.run.samples_seen:,}{of_total} samples"


def _content(subjects: Sequence[Subject], share_samples: bool) -> dict[str, Any]:
    """All that the template shows of scores, curves and facts, in its order."""
    verdicts = [report_scores.verdict(subject) for subject in subjects]
    tables = report_scores.score_tables(subjects)
    facts = report_facts.Facts(share_samples)
    return {
        "shares_samples": share_samples,
        "subjects": list(subjects),
        "title": ", ".join(subject.name for subject in subjects),
        "names": [(subject.name, subject.colour) for subject in subjects],
        "runs": [subject.run for subject in subjects if subject.run is not None],
        "status": status,
        "verdicts": [found for found in verdicts if found is not None],
        "headlines": report_scores.headline_table(tables) if tables and len(subjects) > 1 else None,
        "training_charts": report_curves.training_charts(subjects),
        "evaluation_charts": report_curves.evaluation_charts(subjects),
        "bars": report_bars.zeroshot_bars(subjects),
        "tables": tables,
        "confusions": report_bars.confusions(subjects),
        "robustness": report_robustness.robustness(subjects),
        "data": facts.data_table(subjects),
        "differences": facts.config_differences(subjects) if len(subjects) > 1 else None,
        "configs": {subject.name: facts.config_tables(subject) for subject in subjects if subject.config},
        "environment": report_facts.environment_table(subjects),
        "reproductions": [found for found in map(facts.reproduction, subjects) if found is not None],
    }


def _sections(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(anchor, name) of those that the page has."""
    there = {
        "verdict": True,
        "curves": content["training_charts"] or content["evaluation_charts"],
        "scores": content["tables"],
        "confusion": content["confusions"],
        "robustness": content["robustness"],
        "samples": True,
        "data": content["data"].rows,
        "configuration": content["configs"],
        "environment": True,
    }
    return [(anchor, anchor.capitalize()) for anchor, is_there in there.items() if is_there]
