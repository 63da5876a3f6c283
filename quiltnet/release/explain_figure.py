"""The figure of explanations: a row an image and its text, one or two models side by side.

After the figure of the Quilt repository (https://github.com/wisdomikezogwo/quilt1m): the caption's pieces shaded by
importance, the image, its relevance map laid over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quiltnet.errors import UserError
from quiltnet.release.explaining import Explanation, jet, overlay
from quiltnet.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

POSITIVE, NEGATIVE, NEUTRAL = (0.33, 0.76, 0.37), (0.89, 0.33, 0.29), (1.0, 1.0, 1.0)

# Inches.
CELL = 2.4  # an image
GAP = 0.14
LINE = 0.205  # of the caption's pieces
PADDING = 0.035  # around a piece
NOTE = 0.2  # a line of small print
HEAD = 0.78  # legend and titles

FONT_SIZE, SMALL = 9.5, 8.5
STEPS = 60  # of the legend's colours
DOTS_PER_INCH = 150


class _Piece(NamedTuple):
    """A piece of a caption in its place. left, width: inches; line: from 0."""

    text: str
    score: float
    left: float
    width: float
    line: int


def explain_figure(explanations: Mapping[str, Sequence[Explanation]]) -> Figure:
    """Rows of image and text; a column the image and its text, then one a model, under its name.

    Args:
        explanations: one or two models' names -> explanations of the same pairs. The image is as the first model saw
            it.

    Raises:
        UserError: no model or more than two, or not the same texts.
    """
    from matplotlib.figure import Figure

    models = list(explanations)
    texts = [[explanation.text for explanation in rows] for rows in explanations.values()]
    if len(models) not in (1, 2) or not texts[0] or texts[0] != texts[-1]:
        raise UserError("the figure shows explanations of one or more pairs by one model, or of the same by two")
    rows = [_Row([explanations[model][row] for model in models]) for row in range(len(texts[0]))]
    width = GAP + (1 + len(models)) * (CELL + GAP)
    height = HEAD + sum(row.height for row in rows)
    figure = Figure(figsize=(width, height))
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # inches, downwards
    canvas.axis("off")
    _draw_legend(canvas)
    _draw_titles(canvas, models)
    top = HEAD
    for row in rows:
        row.draw(canvas, top)
        top += row.height
    return figure


class _Row:
    """Of one image and one text: their explanations, a model each."""

    def __init__(self, explanations: Sequence[Explanation]) -> None:
        self._explanations = explanations
        self._text = _wrapped(explanations[0].text)
        self._pieces = [_placed(explanation.words, CELL) for explanation in explanations]
        self._lines = max(len(self._text), *(pieces[-1].line + 1 for pieces in self._pieces))
        self.height = self._lines * LINE + CELL + NOTE + 2 * GAP

    def draw(self, canvas: Axes, top: float) -> None:
        """``top``: inches from the upper edge of the figure."""
        words, below = top + GAP / 2, top + GAP / 2 + self._lines * LINE + 0.04
        for number, line in enumerate(self._text):
            _write(canvas, line, _left(0), words + number * LINE)
        _draw_picture(canvas, self._explanations[0].image, _left(0), below)
        for column, (explanation, pieces) in enumerate(zip(self._explanations, self._pieces, strict=True), start=1):
            left = _left(column)
            _draw_pieces(canvas, pieces, left, words)
            _draw_picture(canvas, overlay(explanation), left, below)
            note = f"similarity {explanation.similarity:.3f}"
            canvas.text(left + CELL / 2, below + CELL + 0.05, note, ha="center", va="top", fontsize=SMALL, color="0.35")


def _left(column: int) -> float:
    return GAP + column * (CELL + GAP)


def _draw_picture(canvas: Axes, picture: Image.Image, left: float, top: float) -> None:
    width, height = canvas.figure.get_size_inches()
    axis = canvas.figure.add_axes((left / width, 1 - (top + CELL) / height, CELL / width, CELL / height))
    axis.imshow(np.asarray(picture), interpolation="antialiased")
    axis.axis("off")


def save_figure(figure: Figure, out: Path) -> None:
    """Write ``out`` in the format of its ending; it appears under its name when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as unfinished:
        figure.savefig(unfinished, dpi=DOTS_PER_INCH)


