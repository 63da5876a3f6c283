from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2 import functional as F

from quiltnet.data.augmentation import DeviceAugment, jitter_color
from quiltnet.data.stain import macenko_normalize, reinhard_normalize
from quiltnet.errors import UserError
from tests.data.conftest import draw_image
from tests.data.test_stain import as_batch, hed_of, rgb_of

NEUTRAL = (1.0, 1.0, 1.0, 0.0)
ALL_ON = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "hed_jitter": 0.05}


def hue_turned(rgb: np.ndarray, turns: float) -> np.ndarray:
    """By the textbook's six sectors, a pixel at a time."""
    turned = np.empty_like(rgb)
    for place in np.ndindex(rgb.shape[:2]):
        red, green, blue = rgb[place]
        largest, spread = max(rgb[place]), max(rgb[place]) - min(rgb[place])
        if spread == 0:
            turned[place] = rgb[place]
            continue
        if largest == red:
            hue = (green - blue) / spread % 6
        elif largest == green:
            hue = (blue - red) / spread + 2
        else:
            hue = (red - green) / spread + 4
        hue = (hue + 6 * turns) % 6
        second = spread * (1 - abs(hue % 2 - 1))
        sectors = [(spread, second, 0), (second, spread, 0), (0, spread, second), (0, second, spread)]
        sectors += [(second, 0, spread), (spread, 0, second)]
        turned[place] = np.array(sectors[int(hue)]) + largest - spread
    return turned


