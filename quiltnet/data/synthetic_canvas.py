"""What a synthetic tile is drawn on: two stain maps, the shapes of tissue, the light through them.

A canvas always shows the same ``FIELD_UM`` microns; its size in pixels is only the resolution. Randomness is
spent on positions in microns, never on pixels, so a tile drawn at two sizes is the same picture twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

FIELD_UM = 128.0
BACKGROUND = 243.0  # grey level of an empty, well exposed slide

# Optical density of one unit of haematoxylin and of eosin in red, green and blue. Laboratories differ; a
# tile lies between two published pairs.
RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])  # Ruifrok & Johnston, Anal Quant Cytol Histol 2001
MACENKO = np.array([[0.563, 0.720, 0.406], [0.216, 0.801, 0.558]])  # Macenko et al., ISBI 2009: the usual reference

LATTICE_MARGIN = 2  # lattice rows and columns before the field, so that every pixel has neighbours all around


@dataclass(frozen=True)
class Mosaic:
    """A tiling of the field by (Voronoi) cells. lattice: their centres, (R, C, 2); maps: (size, size)."""

    lattice: np.ndarray
    own: np.ndarray  # the cell a pixel belongs to, as an index of centres
    to_centre: np.ndarray  # microns to the centre of the own cell
    to_border: np.ndarray  # about twice the microns to the nearest wall

    @property
    def centres(self) -> np.ndarray:
        """(R*C, 2), x and y in microns; some lie outside the field."""
        return self.lattice.reshape(-1, 2)

    def walls(self) -> tuple[np.ndarray, np.ndarray]:
        """Middle (N, 2) and direction (N,) of the walls between neighbours along rows and columns."""
        one = np.concatenate([self.lattice[:, :-1].reshape(-1, 2), self.lattice[:-1].reshape(-1, 2)])
        other = np.concatenate([self.lattice[:, 1:].reshape(-1, 2), self.lattice[1:].reshape(-1, 2)])
        across = other - one
        return (one + other) / 2, np.arctan2(across[:, 0], -across[:, 1])


class Canvas:
    """Concentrations of haematoxylin and eosin over a square field, (size, size) float32, empty at first."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        self.rng = rng
        self.pixel_um = FIELD_UM / size
        stains = RUIFROK + rng.uniform(0.3, 0.8) * (MACENKO - RUIFROK)
        self.stains = (stains * rng.uniform(0.9, 1.1, (2, 1))).astype(np.float32)
        axis = ((np.arange(size) + 0.5) * self.pixel_um).astype(np.float32)
        self.x = np.broadcast_to(axis, (size, size))
        self.y = np.broadcast_to(axis[:, None], (size, size))
        self.haematoxylin = np.zeros((size, size), np.float32)
        self.eosin = np.zeros((size, size), np.float32)
        self.open_to_infiltrate = np.ones((size, size), np.float32)  # how welcome inflammatory cells are

    def noise(self, grain_um: float, octaves: int = 1) -> np.ndarray:
        """Smooth noise, (size, size), zero mean, about unit spread: bumps of grain_um, half of that, ..."""
        total = np.zeros((self.size, self.size), np.float32)
        for octave in range(octaves):
            span = FIELD_UM / grain_um * 2**octave
            count = int(np.ceil(span)) + 1
            bumps = Image.fromarray(self.rng.standard_normal((count, count), np.float32))
            smooth = bumps.resize((self.size, self.size), Image.Resampling.BICUBIC, box=(0, 0, span, span))
            total += 0.6**octave * np.asarray(smooth)
        return total * 1.5  # interpolation takes a third of the spread

    def streaks(self, along: np.ndarray, across: np.ndarray) -> np.ndarray:
        """Noise, (size, size), over coordinates of one's own: maps counted in streak lengths and widths."""
        values = self.rng.standard_normal((64, 64), np.float32)  # repeats after 64 streaks
        column, row = np.floor(along).astype(np.int32), np.floor(across).astype(np.int32)
        right, down = smooth_step(along - column, 0, 1), smooth_step(across - row, 0, 1)
        column, row, next_column, next_row = column & 63, row & 63, (column + 1) & 63, (row + 1) & 63
        upper = values[row, column] * (1 - right) + values[row, next_column] * right
        lower = values[next_row, column] * (1 - right) + values[next_row, next_column] * right
        return upper * (1 - down) + lower * down

    def scatter(self, spacing_um: float, jitter: float = 0.32) -> np.ndarray:
        """Positions (N, 2), x and y, that keep their distance: a shaken hexagonal lattice over the field."""
        positions = self._lattice(spacing_um, jitter).reshape(-1, 2)
        return positions[(np.abs(positions - FIELD_UM / 2) < FIELD_UM / 2 + spacing_um).all(axis=-1)]

    def _lattice(self, spacing_um: float, jitter: float) -> np.ndarray:
        """(R, C, 2): a hexagonal lattice that covers the field, each point moved by up to jitter spacings."""
        count = int(np.ceil(FIELD_UM / spacing_um)) + 2 * LATTICE_MARGIN
        row, column = np.mgrid[:count, :count]
        points = np.stack([column + 0.5 + 0.5 * (row % 2), row + 0.5], axis=-1) - LATTICE_MARGIN
        return ((points + self.rng.uniform(-jitter, jitter, points.shape)) * spacing_um).astype(np.float32)

    def mosaic(
        self,
        spacing_um: float,
        jitter: float = 0.32,
        x: np.ndarray | None = None,
        y: np.ndarray | None = None,
    ) -> Mosaic:
        """The cells around a shaken lattice; x and y, (size, size), replace the canvas's own coordinates.

        Only nine lattice points are asked for a pixel. With a jitter of up to 0.4 they miss a nearer one in
        less than one pixel of a thousand.
        """
        x = (self.x if x is None else x) / spacing_um + LATTICE_MARGIN
        y = (self.y if y is None else y) / spacing_um + LATTICE_MARGIN
        lattice = self._lattice(spacing_um, jitter)
        count = lattice.shape[1]
        centre_x, centre_y = (lattice.reshape(-1, 2) / spacing_um + LATTICE_MARGIN).T
        nearest = np.full(x.shape, np.inf, np.float32)
        second = nearest.copy()
        own = np.zeros(x.shape, np.int32)
        for row_step in (-1, 0, 1):
            row = np.floor(y).astype(np.int32) + row_step
            middle = row * count + np.floor(x - 0.5 * (row % 2)).astype(np.int32)
            for column_step in (-1, 0, 1):
                candidate = middle + column_step
                distance = np.hypot(x - centre_x[candidate], y - centre_y[candidate])
                closer = distance < nearest
                second = np.where(closer, nearest, np.minimum(second, distance))
                nearest = np.where(closer, distance, nearest)
                own = np.where(closer, candidate, own)
        return Mosaic(lattice, own, nearest * spacing_um, (second - nearest) * spacing_um)

    def at(self, field: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Values (N,) of a (size, size) map at positions (N, 2) in microns; outside the field, its edge's."""
        column, row = (positions / self.pixel_um).astype(np.int32).clip(0, self.size - 1).T
        return field[row, column]

    def ellipses(
        self,
        centres: np.ndarray,
        radius: np.ndarray | float,
        elongation: np.ndarray | float = 1.0,
        angle: np.ndarray | float = 0.0,
        *,
        value: np.ndarray | float = 1.0,
        hollow: float = 0.0,
        ragged: float = 0.0,
    ) -> np.ndarray:
        """A (size, size) map of N smooth-edged ellipses of area pi radius², the strongest where they overlap.

        centres: (N, 2); radius (microns), elongation, angle (radians) and value: (N,), or one for all. hollow
        lowers the middle by that share; ragged bends the outline.
        """
        table = np.stack(np.broadcast_arrays(centres[:, 0], centres[:, 1], radius, elongation, angle, value)).astype(
            np.float32
        )  # (6, N)
        reach_um = float((table[2] * np.sqrt(table[3])).max(initial=0)) * (1 + 3 * ragged)
        table = table[:, (np.abs(table[:2] - FIELD_UM / 2) < FIELD_UM / 2 + reach_um).all(axis=0)]
        x, y, radius, elongation, angle, value = table[:, :, None, None]  # (N, 1, 1) each, for windows (N, P, P)
        long, short = radius * np.sqrt(elongation), radius / np.sqrt(elongation)

        column, row, dx, dy = self._windows(x, y, reach_um)
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / long
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / short
        squared = u * u + v * v
        distance = np.sqrt(squared)  # 1 on the outline
        if ragged:  # third harmonics in the angle: cos 3t = u (u² - 3v²) / r³, and the sine likewise
            even, odd = self.rng.normal(0, ragged, (2, *x.shape)).astype(np.float32)
            bend = even * u * (u * u - 3 * v * v) + odd * v * (3 * u * u - v * v)
            distance += bend / (squared * distance + 1e-6)
        edge = ((1 - distance) * short / self.pixel_um + 0.5).clip(0, 1)
        shade = edge * value * (1 - hollow * (1 - squared).clip(0, 1))

        seen = (row >= 0) & (row < self.size) & (column >= 0) & (column < self.size) & (shade > 0)
        drawn = np.zeros(self.size * self.size, np.float32)
        np.maximum.at(drawn, (row * self.size + column)[seen], shade[seen])
        return drawn.reshape(self.size, self.size)

    def _windows(self, x: np.ndarray, y: np.ndarray, reach_um: float) -> tuple[np.ndarray, ...]:
        """Pixels around N positions (N, 1, 1): column and row, and microns from the position in x and y."""
        reach = int(np.ceil(reach_um / self.pixel_um)) + 1
        window = np.arange(-reach, reach + 1)
        column = np.floor(x / self.pixel_um).astype(np.int32) + window
        row = np.floor(y / self.pixel_um).astype(np.int32) + window[:, None]
        dx = ((column + 0.5) * self.pixel_um - x).astype(np.float32)
        dy = ((row + 0.5) * self.pixel_um - y).astype(np.float32)
        return column, row, dx, dy

    def develop(self, strength: float) -> np.ndarray:
        """Light through the section (Beer-Lambert): (size, size, 3) uint8. strength scales both stains."""
        concentration = strength * np.stack([self.haematoxylin, self.eosin], axis=-1).clip(0)
        return np.rint(BACKGROUND * 10.0 ** -(concentration @ self.stains)).astype(np.uint8)


def smooth_step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below low, 1 above high, and a slope without corners in between."""
    ramp = ((values - low) / (high - low)).clip(0, 1)
    return ramp * ramp * (3 - 2 * ramp)
