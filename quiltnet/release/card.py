"""The model card: a README.md made of the run, in which its owner's own words survive being made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from quiltnet.errors import UserError
from quiltnet.redaction import redact
from quiltnet.release.card_metadata import GENERATED, check_license, metadata
from quiltnet.release.card_scores import Score, find_scores
from quiltnet.release.card_sections import (
    LIMITS,
    NO_RUN,
    ComparedExport,
    checks_section,
    circumstances_section,
    data_section,
    recipe_section,
    results_section,
)
from quiltnet.release.card_text import parts_of, plain, replace_part, yours
from quiltnet.release.card_use import has_use_section, libraries_of, use_section
from quiltnet.release.run_files import RunFiles
from quiltnet.whole_files import write_whole

CARD_NAME = "README.md"
# What stands in the owner's parts until the owner writes there.
UNWRITTEN = {
    "description": "*Say here what the model is for. This part is kept when the card is made again.*",
    "uses": "*Say here which uses you made it for, and which you ask others not to make of it. This part is kept.*",
    "citation": "*Name here the papers and the data to cite. This part is kept.*",
}


def write_card(
    folder: Path,
    run: RunFiles | None,
    *,
    comparisons: Sequence[ComparedExport],
    license: str | None,
    previous: Path | None = None,
    share_samples: bool = False,
    averaged: bool = False,
    samples_seen: int | None = None,
    final: Path | None = None,
) -> Path:
    """Write ``README.md`` into an exported folder: metadata for the hub, use, data, recipe, results, checks, limits.

    Args:
        run: what the model comes from; None for one that was not trained here.
        comparisons: the libraries' reloads of ``folder``, as the export measured them.
        license: one of the hub's identifiers; None to state none.
        previous: an earlier README.md; its owner's parts, and metadata that is not made here, are taken over.
        share_samples: also name the data sources.
        averaged: the weights are the run's moving average.
        samples_seen: how far the weights were trained; by default as far as the run was.
        final: where the folder will lie, if it is to be moved.

    Returns:
        The card's path.

    Raises:
        UserError: ``license`` is none, or the metadata of ``previous`` cannot be read.
    """
    if license is not None:
        check_license(license)
    place = (final or folder).resolve().name
    name = place if run is None else run.name
    earlier = read_card(previous) if previous is not None and previous.is_file() else None
    if run is not None and samples_seen is None:
        samples_seen = run.results.get("samples_seen", run.samples_seen)
    scores = [] if run is None else find_scores(run, samples_seen, averaged=averaged)
    data = metadata(run, name, scores, license=license, libraries=libraries_of(folder))
    sections = {
        **_of_run(run, scores, samples_seen, share_samples=share_samples, averaged=averaged),
        "Checks of the export": checks_section(comparisons),
        "Intended use and limits": f"{LIMITS}\n\n{yours('uses', UNWRITTEN['uses'])}",
        "Citation": yours("citation", UNWRITTEN["citation"]),
    }
    body = _body(run, name, use_section(folder, place), sections, averaged=averaged)
    card = f"---\n{data.to_yaml()}\n---\n\n{body}"
    if earlier is not None:
        card = join_cards(card, earlier)
    return save_card(card, folder)


def _of_run(
    run: RunFiles | None, scores: Sequence[Score], samples_seen: int | None, *, share_samples: bool, averaged: bool
) -> dict[str, str]:
    """What is told of the run, text by title."""
    if run is None:
        return {"Training": NO_RUN}
    return {
        "Training data": data_section(run, share_samples=share_samples),
        "Recipe": recipe_section(run, samples_seen),
        "Versions and hardware": circumstances_section(run),
        "Results": results_section(scores, samples_seen, averaged=averaged),
    }


def _body(run: RunFiles | None, name: str, use: str, sections: Mapping[str, str], *, averaged: bool) -> str:
    weights = "the moving average of the weights" if averaged else "the weights"
    origin = "it" if run is None else f"{weights} of the run {plain(name)}"
    lines = [
        f"# {plain(name)}",
        f"A contrastive image-text model for histopathology. quiltnet exported {origin}.",
        yours("description", UNWRITTEN["description"]),
        use,
        *(f"## {title}\n\n{text}" for title, text in sections.items()),
    ]
    return "\n\n".join(lines) + "\n"


def state_license(folder: Path, license: str) -> None:
    """Write ``license`` into the card of an export that was made before it was said; nothing without a card."""
    if (folder / CARD_NAME).is_file():
        card = read_card(folder / CARD_NAME)
        card.data.license = license
        save_card(str(card), folder)


def read_card(path: Path, name: str | None = None) -> ModelCard:
    """Raises UserError where its metadata cannot be read; ``name`` is what the message calls it."""
    try:
        return ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{name or path} cannot be read as a model card ({error}); correct the lines between its --- marks, or "
            "move it away"
        ) from error


def join_cards(card: str, previous: ModelCard) -> str:
    """``card`` with its owner's words and fields of ``previous``, wherever it has none of its own.

    A text without any marks was written by hand: it becomes the description.
    """
    joined = ModelCard(card)
    for field, value in previous.data.to_dict().items():
        if field not in GENERATED and joined.data.get(field) is None:
            joined.data[field] = value
    written = parts_of(previous.text)
    if not written and previous.text.strip() and not has_use_section(previous.text):
        written = {"description": previous.text.strip()}
    own = parts_of(joined.text)
    for name, text in written.items():
        if own.get(name) in (None, UNWRITTEN.get(name)):
            joined.text = replace_part(joined.text, name, text)
    return str(joined)


def save_card(card: str, folder: Path) -> Path:
    """Whole or not at all: a card that was there stays until the new one is written."""
    path = folder / CARD_NAME
    write_whole(path, redact(card))
    return path