def jittered(rgb: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """The definition: (H, W, 3) float64."""
    weights = np.array([0.2989, 0.587, 0.114])
    rgb = np.clip(rgb * brightness, 0, 1)
    rgb = np.clip(contrast * rgb + (1 - contrast) * (rgb @ weights).mean(), 0, 1)
    rgb = np.clip(saturation * rgb + (1 - saturation) * (rgb @ weights)[..., None], 0, 1)
    return hue_turned(rgb, hue)


def images(count: int = 5, size: int = 24) -> torch.Tensor:
    """(B, 3, size, size) uint8: smooth colours, then noise, black, white."""
    drawn = [np.asarray(draw_image(seed, size, size)) for seed in range(count)]
    drawn.append(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    drawn += [np.zeros((size, size, 3), np.uint8), np.full((size, size, 3), 255, np.uint8)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def draws_for(augment: DeviceAugment, count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([augment.draw(np.random.default_rng(seed)) for seed in range(count)]))


def test_everything_is_off_by_default():
    augment, batch = DeviceAugment(), images()
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert augment.draws == 0 and augment.draw(rng).shape == (0,)
    assert rng.bit_generator.state == before
    assert augment(batch, torch.empty(len(batch), 0)) is batch


@pytest.mark.parametrize(
    ("options", "draws"), [({"color_jitter": (0, 0, 0, 0.1)}, 4), ({"hed_jitter": 0.1}, 6), (ALL_ON, 10)]
)
def test_number_of_draws(options, draws):
    augment = DeviceAugment(**options)
    drawn = augment.draw(np.random.default_rng(0))
    assert augment.draws == draws and drawn.shape == (draws,) and drawn.dtype == np.float32


@pytest.mark.parametrize("factors", [(1.3, 1, 1, 0), (1, 0.6, 1, 0), (1, 1, 1.4, 0), (1, 1, 1, 0.1), (1, 1, 1, -0.5)])
def test_one_colour_at_a_time_is_torchvisions(factors):
    batch = images().float() / 255
    adjusts = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    expected = batch
    for adjust, factor, neutral in zip(adjusts, factors, NEUTRAL, strict=True):
        if factor != neutral:
            expected = torch.stack([adjust(image, factor) for image in expected])
    ours = jitter_color(batch, torch.tensor([factors] * len(batch)))
    assert ((ours - expected) * 255).abs().max() < 0.01


def test_the_whole_is_its_definition():
    augment, batch = DeviceAugment(**ALL_ON), images()
    draws = draws_for(augment, len(batch))
    result = augment(batch, draws)
    assert result.dtype == torch.uint8 and result.shape == batch.shape
    for image, drawn, ours in zip(batch, draws.double().numpy(), result, strict=True):
        rgb = image.permute(1, 2, 0).double().numpy() / 255
        rgb = jittered(rgb, *drawn[:4])
        rgb = rgb_of(drawn[4:7] * hed_of(rgb) + drawn[7:])
        assert np.abs(ours.permute(1, 2, 0).numpy() - np.rint(rgb * 255)).max() <= 1


@pytest.mark.parametrize("name", ["macenko", "reinhard"])
def test_stains_are_normalized_first(name):
    batch = torch.from_numpy(np.stack([np.asarray(draw_image(seed, 40, 40)) for seed in range(3)])).permute(0, 3, 1, 2)
    normalize = {"macenko": macenko_normalize, "reinhard": reinhard_normalize}[name]
    alone = DeviceAugment(stain_normalization=name)
    assert alone.draws == 0
    normalized = alone(batch, torch.empty(3, 0))
    assert torch.equal(normalized, (normalize(batch.float() / 255) * 255).round().to(torch.uint8))
    both = DeviceAugment(stain_normalization=name, **ALL_ON)
    draws = draws_for(both, 3)
    apart = DeviceAugment(**ALL_ON)(normalized, draws).int()
    assert (both(batch, draws) - apart).abs().max() <= 6  # rounded once instead of twice, then stretched
    assert (both(batch, draws) - apart).abs().float().mean() < 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normalization", [None, "macenko", "reinhard"])
def test_a_row_depends_on_itself_and_its_draws_alone(layout, normalization, monkeypatch):
    augment = DeviceAugment(stain_normalization=normalization, **ALL_ON)
    batch = images(size=32).to(memory_format=layout)
    draws = draws_for(augment, len(batch))
    together = augment(batch, draws)
    for number in range(len(batch)):
        alone = augment(batch[number : number + 1], draws[number : number + 1])
        assert torch.equal(alone[0], together[number])
    monkeypatch.setattr("quiltnet.data.augmentation.CPU_CHUNK_SIZE", 3)
    assert torch.equal(augment(batch, draws), together)


def test_the_sum_over_an_image_does_not_depend_on_the_batch():
    """With two threads torch sums one image in another order than several."""
    image = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[1, 0.5, 1, 0.0]] * 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = jitter_color(image, factors)
        assert all(torch.equal(jitter_color(image[[n]], factors[[n]])[0], together[n]) for n in range(4))
    finally:
        torch.set_num_threads(threads)


def test_a_sample_that_is_left_alone_keeps_its_pixels():
    augment = DeviceAugment(**ALL_ON, color_jitter_probability=0, hed_jitter_probability=0)
    every_value = torch.arange(256, dtype=torch.uint8).repeat(3, 16, 1)
    batch = torch.stack([images(size=256)[0, :, :16], every_value, every_value.roll((3, 70), (1, 2))])
    assert torch.equal(augment(batch, draws_for(augment, 3)), batch)


@pytest.mark.parametrize(("option", "neutral"), [("color_jitter", [1, 1, 1, 0]), ("hed_jitter", [1, 1, 1, 0, 0, 0])])
def test_probability_is_the_share_that_is_jittered(option, neutral):
    augment = DeviceAugment(**{option: ALL_ON[option], f"{option}_probability": 0.3})
    rng = np.random.default_rng(0)
    left_alone = [np.array_equal(augment.draw(rng), np.array(neutral, np.float32)) for _ in range(2000)]
    assert abs(np.mean(left_alone) - 0.7) < 0.04


def test_whether_a_sample_is_jittered_moves_no_other_draw():
    """The generator is in the same place afterwards, so that a probability changes nothing but what it says."""
    states = []
    for probability in (0.0, 0.5, 1.0):
        rng = np.random.default_rng(7)
        DeviceAugment(**ALL_ON, color_jitter_probability=probability, hed_jitter_probability=probability).draw(rng)
        states.append(rng.bit_generator.state)
    assert states[0] == states[1] == states[2]


def test_draws_are_uniform_in_their_ranges():
    augment = DeviceAugment(color_jitter=(0.4, 1.5, 0.2, 0.1), hed_jitter=0.05)
    rng = np.random.default_rng(0)
    drawn = np.stack([augment.draw(rng) for _ in range(4000)])
    theirs = ColorJitter(0.4, 1.5, 0.2, 0.1)
    ranges = [theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue]
    ranges += [(0.95, 1.05)] * 3 + [(-0.05, 0.05)] * 3
    for values, (low, high) in zip(drawn.T, ranges, strict=True):
        assert values.min() >= np.float32(low) and values.max() <= np.float32(high)
        assert np.abs(np.quantile(values, [0.1, 0.5, 0.9]) - (low + (high - low) * np.array([0.1, 0.5, 0.9]))).max() < (
            0.05 * (high - low)
        )


def test_it_crosses_process_borders():
    augment, batch = DeviceAugment(stain_normalization="reinhard", **ALL_ON), images()
    copy = pickle.loads(pickle.dumps(augment))
    draws = draws_for(augment, len(batch))
    assert torch.equal(copy(batch, draws), augment(batch, draws))


def test_draws_come_from_the_given_generator_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    augment, batch = DeviceAugment(**ALL_ON), images()
    draws = draws_for(augment, len(batch))
    assert torch.equal(augment(batch, draws), augment(batch, draws_for(augment, len(batch))))
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize(
    "option",
    [
        {"color_jitter": (0.1, 0.1, 0.1)},
        {"color_jitter": (-0.1, 0, 0, 0)},
        {"color_jitter": (0, 0, 0, 0.6)},
        {"color_jitter": (0, math.nan, 0, 0)},
        {"color_jitter_probability": 1.1},
        {"hed_jitter": -0.1},
        {"hed_jitter": 2},
        {"hed_jitter_probability": -1},
        {"stain_normalization": "vahadane"},
    ],
)
def test_options_are_checked(option):
    with pytest.raises(UserError, match=next(iter(option))):
        DeviceAugment(**option)


def test_on_another_image_shape():
    augment = DeviceAugment(**ALL_ON)
    batch = (as_batch(np.random.default_rng(0).uniform(0, 1, (2, 9, 17, 3))) * 255).to(torch.uint8)
    assert augment(batch, draws_for(augment, 2)).shape == (2, 3, 9, 17)
