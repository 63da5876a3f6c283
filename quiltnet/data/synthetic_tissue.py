"""Ten tissue patterns, each a short drawing of nuclei (haematoxylin) and of what lies around them (eosin)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from quiltnet.data.synthetic_canvas import FIELD_UM, Canvas, smooth_step
from quiltnet.errors import UserError


@dataclass(frozen=True)
class Attributes:
    """What varies within a pattern. Every value is drawn so that it can be seen, and measured."""

    cellularity: Literal["low", "high"]
    nuclear_size: Literal["small", "large"]
    stain: Literal["pale", "strong"]
    inflammation: Literal["absent", "present"]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Attributes:
        """Each attribute by an even coin of its own."""
        cellularity, nuclear_size, stain, inflammation = rng.integers(2, size=4)
        return cls(
            ("low", "high")[cellularity],
            ("small", "large")[nuclear_size],
            ("pale", "strong")[stain],
            ("absent", "present")[inflammation],
        )

    @property
    def crowded(self) -> bool:
        return self.cellularity == "high"

    @property
    def nuclear_scale(self) -> float:
        """Factor on the radius of a pattern's nuclei: large ones have two and a half times the area."""
        return 1.3 if self.nuclear_size == "large" else 0.82


def draw_tile(pattern: str, attributes: Attributes, size: int, rng: np.random.Generator) -> np.ndarray:
    """One tile, (size, size, 3) uint8, 128 microns across. Raises UserError for an unknown pattern."""
    if pattern not in PAINTERS:
        raise UserError(f"there is no synthetic pattern {pattern!r}; choose one of {', '.join(PATTERNS)}")
    strength = rng.uniform(0.75, 0.95) if attributes.stain == "strong" else rng.uniform(0.36, 0.48)
    quarter_turns = rng.integers(4)
    canvas = Canvas(size, rng)
    PAINTERS[pattern](canvas, attributes)
    if attributes.inflammation == "present":
        paint_infiltrate(canvas)
    canvas.haematoxylin *= 1 + 0.12 * canvas.noise(2.5)  # chromatin is clumped
    canvas.eosin *= 1 + 0.08 * canvas.noise(3.0, octaves=2)
    return np.rot90(canvas.develop(strength), quarter_turns).copy()


def paint_adipose(canvas: Canvas, attributes: Attributes) -> None:
    """Empty round cells in a net of thin membranes, nuclei pressed flat against the walls."""
    fat = canvas.mosaic(40, x=canvas.x + 1.5 * canvas.noise(25), y=canvas.y + 1.5 * canvas.noise(25))
    corners = smooth_step(fat.to_centre, 23, 27)  # where round cells leave a gap between three of them
    membrane = np.maximum(np.exp(-((fat.to_border / 2.2) ** 2)), corners)
    canvas.eosin += 0.55 * membrane
    canvas.haematoxylin += 0.08 * membrane
    canvas.open_to_infiltrate = membrane
    middles, along = fat.walls()
    keep = canvas.rng.random(len(middles)) < (0.95 if attributes.crowded else 0.35)
    add_nuclei(canvas, middles[keep], 2.9 * attributes.nuclear_scale, 2.6, along[keep])


