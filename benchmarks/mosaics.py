"""Mosaics of real tiles: four tissues of which a text names one, so that the right place of a map is known.

The grid pointing game of Böhle et al. 2021 (Convolutional Dynamic Alignment Networks, arXiv 2104.00032). They play it
with the images that a model is surest of; here with all of them, sure or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from quality_data import load_tiles
from torch import Tensor

from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.release.explain_figure import explain_figure, save_figure
from quiltnet.release.explaining import explain

STREAM = 11  # first word of the seed, of no other use of the tiles
BATCH = 32
FIGURE_ROWS = 4
SIDE = 2  # cells in a row and in a column
TEXT = "a histopathology slide showing {}."  # of no training caption


class Question(NamedTuple):
    """A picture, what is looked for in it, and (size, size) bool: where that is."""

    picture: Image.Image
    text: str
    where: np.ndarray


def mosaics(data: Path, count: int, size: int) -> list[Question]:
    """Four questions a mosaic, one of each of its tissues. No tile is in two mosaics.

    The order of the tiles of each class, and the cells, are drawn; the classes left out take turns.

    Args:
        data: folder with ``quilt_like``, whose held-out tiles of LC25000 are taken.
        size: side in pixels of ``where``.
    """
    by_class: dict[str, list[Path]] = {}
    for tile in load_tiles(data):
        if tile.class_name and tile.split == "val":
            by_class.setdefault(tile.class_name, []).append(tile.path)
    rng = np.random.default_rng(STREAM)
    names = sorted(by_class)
    waiting = {name: [by_class[name][i] for i in rng.permutation(len(by_class[name]))] for name in names}
    questions = []
    for number in range(count):
        present = [name for place, name in enumerate(names) if place != number % len(names)]
        cells = [present[i] for i in rng.permutation(SIDE * SIDE)]
        if not all(waiting[name] for name in cells):
            raise SystemExit(f"the held-out tiles are enough for {number} mosaics")
        picture = _assembled([Image.open(waiting[name].pop()).convert("RGB") for name in cells])
        questions += [Question(picture, TEXT.format(name), cell_mask(place, size)) for place, name in enumerate(cells)]
    return questions


def draw_figure(models: Mapping[str, ContrastiveModel], questions: Sequence[Question], out: Path) -> None:
    """The figure of ``quiltnet explain``, with a frame around the right cell.

    Shown are the first mosaics; the first is asked for its first cell, the second for its second, and so on.
    """
    from matplotlib.patches import Rectangle

    shown = [questions[number * SIDE * SIDE + number % (SIDE * SIDE)] for number in range(FIGURE_ROWS)]
    explanations = {name: [explain(model, q.picture, q.text) for q in shown] for name, model in models.items()}
    figure = explain_figure(explanations)
    for place, axis in enumerate(figure.axes[1:]):
        where = shown[place // (1 + len(models))].where
        rows, columns = (np.flatnonzero(where.any(axis=other)) for other in (1, 0))
        corner = (columns[0] + 1, rows[0] + 1)
        axis.add_patch(Rectangle(corner, len(columns) - 3, len(rows) - 3, fill=False, edgecolor="black", linewidth=3))
        axis.add_patch(Rectangle(corner, len(columns) - 3, len(rows) - 3, fill=False, edgecolor="white", linewidth=1.5))
    save_figure(figure, out)


def cell_mask(place: int, size: int) -> np.ndarray:
    """(size, size) bool: the pixels of a cell, counted in reading order."""
    where = np.zeros((SIDE, SIDE), bool)
    where.flat[place] = True
    return where.repeat(size // SIDE, axis=0).repeat(size // SIDE, axis=1)


def _assembled(tiles: Sequence[Image.Image]) -> Image.Image:
    width, height = tiles[0].size
    picture = Image.new("RGB", (SIDE * width, SIDE * height))
    for place, tile in enumerate(tiles):
        picture.paste(tile, (place % SIDE * width, place // SIDE * height))
    return picture


@torch.inference_mode()
def occlusion_maps(
    model: ContrastiveModel, picture: Image.Image, texts: Sequence[str], window: int, step: int
) -> list[np.ndarray]:
    """A map (size, size) a text: how much similarity is lost where a window is greyed, 0 where it is gained.

    Zeiler and Fergus 2014 (arXiv 1311.2901). A pixel has the mean of the windows that cover it.
    """
    pixels = model.transform(picture)  # normalised: 0 is the mean colour
    of_texts = model.encode_text(model.batch_tokenizer()(texts)[0]).T  # (D, T)
    size = pixels.shape[-1]
    starts = range(0, size - window + 1, step)
    windows = [(slice(top, top + window), slice(left, left + window)) for top in starts for left in starts]
    similarities = torch.cat([
        model.encode_image(_greyed(pixels, windows[first : first + BATCH])) @ of_texts
        for first in range(0, len(windows), BATCH)
    ])  # fmt: skip
    drops = model.encode_image(pixels[None]) @ of_texts - similarities  # (windows, T)
    lost, covered = torch.zeros(len(texts), size, size), torch.zeros(size, size)
    for (rows, columns), drop in zip(windows, drops, strict=True):
        lost[:, rows, columns] += drop[:, None, None]
        covered[rows, columns] += 1
    return list((lost / covered).clamp(min=0).numpy())


def _greyed(pixels: Tensor, windows: Sequence[tuple[slice, slice]]) -> Tensor:
    """(N, 3, H, W): the image once a window, without it."""
    images = pixels.repeat(len(windows), 1, 1, 1)
    for image, (rows, columns) in zip(images, windows, strict=True):
        image[:, rows, columns] = 0
    return images
