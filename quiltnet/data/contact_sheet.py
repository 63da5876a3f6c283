"""Images on one sheet, in titled bands: what a report can name and only eyes can judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 150  # of an image, in pixels
COLUMNS = 8  # images
NARROWEST = 2  # columns of a band: its title needs them
GAP = 10
MARGIN = 20
TITLE_HEIGHT = 46
LINE_HEIGHT = 15
LABEL_LINES = 3
CELL_HEIGHT = SIDE + LABEL_LINES * LINE_HEIGHT + 2 * GAP
FONT_SIZE, TITLE_SIZE = 12, 17

PAPER, INK, FAINT, ALARM, BOX = "white", "#202020", "#707070", "#b00020", "#d0d0d0"


@dataclass(frozen=True)
class Panel:
    """An image with lines below it; a grey box that says why, where there is none to show."""

    image: Image.Image | None
    label: str
    reason: str = ""


@dataclass(frozen=True)
class Band:
    """A title, what it counts, and cells of one panel, or of two that belong together."""

    title: str
    subtitle: str
    cells: Sequence[Sequence[Panel]]
    is_alarming: bool = False

    @property
    def columns(self) -> int:
        return min(max(len(self.cells) * len(self.cells[0]), NARROWEST), COLUMNS)

    @property
    def height(self) -> int:
        return TITLE_HEIGHT + -(-len(self.cells) * len(self.cells[0]) // COLUMNS) * CELL_HEIGHT


def draw_contact_sheet(bands: Sequence[Band]) -> Image.Image:
    """RGB, as high as the bands need. Narrow bands stand side by side; all stay in their order."""
    shelves = _shelves(bands)
    heights = [max(band.height for band in shelf) for shelf in shelves]
    width = 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + (sum(heights) or TITLE_HEIGHT)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if not bands:
        draw.text((MARGIN, MARGIN), "nothing is flagged that can be shown", INK, ImageFont.load_default(TITLE_SIZE))
    top = MARGIN
    for shelf, height in zip(shelves, heights, strict=True):
        left = MARGIN
        for band in shelf:
            _draw_band(sheet, draw, band, left, top)
            left += band.columns * (SIDE + GAP)
        top += height
    return sheet


def _shelves(bands: Sequence[Band]) -> list[list[Band]]:
    shelves: list[list[Band]] = []
    taken = COLUMNS
    for band in bands:
        if taken + band.columns > COLUMNS:
            shelves.append([])
            taken = 0
        shelves[-1].append(band)
        taken += band.columns
    return shelves


def _draw_band(sheet: Image.Image, draw: ImageDraw.ImageDraw, band: Band, left: int, top: int) -> None:
    width = band.columns * (SIDE + GAP) - GAP
    colour = ALARM if band.is_alarming else INK
    draw.text((left, top), _shortened(draw, band.title, TITLE_SIZE, width), colour, ImageFont.load_default(TITLE_SIZE))
    subtitle = _shortened(draw, band.subtitle, FONT_SIZE, width)
    draw.text((left, top + 21), subtitle, FAINT, ImageFont.load_default(FONT_SIZE))
    draw.line((left, top + TITLE_HEIGHT - 8, left + width, top + TITLE_HEIGHT - 8), BOX)
    panels = len(band.cells[0])
    for number, cell in enumerate(band.cells):
        row, column = divmod(number * panels, COLUMNS)
        x, y = left + column * (SIDE + GAP), top + TITLE_HEIGHT + row * CELL_HEIGHT
        for at, panel in enumerate(cell):
            _draw_panel(sheet, draw, panel, x + at * (SIDE + GAP), y)
        if panels > 1:  # a line above both says that they belong together
            draw.line((x, y - 3, x + panels * (SIDE + GAP) - GAP, y - 3), FAINT, 2)


def _draw_panel(sheet: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, x: int, y: int) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    if panel.image is None:
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), BOX)
        reason = panel.reason.replace("_", " ")
        left = x + (SIDE - draw.textlength(reason, font)) / 2
        draw.text((left, y + SIDE // 2 - LINE_HEIGHT // 2), reason, ALARM, font)
    else:
        image = panel.image.copy()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(image, (x, y))
        draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=BOX)
    for number, line in enumerate(panel.label.split("\n")[:LABEL_LINES]):
        text = _shortened(draw, line, FONT_SIZE, SIDE)
        draw.text((x, y + SIDE + 3 + number * LINE_HEIGHT), text, INK if number == 0 else FAINT, font)


def _shortened(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """As much of the end as fits: the ends of keys and paths tell them apart."""
    font = ImageFont.load_default(size)
    text = text.encode("utf-8", "replace").decode("utf-8")  # a file's name need not be text
    if len(text) <= width and draw.textlength(text, font) <= width:
        return text
    text = text[-width:]  # no character is narrower than a pixel, and each that goes is a measurement
    while text and draw.textlength(f"…{text}", font) > width:
        text = text[1:]
    return f"…{text}"