def _draw_legend(canvas: Axes) -> None:
    """Of the words in one line, of the maps in the next."""
    from matplotlib.patches import Rectangle

    def label(text: str, left: float, line: float) -> float:
        canvas.text(left, line, text, va="center", fontsize=SMALL)
        return left + _text_width(text, SMALL)

    words, maps = 0.16, 0.38
    left = label("Words:", GAP, words) + 0.14
    for name, colour in (("Negative", NEGATIVE), ("Neutral", NEUTRAL), ("Positive", POSITIVE)):
        canvas.add_patch(Rectangle((left, words - 0.065), 0.13, 0.13, facecolor=colour, edgecolor="0.4", linewidth=0.6))
        left = label(name, left + 0.18, words) + 0.14
    left = label("Map:", GAP, maps) + 0.14
    left = label("nothing", left, maps) + 0.08
    for step in range(STEPS):
        place = (left + step * 0.9 / STEPS, maps - 0.065)
        canvas.add_patch(Rectangle(place, 0.91 / STEPS, 0.13, facecolor=jet(np.array(step / (STEPS - 1))), linewidth=0))
    label("most of this image", left + 0.98, maps)


def _draw_titles(canvas: Axes, models: Sequence[str]) -> None:
    for column, model in enumerate(models, start=1):
        name = model
        while len(name) > 2 and _text_width(name, 11) * 1.1 > CELL:
            name = f"…{name.removeprefix('…')[1:]}"  # the end of a path tells most
        middle = _left(column) + CELL / 2
        canvas.text(middle, HEAD - 0.1, name, ha="center", va="center", fontsize=11, weight="bold", parse_math=False)


def _placed(words: Sequence[tuple[str, float]], width: float) -> list[_Piece]:
    """Pieces one behind the other, in as many lines as they need."""
    placed: list[_Piece] = []
    left, line = 0.0, 0
    for text, score in words:
        piece_width = _text_width(text, FONT_SIZE) + 2 * PADDING
        if left and left + piece_width > width:
            left, line = 0.0, line + 1
        placed.append(_Piece(text, score, left, piece_width, line))
        left += piece_width + PADDING
    return placed


def _wrapped(text: str) -> list[str]:
    """Words in lines no wider than an image; only a longer word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, FONT_SIZE) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _draw_pieces(canvas: Axes, pieces: Sequence[_Piece], left: float, top: float) -> None:
    from matplotlib.patches import Rectangle

    for piece in pieces:
        start, above = left + piece.left, top + piece.line * LINE
        colour = shade(piece.score)
        canvas.add_patch(Rectangle((start, above), piece.width, LINE - 0.03, facecolor=colour, linewidth=0))
        _write(canvas, piece.text, start + PADDING, above)


def _write(canvas: Axes, text: str, left: float, top: float) -> None:
    canvas.text(left, top + LINE - 0.085, text, va="baseline", fontsize=FONT_SIZE, parse_math=False)


def shade(score: float) -> tuple[float, float, float]:
    """The colour of a word's score in [-1, 1]: white at 0, green at 1, red at -1."""
    target = POSITIVE if score > 0 else NEGATIVE
    share = min(abs(score), 1.0)
    red, green, blue = (1 - share * (1 - part) for part in target)
    return red, green, blue


def _text_width(text: str, size: float) -> float:
    """In inches, of matplotlib's default font."""
    from matplotlib.textpath import TextPath

    plain = text.replace("$", "S")  # not to be read as a formula
    return TextPath((0, 0), f"|{plain}|", size=size).get_extents().width / 72