def paint_glands(canvas: Canvas, attributes: Attributes) -> None:
    """Tubes cut across: a lumen, a ring of columnar cells with basal nuclei, pink stroma in between."""
    rng = canvas.rng
    bend = 1 + 0.10 * canvas.noise(22)
    tubes = canvas.mosaic(54, jitter=0.2)
    outer = rng.uniform(20, 25, len(tubes.centres)).astype(np.float32)
    depth = tubes.to_centre * bend / outer[tubes.own]  # 0 in the middle of a gland, 1 at its outline
    gland = 1 - smooth_step(depth, 0.97, 1.03)
    lumen = 1 - smooth_step(depth, 0.36, 0.42)
    paint_collagen(canvas, waviness=5.0)
    canvas.eosin = canvas.eosin * (1 - gland) + gland * (1 - lumen) * (0.42 + 0.1 * (depth < 0.55))
    canvas.haematoxylin += gland * (1 - lumen) * 0.14 + lumen * 0.03 * (1 + canvas.noise(8))
    canvas.open_to_infiltrate = 1 - gland

    for row in (0.82, 0.64) if attributes.crowded else (0.80,):
        gland_of, turn = around(rng, outer * row, spacing_um=5.2 if attributes.crowded else 7.5)
        spoke = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
        reach = (outer * row)[gland_of] * rng.normal(1, 0.03, len(turn))
        straight = tubes.centres[gland_of] + spoke * reach[:, None]
        nuclei = tubes.centres[gland_of] + spoke * (reach / canvas.at(bend, straight))[:, None]
        add_nuclei(canvas, nuclei, 2.7 * attributes.nuclear_scale, 1.6, turn, hollow=0.3)
    add_fibroblasts(canvas, attributes, depth > 1.15)


def around(rng: np.random.Generator, radius: np.ndarray, spacing_um: float) -> tuple[np.ndarray, np.ndarray]:
    """Points about evenly spaced on circles of radius (G,) microns: circle (N,) and angle (N,) of each."""
    counts = (2 * np.pi * radius / spacing_um).astype(int)
    circle = np.repeat(np.arange(len(radius)), counts)
    rank = np.arange(len(circle)) - np.repeat(np.cumsum(counts) - counts, counts)
    turn = 2 * np.pi * (rank + rng.uniform(-0.25, 0.25, len(rank)) + rng.random()) / counts[circle]
    return circle, turn


def paint_smooth_muscle(canvas: Canvas, attributes: Attributes) -> None:
    """Parallel, gently wavy pink fibres with blunt, elongated nuclei along them."""
    along, across, direction = flow(canvas, waviness=5.0, wave_um=60)
    fibres = canvas.streaks(along / 45, across / 3.0)
    clefts = np.exp(-((canvas.streaks(along / 60, across / 9) / 0.10) ** 2))
    canvas.eosin += (0.78 + 0.13 * fibres) * (1 - 0.75 * clefts)
    canvas.haematoxylin += 0.06
    nuclei = canvas.scatter(13 if attributes.crowded else 20, jitter=0.45)
    angle = canvas.at(direction, nuclei)
    add_nuclei(canvas, nuclei, 2.5 * attributes.nuclear_scale, 4.5, angle, hollow=0.15)


def paint_lymphocytes(canvas: Canvas, attributes: Attributes) -> None:
    """Dark round nuclei shoulder to shoulder, hardly any cytoplasm."""
    canvas.eosin += 0.22 + 0.05 * canvas.noise(12)
    canvas.haematoxylin += 0.10
    nuclei = canvas.scatter(6.6 if attributes.crowded else 8.8, jitter=0.35)
    radius = 2.9 * attributes.nuclear_scale * canvas.rng.uniform(0.9, 1.1, len(nuclei))
    add_nuclei(canvas, nuclei, radius, density=1.15)


def paint_fibrous_stroma(canvas: Canvas, attributes: Attributes) -> None:
    """Crimped collagen with pale clefts and a few thin spindle nuclei."""
    direction = paint_collagen(canvas, waviness=8.0)
    nuclei = canvas.scatter(14 if attributes.crowded else 26, jitter=0.45)
    add_nuclei(canvas, nuclei, 1.9 * attributes.nuclear_scale, 6.0, canvas.at(direction, nuclei))


def paint_collagen(canvas: Canvas, waviness: float) -> np.ndarray:
    """Wavy fibres over the whole field; returns their direction, (size, size) in radians."""
    along, across, direction = flow(canvas, waviness, wave_um=42)
    fibres = canvas.streaks(along / 30, across / 1.8)
    clefts = np.exp(-((canvas.streaks(along / 35, across / 7 + 31) / 0.28) ** 2))
    canvas.eosin += (0.50 + 0.16 * fibres).clip(0.1) * (1 - 0.85 * clefts)
    return direction


