from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from quiltnet.data.contact_sheet import (
    ALARM,
    BOX,
    CELL_HEIGHT,
    COLUMNS,
    GAP,
    MARGIN,
    SIDE,
    TITLE_HEIGHT,
    Band,
    Panel,
    draw_contact_sheet,
)

COLOURS = ["red", "lime", "blue", "black", "orange", "purple", "teal", "navy", "olive", "maroon"]


def panel(colour: str, size: tuple[int, int] = (300, 300)) -> Panel:
    return Panel(Image.new("RGB", size, colour), f"key of {colour}\n{size[0]}x{size[1]}")


def middle(column: int, top: int) -> tuple[int, int]:
    return MARGIN + column * (SIDE + GAP) + SIDE // 2, top + TITLE_HEIGHT + SIDE // 2


def test_panels_stand_in_rows():
    sheet = draw_contact_sheet([Band("broken", "10 of 99", [[panel(colour)] for colour in COLOURS])])
    assert sheet.size == (2 * MARGIN + COLUMNS * (SIDE + GAP) - GAP, 2 * MARGIN + TITLE_HEIGHT + 2 * CELL_HEIGHT)
    for number, colour in enumerate(COLOURS):
        row, column = divmod(number, COLUMNS)
        assert sheet.getpixel(middle(column, MARGIN + row * CELL_HEIGHT)) == ImageColor.getrgb(colour)


def test_pairs_stand_side_by_side_and_never_apart():
    cells = [[panel("red"), panel("blue")] for _ in range(5)]
    sheet = draw_contact_sheet([Band("duplicates", "5", cells)])
    for number in range(5):
        row, cell = divmod(number, COLUMNS // 2)
        top = MARGIN + row * CELL_HEIGHT
        assert sheet.getpixel(middle(2 * cell, top)) == ImageColor.getrgb("red")
        assert sheet.getpixel(middle(2 * cell + 1, top)) == ImageColor.getrgb("blue")


def test_narrow_bands_share_a_row():
    bands = [Band(f"band {number}", "", [[panel(colour)]]) for number, colour in enumerate(COLOURS[:5])]
    sheet = draw_contact_sheet(bands)
    assert sheet.height == 2 * MARGIN + 2 * (TITLE_HEIGHT + CELL_HEIGHT)
    for number, colour in enumerate(COLOURS[:4]):
        assert sheet.getpixel(middle(2 * number, MARGIN)) == ImageColor.getrgb(colour)
    assert sheet.getpixel(middle(0, MARGIN + TITLE_HEIGHT + CELL_HEIGHT)) == ImageColor.getrgb(COLOURS[4])


def test_what_cannot_be_shown_is_a_grey_box_with_the_reason():
    sheet = draw_contact_sheet([Band("broken", "1 of 9", [[Panel(None, "key", "empty_image")]], is_alarming=True)])
    x, y = MARGIN, MARGIN + TITLE_HEIGHT
    box = np.asarray(sheet)[y : y + SIDE, x : x + SIDE].reshape(-1, 3)
    grey = (box == ImageColor.getrgb(BOX)).all(axis=1).mean()
    assert 0.9 < grey < 0.999
    assert (box == ImageColor.getrgb(ALARM)).all(axis=1).any()  # the letters


@pytest.mark.parametrize("size", [(40, 40), (2000, 100), (1, 900)])
def test_the_aspect_is_kept_and_nothing_is_enlarged(size):
    sheet = draw_contact_sheet([Band("odd", "", [[panel("red", size)]])])
    red = np.argwhere((np.asarray(sheet) == ImageColor.getrgb("red")).all(axis=2))
    height, width = red.max(axis=0) - red.min(axis=0) + 1
    assert width <= min(SIDE, size[0]) and height <= min(SIDE, size[1])


def test_labels_stay_in_their_column():
    """A key of a hundred letters is cut, and does not run into its neighbour."""
    long = Panel(Image.new("RGB", (300, 300), "white"), "k" * 100)
    sheet = np.asarray(draw_contact_sheet([Band("a", "", [[long], [panel("red")]])])).astype(int)
    label = slice(MARGIN + TITLE_HEIGHT + SIDE + 2, MARGIN + TITLE_HEIGHT + SIDE + 18)
    gap = slice(MARGIN + SIDE + 1, MARGIN + SIDE + GAP - 1)
    assert (sheet[label, gap] == 255).all() and (sheet[label, MARGIN : MARGIN + SIDE] < 128).any()


def test_a_name_of_a_megabyte_is_cut_at_once():
    names = [Panel(None, f"{'k' * 1_000_000}end"), Panel(None, "k" * 99 + "end")]
    one, other = (np.asarray(draw_contact_sheet([Band("a", "", [[name]])])) for name in names)
    assert (one == other).all()


def test_nothing_to_show():
    assert draw_contact_sheet([]).height == 2 * MARGIN + TITLE_HEIGHT
