"""Each method against its definition, written out in float64 for one image (H, W, 3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quiltnet.data.decoding import decode_image, jpeg_size
from quiltnet.data.stain import (
    MACENKO_REFERENCE,
    REINHARD_REFERENCE,
    estimate_stains,
    hed_jitter,
    hed_to_rgb,
    lab_statistics,
    macenko_normalize,
    reinhard_normalize,
    rgb_to_hed,
)
from quiltnet.data.synthetic import draw_pairs

NORMALIZERS = pytest.mark.parametrize("normalize", [macenko_normalize, reinhard_normalize])

HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LAB = np.array(
    [
        [1 / np.sqrt(3), 1 / np.sqrt(3), 1 / np.sqrt(3)],
        [1 / np.sqrt(6), 1 / np.sqrt(6), -2 / np.sqrt(6)],
        [1 / np.sqrt(2), -1 / np.sqrt(2), 0],
    ]
)
REFERENCE_VECTORS = np.array(MACENKO_REFERENCE[0]) / np.linalg.norm(MACENKO_REFERENCE[0], axis=0)


def hed_of(rgb: np.ndarray) -> np.ndarray:
    return -np.log(rgb + 1 / 255) @ np.linalg.inv(HED)


def rgb_of(hed: np.ndarray) -> np.ndarray:
    return np.clip(np.exp(-hed @ HED) - 1 / 255, 0, 1)


def stains_of(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Macenko et al. 2009: vectors (3, 2), 99th percentiles (2,), concentrations (2, pixels)."""
    density = -np.log((rgb.reshape(-1, 3) * 255 + 1) / 240)
    tissue = density[~(density < 0.15).any(1)]
    _, eigenvectors = np.linalg.eigh(np.cov(tissue.T))
    plane = eigenvectors[:, 1:]
    plane = plane * np.where(tissue.mean(0) @ plane < 0, -1, 1)
    projected = tissue @ plane
    angle = np.arctan2(projected[:, 1], projected[:, 0])
    ends = [plane @ [np.cos(phi), np.sin(phi)] for phi in np.percentile(angle, [1, 99])]
    vectors = np.stack(ends if ends[0][0] > ends[1][0] else ends[::-1], 1)
    concentration = np.linalg.lstsq(vectors, density.T, rcond=None)[0]
    return vectors, np.percentile(concentration, 99, axis=1), concentration


def macenko_of(rgb: np.ndarray) -> np.ndarray:
    _, strongest, concentration = stains_of(rgb)
    target, target_strongest = (np.array(values) for values in MACENKO_REFERENCE)
    target = target / np.linalg.norm(target, axis=0)
    density = target @ (concentration * (target_strongest / strongest)[:, None])
    return np.clip(240 / 255 * np.exp(-density), 0, 1).T.reshape(rgb.shape)


def lab_of(rgb: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(rgb, 1 / 255) * 255 @ LMS.T) @ LAB.T