def paint_mucin(canvas: Canvas, attributes: Attributes) -> None:
    """Pale blue-grey pools with strands, thin pink septa, and clusters of cells that float."""
    rng = canvas.rng
    pools = canvas.mosaic(78, x=canvas.x + 6 * canvas.noise(30), y=canvas.y + 6 * canvas.noise(30))
    septa = 1 - smooth_step(pools.to_border, 3, 6)
    along, across, _ = flow(canvas, waviness=14.0, wave_um=45)
    strands = np.exp(-((canvas.streaks(along / 40, across / 11) / 0.09) ** 2))
    canvas.haematoxylin += (1 - septa) * (0.15 + 0.035 * canvas.noise(20, octaves=3) + 0.13 * strands)
    canvas.eosin += 0.05 + septa * 0.42
    canvas.open_to_infiltrate = septa + 0.02
    clusters = rng.uniform(14, FIELD_UM - 14, (7 if attributes.crowded else 3, 1, 2))
    cells = (clusters + rng.normal(0, 6.5, (len(clusters), 9, 2))).reshape(-1, 2).astype(np.float32)
    tilt = rng.uniform(0, np.pi, len(cells))
    canvas.eosin += 0.38 * canvas.ellipses(cells, 5.6, 1.15, tilt, ragged=0.05)
    add_nuclei(canvas, cells, 2.9 * attributes.nuclear_scale, 1.2, tilt, hollow=0.2)


def paint_necrosis(canvas: Canvas, attributes: Attributes) -> None:
    """Smudged pink debris: ghosts of cells, nuclear dust, here and there a shrunken nucleus."""
    rng = canvas.rng
    ghosts = canvas.mosaic(12, jitter=0.38)
    outline = np.exp(-((ghosts.to_border / 1.5) ** 2))
    faded = 1 - smooth_step(ghosts.to_centre, 2.2, 4.2)
    canvas.eosin += 0.66 + 0.14 * canvas.noise(16, octaves=4) - 0.22 * outline - 0.16 * faded
    canvas.haematoxylin += 0.08 + 0.04 * canvas.noise(30)
    clouds = rng.uniform(0, FIELD_UM, (9 if attributes.crowded else 5, 1, 2))
    dust = (clouds + rng.normal(0, 11, (len(clouds), 34, 2))).reshape(-1, 2).astype(np.float32)
    add_nuclei(canvas, dust, rng.uniform(0.45, 1.25, len(dust)), density=rng.uniform(0.5, 1.1, len(dust)))
    shrunken = canvas.scatter(19 if attributes.crowded else 33, jitter=0.45)
    add_nuclei(canvas, shrunken, 2.4 * attributes.nuclear_scale, 1.15, density=1.0, ragged=0.2)


def paint_squamous(canvas: Canvas, attributes: Attributes) -> None:
    """Keratin on top, cells that flatten, polygonal cells with pale bridges, a dark basal row, stroma."""
    rng = canvas.rng
    rise = rng.uniform(-0.2, 0.2) * (canvas.x - FIELD_UM / 2) + 4 * canvas.noise(45)
    depth = ((canvas.y + rise) / FIELD_UM).clip(0, 1)  # 0 at the surface, 1 at the bottom
    stroma = smooth_step(depth, 0.83, 0.85)
    keratin = 1 - smooth_step(depth, 0.13, 0.17)
    living = 1 - np.maximum(stroma, keratin)
    # Cells are equal in the root of the depth: flat near the surface, tall near the base.
    cells = canvas.mosaic(11 if attributes.crowded else 16, jitter=0.28, y=FIELD_UM * np.sqrt(depth))
    bridges = np.exp(-((cells.to_border / 1.5) ** 2)) * smooth_step(depth, 0.2, 0.4)
    lamellae = canvas.streaks(canvas.x / 50, depth * FIELD_UM / 2.2)
    paint_collagen(canvas, waviness=5.0)
    canvas.eosin *= stroma
    canvas.eosin += keratin * (0.95 + 0.3 * lamellae) + living * (0.72 - 0.42 * depth) * (1 - 0.5 * bridges)
    canvas.haematoxylin += living * (0.04 + 0.22 * smooth_step(depth, 0.4, 0.85))
    canvas.open_to_infiltrate = stroma + 0.15 * living
    add_squamous_nuclei(canvas, attributes, cells.centres, rise)
    add_fibroblasts(canvas, attributes, stroma == 1)


