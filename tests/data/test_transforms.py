from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from quiltnet.data.decoding import BrokenSample
from quiltnet.data.transforms import TrainTransform, draw_crop
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode


class TorchDraws:
    """Stands in for numpy's generator, and draws as torchvision does: from torch's global one."""

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low: int, high: int) -> int:
        return torch.randint(low, high, (1,)).item()


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 0.2)])
@pytest.mark.parametrize("size", [(224, 224), (512, 300), (37, 900), (900, 37), (3, 5)])
def test_crop_is_torchvisions(scale, size):
    for seed in range(50):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(torch.empty(3, *size), list(scale), [3 / 4, 4 / 3])
        torch.manual_seed(seed)
        assert draw_crop(*size, scale, (3 / 4, 4 / 3), TorchDraws()) == tuple(expected)


@pytest.mark.parametrize("size", [(224, 224), (512, 300), (37, 900), (900, 37), (1, 1)])
def test_crop_stays_inside(size):
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left, height, width = draw_crop(*size, (0.05, 1.0), (3 / 4, 4 / 3), rng)
        assert 0 <= top <= size[0] - height and 0 <= left <= size[1] - width and min(height, width) > 0


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pil_pixels_are_open_clips(mode):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    data = encode(draw_image(0, 300, 260).convert(mode), quality=90)
    theirs = image_transform(96, is_train=True, mean=mean, std=std)
    ours = TrainTransform(96, decode="pil")
    for seed in range(5):
        torch.manual_seed(seed)
        expected = theirs(Image.open(io.BytesIO(data)))
        torch.manual_seed(seed)
        pixels = ours(data, TorchDraws())
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 96, 96)
        normalised = (pixels.float().div(255) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-6)


def differences(data: bytes, seed: int, **options: object) -> torch.Tensor:
    """|fast - pil| of the same crop, in levels."""
    fast, exact = (
        TrainTransform(**options, decode=decode)(data, np.random.default_rng(seed)).int() for decode in ("fast", "pil")
    )
    return (fast - exact).abs()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("image_size", [64, 224, (96, 128)])
def test_fast_differs_from_pil_by_rounding_only(interpolation, format, image_size):
    for seed in range(10):
        data = encode(draw_image(seed, 200 + 13 * seed, 190), format)
        levels = differences(data, seed, image_size=image_size, interpolation=interpolation, scale=(0.3, 1.0))
        assert levels.float().mean() < 0.15
        # Pillow 13 resizes some shapes vertically first, which shows where two hard edges meet.
        assert (levels > 1).float().mean() < 1e-3


def test_fast_differs_from_pil_by_rounding_only_on_real_tiles(shared_data):
    paths = sorted((shared_data / "quilt_like" / "images").iterdir())[::50]
    levels = torch.stack([differences(path.read_bytes(), n, image_size=224) for n, path in enumerate(paths)])
    assert levels.max() <= 2
    assert levels.float().mean() < 0.01
    assert (levels > 1).float().mean() < 1e-5


@pytest.mark.parametrize("decode", ["fast", "pil"])
def test_flips(decode):
    data = encode(draw_image(0, 50, 50), "PNG")
    plain = {"image_size": 50, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "decode": decode}
    image = TrainTransform(**plain)(data, np.random.default_rng(0))
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(draw_image(0, 50, 50))))
    flip_both = TrainTransform(**plain, horizontal_flip=True, vertical_flip=True)
    seen = {flip_both(data, np.random.default_rng(seed)).numpy().tobytes() for seed in range(40)}
    assert seen == {image.flip(dims).contiguous().numpy().tobytes() for dims in ([], [-1], [-2], [-1, -2])}
    only = TrainTransform(**plain, horizontal_flip=True)
    seen = {only(data, np.random.default_rng(seed)).numpy().tobytes() for seed in range(20)}
    assert seen == {image.flip(dims).contiguous().numpy().tobytes() for dims in ([], [-1])}


def test_draws_come_from_the_given_generator_alone():
    transform = TrainTransform(32, horizontal_flip=True)
    data = encode(draw_image(0, 90, 80))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, other = transform(data, np.random.default_rng(1)), transform(data, np.random.default_rng(2))
    assert torch.equal(first, transform(data, np.random.default_rng(1)))
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.parametrize("decode", ["fast", "pil"])
def test_broken_bytes(decode):
    with pytest.raises(BrokenSample, match="not_an_image"):
        TrainTransform(32, decode=decode)(b"text", np.random.default_rng(0))


@pytest.mark.parametrize(
    "option",
    [
        {"interpolation": "nearest"},
        {"decode": "gpu"},
        {"scale": (1.0, 0.9)},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
    ],
)
def test_options_are_checked(option):
    with pytest.raises(UserError, match=next(iter(option))):
        TrainTransform(32, **option)
