"""``quiltnet merge``: WiSE-FT between two models, soups of several; scored, drawn, exported.

Models and evaluators are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from quiltnet.errors import UserError

_OPTION = re.compile(r"[+~]*[\w.@/]+=")
_MOST_ALPHAS = 1001


class Soup(str, Enum):
    """Which of several models are averaged: all, or each that does not make the score worse."""

    uniform = "uniform"
    greedy = "greedy"


@dataclass(frozen=True)
class MergeRequest:
    """What was asked for, checked as far as it can be before anything is loaded.

    Attributes:
        alphas: between the two sources; empty for a soup.
        evaluators: names of evaluator configs; ``overrides`` are further options of theirs.
        target, general: ``evaluator/metric``: what was tuned for, and what must not be forgotten.
    """

    sources: tuple[str, ...]
    out: Path
    alphas: tuple[float, ...] = ()
    soup: Soup | None = None
    evaluators: tuple[str, ...] = ()
    target: str | None = None
    general: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether scores decide what is exported."""
        return len(self.alphas) > 1 or self.soup is Soup.greedy


def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE TUNED … [KEY=VALUE …]",
            help="Models (run, run@ema, exported folder, name:tag), then options of the evaluators (data_root=…).",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make: tables, a curve, and the merged model.")],
    alpha: Annotated[
        str | None, typer.Option(help="From BASE (0) to TUNED (1): a number, or first:last:step such as 0:1:0.1.")
    ] = None,
    soup: Annotated[Soup | None, typer.Option(help="Average several models: all, or those that help.")] = None,
    evaluator: Annotated[str | None, typer.Option(help="Evaluators by their configs' names, with commas.")] = None,
    target: Annotated[str | None, typer.Option(help="EVALUATOR/METRIC that the models were tuned for.")] = None,
    general: Annotated[str | None, typer.Option(help="EVALUATOR/METRIC that should not be lost.")] = None,
) -> None:
    """Merge models of one architecture: between a base and a tuned model (WiSE-FT), or a soup of several.

    Of several alphas the one with the best mean of target and general is exported.
    """
    is_option = [bool(_OPTION.match(word)) and not _exists(word) for word in sources]
    request = MergeRequest(
        sources=tuple(word for word, option in zip(sources, is_option, strict=True) if not option),
        out=out,
        alphas=parse_alphas(alpha) if alpha is not None else (),
        soup=soup,
        evaluators=tuple(dict.fromkeys(filter(None, evaluator.split(",")))) if evaluator else (),
        target=target,
        general=general,
        overrides=tuple(word for word, option in zip(sources, is_option, strict=True) if option),
    )
    check_request(request)
    from quiltnet.cli.merging import run_merge

    run_merge(request)


def parse_alphas(text: str) -> tuple[float, ...]:
    """``0.5``, or ``first:last:step`` with both ends.

    Raises:
        UserError: it is neither, or leaves 0 to 1.
    """
    try:
        first, last, step = (float(part) for part in (text.split(":") if ":" in text else (text, text, "1")))
    except ValueError:
        raise UserError(f"--alpha {text} is no number and no range; say --alpha 0.5 or --alpha 0:1:0.1") from None
    if not 0 <= first <= last <= 1 or not 0 < step <= 1:
        raise UserError(f"--alpha {text} must rise within 0 (the base) and 1 (the tuned model), such as 0:1:0.1")
    steps = (last - first) / step
    count = round(steps) + 1
    if count > _MOST_ALPHAS or abs(steps - round(steps)) > 1e-6:
        raise UserError(f"--alpha {text}: {last:g} is not a whole number of steps from {first:g}; say 0:1:0.1 or so")
    return tuple(round(first + number * step, 9) for number in range(count))


def check_request(request: MergeRequest) -> None:
    """Raises UserError for a request that contradicts itself, or an ``out`` that exists."""
    from quiltnet.cli.run_directory import check_writable

    given = ", ".join(request.sources) or "none"
    if len(request.sources) < 2:
        raise UserError(f"a merge needs two models at least, and there is {given}; say quiltnet merge BASE TUNED …")
    if len(set(map(Path, request.sources))) < len(request.sources):  # a/ is a too
        raise UserError(f"{given} names a model twice; give each once")
    if bool(request.alphas) == (request.soup is not None):
        raise UserError("say one of --alpha 0:1:0.1, between two models, and --soup uniform or greedy, of several")
    if request.alphas and len(request.sources) > 2:
        raise UserError(f"--alpha lies between two models, and there are {given}; average several by --soup uniform")
    if request.chooses and (request.target is None or not request.evaluators):
        what = "of several alphas one" if request.alphas else "what a greedy soup keeps"
        raise UserError(f"{what} is chosen by a score: say --evaluator NAME and --target NAME/METRIC")
    if request.target is None and request.general is not None:
        raise UserError(f"--general {request.general} stands beside a target; say --target NAME/METRIC too")
    if request.out.exists():
        raise UserError(f"{request.out} exists already; give another --out, or remove it")
    check_writable(request.out)


def _exists(word: str) -> bool:
    return any(Path(name).exists() for name in (word, re.sub(r"(@best)?(@ema)?$", "", word)))