def add_squamous_nuclei(canvas: Canvas, attributes: Attributes, cells: np.ndarray, rise: np.ndarray) -> None:
    """One in each cell (N, 2) between basal row and keratin, flatter higher up; and the basal row itself."""
    middle = np.stack([cells[:, 0], cells[:, 1].clip(0) ** 2 / FIELD_UM], axis=-1)
    middle = middle[(middle[:, 1] > 0.19 * FIELD_UM) & (middle[:, 1] < 0.74 * FIELD_UM)]
    height = 1 - middle[:, 1] / FIELD_UM
    middle[:, 1] -= canvas.at(rise, middle)
    radius = 2.9 * attributes.nuclear_scale * (1.15 - 0.5 * height)
    add_nuclei(canvas, middle, radius, elongation=1 + 2.5 * height**2)

    x = np.arange(0, FIELD_UM, 4.5 if attributes.crowded else 6.5)
    basal = np.stack([x, np.full(len(x), 0.80 * FIELD_UM)], axis=-1)
    basal += canvas.rng.normal(0, 0.8, basal.shape)
    basal[:, 1] -= canvas.at(rise, basal)
    add_nuclei(canvas, basal, 2.7 * attributes.nuclear_scale, elongation=1.6, angle=np.pi / 2, density=1.1)


def paint_tumor(canvas: Canvas, attributes: Attributes) -> None:
    """Solid nests of cells with vesicular, uneven nuclei and nucleoli, divided by thin septa."""
    rng = canvas.rng
    nests = canvas.mosaic(72, x=canvas.x + 5 * canvas.noise(30), y=canvas.y + 5 * canvas.noise(30))
    septa = 1 - smooth_step(nests.to_border, 3.0, 5.5)
    cells = canvas.mosaic(11.5 if attributes.crowded else 16, jitter=0.3)
    walls = np.exp(-((cells.to_border / 1.1) ** 2))
    canvas.eosin += septa * 0.7 + (1 - septa) * (0.34 + 0.06 * canvas.noise(20) + 0.2 * walls)
    canvas.haematoxylin += (1 - septa) * 0.14
    canvas.open_to_infiltrate = septa + 0.05
    radius = 3.9 * attributes.nuclear_scale * rng.uniform(0.78, 1.25, len(cells.centres))
    elongation, angle = rng.uniform((1, 0), (1.5, np.pi), (len(radius), 2)).T
    present = canvas.at(septa, cells.centres) < 0.3
    density = 0.95 * present
    add_nuclei(canvas, cells.centres, radius, elongation, angle, density=density, hollow=0.55, ragged=0.06)
    nucleoli = cells.centres + rng.normal(0, 0.8, cells.centres.shape)
    add_nuclei(canvas, nucleoli, 0.30 * radius, density=1.1 * present)


def paint_cartilage(canvas: Canvas, attributes: Attributes) -> None:
    """A glassy blue-violet matrix; chondrocytes in clear lacunae, often two together, with a darker halo."""
    rng = canvas.rng
    groups = canvas.scatter(27 if attributes.crowded else 40, jitter=0.38)
    angle = rng.uniform(0, np.pi, len(groups))
    apart = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * 5.4
    paired = rng.random(len(groups)) < 0.6
    lacunae = np.concatenate([groups - apart * paired[:, None], (groups + apart)[paired]])
    tilt = np.concatenate([angle, angle[paired]]) + np.pi / 2
    halo = canvas.ellipses(lacunae, 10.5, value=0.9, hollow=0.2)
    space = canvas.ellipses(lacunae, 5.6, 1.25, tilt, ragged=0.05)
    canvas.haematoxylin += (0.26 + 0.035 * canvas.noise(40, octaves=2) + 0.16 * halo) * (1 - 0.92 * space)
    canvas.eosin += (0.13 + 0.03 * canvas.noise(50)) * (1 - 0.9 * space)
    canvas.eosin += 0.2 * canvas.ellipses(lacunae, 4.1, 1.2, tilt, ragged=0.12)
    add_nuclei(canvas, lacunae, 2.4 * attributes.nuclear_scale, 1.15, tilt)