def reinhard_of(rgb: np.ndarray) -> np.ndarray:
    lab = lab_of(rgb).reshape(-1, 3)
    lab = (lab - lab.mean(0)) / lab.std(0) * REINHARD_REFERENCE[1] + REINHARD_REFERENCE[0]
    return np.clip(np.exp(lab @ np.linalg.inv(LAB).T) @ np.linalg.inv(LMS).T / 255, 0, 1).reshape(rgb.shape)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Drawn H&E-like tiles, (8, 96, 96, 3) float64 in [0, 1]."""
    return np.stack([decode_image(pair.jpeg()) for pair in draw_pairs(8, 96)]) / 255


def as_batch(tiles: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).to(dtype)


def levels(batch: torch.Tensor, tiles: np.ndarray) -> np.ndarray:
    """|difference| in levels of 255, after rounding to them."""
    return np.abs(np.rint(batch.permute(0, 2, 3, 1).double().numpy() * 255) - np.rint(tiles * 255))


def test_hed_is_its_definition(tiles):
    image = as_batch(tiles)
    expected = np.stack([hed_of(tile) for tile in tiles])
    assert np.abs(rgb_to_hed(image).permute(0, 2, 3, 1).numpy() - expected).max() < 1e-4
    assert levels(hed_to_rgb(rgb_to_hed(image)), tiles).max() == 0


def test_hed_round_trip_of_every_corner():
    corners = np.array(np.meshgrid([0, 1], [0, 1], [0, 1])).reshape(3, 1, 8).transpose(1, 2, 0)[None].astype(float)
    assert levels(hed_to_rgb(rgb_to_hed(as_batch(corners))), corners).max() == 0


def test_stains_are_told_apart():
    """A pixel of one stain alone has that stain, and none of the others."""
    amounts = 0.8 * np.eye(3)[None]
    found = rgb_to_hed(as_batch(rgb_of(amounts)[None], torch.float64))
    assert np.abs(found[0, :, 0].numpy() - amounts[0]).max() < 1e-6


@pytest.mark.parametrize("strength", [0.05, 0.2])
def test_hed_jitter_is_its_definition(tiles, strength):
    rng = np.random.default_rng(0)
    alpha = rng.uniform(1 - strength, 1 + strength, (len(tiles), 3))
    beta = rng.uniform(-strength, strength, (len(tiles), 3))
    expected = np.stack([rgb_of(a * hed_of(tile) + b) for tile, a, b in zip(tiles, alpha, beta, strict=True)])
    jittered = hed_jitter(as_batch(tiles), torch.from_numpy(alpha).float(), torch.from_numpy(beta).float())
    assert levels(jittered, expected).max() <= 1
    assert levels(jittered, tiles).mean() > 1


def test_macenko_is_its_definition(tiles):
    vectors, strongest, is_estimable = estimate_stains(as_batch(tiles))
    assert is_estimable.all()
    for number, tile in enumerate(tiles):
        expected_vectors, expected_strongest, _ = stains_of(tile)
        assert np.abs(vectors[number].numpy() - expected_vectors).max() < 1e-4
        assert np.abs(strongest[number].numpy() - expected_strongest).max() < 1e-3
    normalized = macenko_normalize(as_batch(tiles))
    assert levels(normalized, np.stack([macenko_of(tile) for tile in tiles])).max() <= 1
    assert levels(normalized, tiles).mean() > 2


def test_macenko_finds_the_stains_that_were_used():
    """A tile mixed from two known vectors."""
    amounts = np.random.default_rng(0).exponential(0.6, (64 * 64, 2)) * np.random.default_rng(1).integers(
        0, 2, (4096, 2)
    )
    rgb = rgb_of_macenko(amounts).reshape(1, 64, 64, 3)
    vectors, _, is_estimable = estimate_stains(as_batch(rgb, torch.float64))
    assert is_estimable.all()
    assert (np.abs((vectors[0].numpy() * REFERENCE_VECTORS).sum(0)) > 0.995).all()


def test_reinhard_is_its_definition(tiles):
    mean, deviation = lab_statistics(as_batch(tiles))
    for number, tile in enumerate(tiles):
        lab = lab_of(tile).reshape(-1, 3)
        assert np.abs(mean[number].numpy() - lab.mean(0)).max() < 1e-4
        assert np.abs(deviation[number].numpy() - lab.std(0)).max() < 1e-4
    normalized = reinhard_normalize(as_batch(tiles))
    assert levels(normalized, np.stack([reinhard_of(tile) for tile in tiles])).max() <= 1


def test_normalized_tiles_have_the_statistics_of_the_reference(tiles):
    """Where nothing was clipped."""
    reference = ((8.9, 0.01, 0.03), (0.2, 0.02, 0.01))
    mean, deviation = lab_statistics(reinhard_normalize(as_batch(tiles), reference))
    assert np.abs(mean.numpy() - reference[0]).max() < 1e-2
    assert np.abs(deviation.numpy() - reference[1]).max() < 1e-2


def test_a_tile_is_its_own_reference(tiles):
    image = as_batch(tiles[:1])
    vectors, strongest, _ = estimate_stains(image)
    kept = macenko_normalize(image, (vectors[0], strongest[0]))
    lit = tiles[:1].max(-1) < 240 / 255  # lighter pixels are cut to the background
    assert levels(kept, tiles[:1])[lit].mean() < 4  # what lies off the plane of both stains is lost
    assert levels(reinhard_normalize(image, lab_statistics(image)), tiles[:1]).max() <= 1


def rgb_of_macenko(amounts: np.ndarray) -> np.ndarray:
    """(..., 2) amounts of the two reference stains."""
    return (240 * np.exp(-amounts @ REFERENCE_VECTORS.T) - 1) / 255


def odd_tiles() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    haematoxylin, eosin = rgb_of_macenko(np.eye(2))
    few = np.tile(rgb_of_macenko(np.full(2, 0.05)), (32, 32, 1))  # 0.5 % tissue on a stained background
    few[0, :5], few[0, 1:4:2] = haematoxylin, eosin
    weak = np.ones((32, 32, 3))  # 1.5 % tissue, half of it of one stain
    weak[0, :15], weak[0, :15:2] = haematoxylin, eosin
    grey = rng.uniform(0.2, 0.9, (32, 32, 1)).repeat(3, -1)
    return {
        "white": np.ones((32, 32, 3)),
        "black": np.zeros((32, 32, 3)),
        "constant": np.full((32, 32, 3), [0.7, 0.4, 0.6]),
        "nearly no tissue": few,
        "stains that nearly do not occur": weak,
        "grey": grey,
    }


@pytest.mark.parametrize("name", odd_tiles())
def test_macenko_leaves_tiles_without_stains_alone(name):
    image = as_batch(odd_tiles()[name][None])
    assert torch.equal(macenko_normalize(image), image)


@pytest.mark.parametrize("name", [name for name in odd_tiles() if name != "stains that nearly do not occur"])
def test_reinhard_leaves_tiles_without_colours_alone(name):
    image = as_batch(odd_tiles()[name][None])
    assert torch.equal(reinhard_normalize(image), image)


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1), (1, 1, -1), (1, -1, -1)])
def test_an_eigenvector_may_have_either_sign(signs, monkeypatch):
    """Two stains of the same strength: their difference is the direction of most variance, and crosses zero."""
    amounts = np.random.default_rng(0).uniform(0, 0.05, (32, 32, 2))
    share = np.repeat([1, 0.5, 0], [12, 8, 12])[:, None]  # 12 lines of one stain, 8 of both, 12 of the other
    amounts += np.stack([share, 1 - share], -1)
    image = as_batch(rgb_of_macenko(amounts)[None], torch.float64)
    whole = torch.linalg.eigh

    def signed(matrix):
        values, vectors = whole(matrix)
        return torch.return_types.linalg_eigh((values, vectors * torch.tensor(signs, dtype=vectors.dtype)))

    monkeypatch.setattr(torch.linalg, "eigh", signed)
    vectors, _, is_estimable = estimate_stains(image)
    assert is_estimable.all() and (np.abs((vectors[0].numpy() * REFERENCE_VECTORS).sum(0)) > 0.99).all()


@NORMALIZERS
@pytest.mark.parametrize("colours", [[[0, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 1]]])
def test_other_images_stay_finite_and_in_range(normalize, colours):
    rng = np.random.default_rng(0)
    pixels = np.array(colours, float)[rng.integers(0, 2, (32, 32))]
    for image in (pixels, np.clip(pixels + rng.normal(0, 0.05, pixels.shape), 0, 1), rng.uniform(0, 1, (32, 32, 3))):
        normalized = normalize(as_batch(image[None]))
        assert normalized.isfinite().all() and normalized.min() >= 0 and normalized.max() <= 1


@NORMALIZERS
def test_a_row_depends_on_itself_alone(normalize, tiles):
    image = torch.cat(
        [as_batch(tiles), *(as_batch(tile[None].repeat(3, 1).repeat(3, 2)) for tile in odd_tiles().values())]
    )
    together = normalize(image)
    for number in range(len(image)):
        assert torch.equal(normalize(image[number : number + 1])[0], together[number])


@NORMALIZERS
def test_real_tiles(normalize, shared_data):
    files = [path.read_bytes() for path in sorted((shared_data / "quilt_like" / "images").iterdir())]
    tiles = np.stack([decode_image(data) for data in files if jpeg_size(data) == (512, 512)][::40])[:, ::4, ::4] / 255
    define = {macenko_normalize: macenko_of, reinhard_normalize: reinhard_of}[normalize]
    differing = levels(normalize(as_batch(tiles)), np.stack([define(tile) for tile in tiles]))
    assert differing.max() <= 1