def paint_infiltrate(canvas: Canvas) -> None:
    """Lymphocytes and eosinophils in loose crowds, where the pattern leaves them room."""
    rng = canvas.rng
    candidates = rng.uniform(0, FIELD_UM, (1500, 2))
    is_eosinophil = rng.random(len(candidates)) < 0.35
    welcome = canvas.at(canvas.open_to_infiltrate * np.exp(canvas.noise(28)), candidates)
    chosen = np.flatnonzero(rng.random(len(candidates)) * 4 < welcome)[:80]
    lymphocytes = candidates[chosen[~is_eosinophil[chosen]]]
    eosinophils = candidates[chosen[is_eosinophil[chosen]]]

    add_nuclei(canvas, lymphocytes, 2.5, density=1.15)
    canvas.eosin = np.maximum(canvas.eosin, 1.05 * canvas.ellipses(eosinophils, 4.2, ragged=0.04))
    angle = rng.uniform(0, np.pi, len(eosinophils))
    lobe = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * 1.7  # their nuclei have two
    add_nuclei(canvas, np.concatenate([eosinophils - lobe, eosinophils + lobe]), 1.6, density=1.0)


def add_fibroblasts(canvas: Canvas, attributes: Attributes, where: np.ndarray) -> None:
    """Spindle nuclei of the stroma between other structures. where: (size, size) bool."""
    nuclei = canvas.scatter(14)
    angle = canvas.rng.uniform(0, np.pi, len(nuclei))
    add_nuclei(canvas, nuclei, 1.9 * attributes.nuclear_scale, 3.5, angle, density=0.95 * canvas.at(where, nuclei))


def add_nuclei(
    canvas: Canvas,
    centres: np.ndarray,
    radius: np.ndarray | float,
    elongation: np.ndarray | float = 1.1,
    angle: np.ndarray | float = 0.0,
    *,
    density: np.ndarray | float = 0.95,
    hollow: float = 0.0,
    ragged: float = 0.04,
) -> None:
    """Nuclei of radius microns at centres (N, 2), over whatever lies there; one of density 0 is not there.

    (Leaving nuclei out of the list instead would shift all later random draws by what single pixels decide.)
    """
    radius = radius * canvas.rng.uniform(0.92, 1.08, len(centres))
    density = density * canvas.rng.uniform(0.85, 1.1, len(centres))
    nuclei = canvas.ellipses(centres, radius, elongation, angle, value=density, hollow=hollow, ragged=ragged)
    canvas.haematoxylin = np.maximum(canvas.haematoxylin, nuclei)


def flow(canvas: Canvas, waviness: float, wave_um: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wavy parallel fibres: microns along, microns across, direction in radians; (size, size) each."""
    turn = canvas.rng.uniform(0, np.pi)
    along = canvas.x * np.cos(turn) + canvas.y * np.sin(turn)
    across = canvas.y * np.cos(turn) - canvas.x * np.sin(turn) + waviness * canvas.noise(wave_um)
    down, right = np.gradient(across, canvas.pixel_um)
    return along.astype(np.float32), across.astype(np.float32), np.arctan2(-right, down)


PAINTERS: dict[str, Callable[[Canvas, Attributes], None]] = {
    "adipose": paint_adipose,
    "glands": paint_glands,
    "smooth_muscle": paint_smooth_muscle,
    "lymphocytes": paint_lymphocytes,
    "fibrous_stroma": paint_fibrous_stroma,
    "mucin": paint_mucin,
    "necrosis": paint_necrosis,
    "squamous": paint_squamous,
    "tumor": paint_tumor,
    "cartilage": paint_cartilage,
}
PATTERNS = tuple(PAINTERS)
