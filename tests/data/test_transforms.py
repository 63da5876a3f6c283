from __future__ import annotations

import io
import math
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from quiltnet.data.decoding import BrokenSample, decode_image, jpeg_size
from quiltnet.data.synthetic import draw_pairs
from quiltnet.data.transforms import TrainTransform, draw_crop
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode


class TorchDraws:
    """Stands in for numpy's generator, and draws as torchvision does: from torch's global one."""

    def random(self) -> float:
        return torch.empty(1).uniform_(0, 1).item()

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


def test_crop_draws_what_uniform_draws():
    ours, numpys = np.random.default_rng(3), np.random.default_rng(3)
    box = draw_crop(300, 300, (0.3, 0.31), (0.9, 1.1), ours)
    area = 300 * 300 * numpys.uniform(0.3, 0.31)
    aspect = math.exp(numpys.uniform(math.log(0.9), math.log(1.1)))
    assert box[2:] == (round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect)))
    assert box[:2] == (numpys.integers(0, 301 - box[2]), numpys.integers(0, 301 - box[3]))


def differences(data: bytes, seed: int, **options: object) -> torch.Tensor:
    """|exact - pil| of the same crop, in levels."""
    exact, pil = (
        TrainTransform(**options, decode=decode)(data, np.random.default_rng(seed)).int() for decode in ("exact", "pil")
    )
    return (exact - pil).abs()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("image_size", [64, 224, (96, 128), (64, 300)])
def test_exact_differs_from_pil_by_rounding_only(interpolation, format, image_size):
    levels = []
    for seed in range(10):
        data = encode(draw_image(seed, 200 + 13 * seed, 190), format)
        options = {"image_size": image_size, "interpolation": interpolation, "scale": (0.3, 1.0)}
        levels.append(differences(data, seed, **options).flatten())
    levels = torch.cat(levels)
    assert levels.max() <= (1 if interpolation == "bilinear" else 2)
    assert levels.float().mean() < 0.15
    assert (levels > 1).float().mean() < 1e-4


@pytest.mark.parametrize("size", [(300, 240), (240, 300), (250, 230), (226, 224), (224, 400), (224, 224)])
def test_passes_run_in_the_order_of_pillow(size):
    """Noise, where the other order is many levels off; (height, width) -> (224, 224)."""
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (*size, 3))
    data = encode(Image.fromarray(noise), "PNG")
    levels = differences(data, 0, image_size=224, scale=(1.0, 1.0), ratio=(size[1] / size[0], size[1] / size[0]))
    assert levels.max() <= 2 and (levels > 1).float().mean() < 5e-5


def tiles_of_512(shared_data: Path, every: int) -> list[bytes]:
    files = [path.read_bytes() for path in sorted((shared_data / "quilt_like" / "images").iterdir())]
    return [data for data in files if jpeg_size(data) == (512, 512)][::every]


@pytest.mark.parametrize("image_size", [224, 384])
def test_exact_differs_from_pil_by_rounding_only_on_real_tiles(shared_data, image_size):
    tiles = tiles_of_512(shared_data, every=6)
    levels = torch.stack([differences(data, n, image_size=image_size) for n, data in enumerate(tiles)])
    assert levels.max() <= 2
    assert levels.float().mean() < 0.01
    assert (levels > 1).float().mean() < (2e-7 if image_size == 224 else 1e-5)  # of 224, none or one


def scaled_and_exact(data: bytes, seed: int, **options: object) -> list[torch.Tensor]:
    """Half-size decoding and the whole of it, of the same crop on even pixels."""
    scaled = TrainTransform(**options, decode="scaled")
    tile = scaled(data, np.random.default_rng(seed))
    exact = TrainTransform(**options)
    exact.draw = scaled.draw
    return [tile, exact(data, np.random.default_rng(seed))]


def psnr(tile: torch.Tensor, other: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / (tile.double() - other.double()).square().mean().item())


def test_scaled_differs_by_the_stated_error(shared_data):
    """Fine texture is more than half the pixels can hold; docs/augmentation.md has the numbers."""
    tiles = tiles_of_512(shared_data, every=6)
    pairs = [scaled_and_exact(data, number, image_size=224) for number, data in enumerate(tiles)]
    assert not any(torch.equal(*pair) for pair in pairs)
    assert psnr(torch.stack([scaled for scaled, _ in pairs]), torch.stack([exact for _, exact in pairs])) >= 36


def test_scaled_is_within_42_db_on_drawn_tiles():
    pairs = [scaled_and_exact(pair.jpeg(), 0, image_size=224) for pair in draw_pairs(3, 512)]
    assert psnr(torch.stack([scaled for scaled, _ in pairs]), torch.stack([exact for _, exact in pairs])) >= 42


def test_scaled_crops_on_even_pixels():
    scaled, exact = TrainTransform(32, decode="scaled"), TrainTransform(32)
    for seed in range(50):
        even, box = (t.draw(301, 203, np.random.default_rng(seed)).box for t in (scaled, exact))
        assert not any(number % 2 for number in even)
        assert all(0 <= number - half <= 1 for number, half in zip(box, even, strict=True))


@pytest.mark.parametrize("width", [100, 101])
def test_scaled_shows_the_same_place(width):
    """A smooth image, which half the size holds as well as the whole."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, 99)[:, None, None]
    data = encode(Image.fromarray(np.broadcast_to(ramp, (99, width, 3)).astype(np.uint8)), quality=98)
    for seed in range(10):
        scaled, exact = scaled_and_exact(data, seed, image_size=40)
        assert (scaled.int() - exact).abs().max() <= 6 and not torch.equal(scaled, exact)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (encode(draw_image(0, 70, 200)), "half of it is narrower than the tile"),
        (encode(draw_image(0, 200, 70)), "half of it is lower than the tile"),
        (encode(draw_image(0, 200, 200), "PNG"), "no JPEG"),
        (encode(draw_image(0, 200, 200).convert("CMYK")), "CMYK is left to Pillow"),
    ],
)
def test_scaled_falls_back_to_the_whole_image(data, why):
    scaled, exact = scaled_and_exact(data, 0, image_size=40)
    assert torch.equal(scaled, exact), why


def test_stored_pixels_give_the_tile_of_their_png():
    image = draw_image(0, 60, 56)
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(image))
    for options in ({}, {"scale": (1.0, 1.0), "ratio": (60 / 56, 60 / 56)}, {"decode": "pil"}):
        transform = TrainTransform(32, **options)
        tiles = [transform(data, np.random.default_rng(1)) for data in (buffer.getvalue(), encode(image, "PNG"))]
        assert torch.equal(*tiles)


@pytest.mark.parametrize("decode", ["exact", "scaled", "pil", "cuda"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("turns", [False, True])
def test_into_a_row_of_a_batch(decode, layout, turns):
    transform = TrainTransform((24, 20), decode=decode, horizontal_flip=turns, right_angle_rotations=turns)
    for data in (
        encode(draw_image(0, 90, 80)),
        encode(draw_image(1, 20, 24), "PNG"),
        encode(draw_image(1, 1, 1), "PNG"),
    ):
        batch = torch.full((3, 3, 24, 20), 7, dtype=torch.uint8).to(memory_format=layout)
        transform.into(data, np.random.default_rng(4), batch[1])
        assert torch.equal(batch[1], transform(data, np.random.default_rng(4)))
        assert (batch[[0, 2]] == 7).all()


def test_into_writes_where_it_is_told_without_a_copy():
    """A channels_last row goes to torch's kernel as it is: nothing else may have been allocated for the result."""
    transform = TrainTransform(24)
    batch = torch.empty((2, 3, 24, 24), dtype=torch.uint8).to(memory_format=torch.channels_last)
    written = transform._resize(decode_image(encode(draw_image(0, 90, 80))), (0, 0, 50, 60), batch[1])
    assert written.data_ptr() == batch[1].data_ptr()


@pytest.mark.parametrize("decode", ["exact", "pil"])
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


@pytest.mark.parametrize("decode", ["exact", "pil"])
@pytest.mark.parametrize("image_size", [48, (48, 40)])
def test_right_angle_rotations(decode, image_size):
    size = (48, 48) if image_size == 48 else (48, 40)
    data = encode(draw_image(0, size[1], size[0]), "PNG")
    ratio = size[1] / size[0]
    turning = TrainTransform(
        image_size, scale=(1.0, 1.0), ratio=(ratio, ratio), right_angle_rotations=True, decode=decode
    )
    upright = torch.from_numpy(np.array(draw_image(0, size[1], size[0]))).permute(2, 0, 1)
    turns = [0, 1, 2, 3] if image_size == 48 else [0, 2]
    expected = [torch.rot90(upright, number, (1, 2)).contiguous().numpy().tobytes() for number in turns]
    seen = Counter(turning(data, np.random.default_rng(seed)).numpy().tobytes() for seed in range(400))
    assert set(seen) == set(expected)
    assert min(seen.values()) > 0.7 * 400 / len(turns)


def test_what_is_off_draws_nothing():
    """The state of the generator after a call, by the draws of the docstring."""
    data = encode(draw_image(0, 50, 50))
    cases = [({}, 0, 0), ({"horizontal_flip": True}, 1, 0), ({"horizontal_flip": True, "vertical_flip": True}, 2, 0)]
    cases.append(({"vertical_flip": True, "right_angle_rotations": True}, 1, 1))
    for options, flips, turns in cases:
        ours, expected = np.random.default_rng(5), np.random.default_rng(5)
        TrainTransform(32, **options)(data, ours)
        draw_crop(50, 50, (0.9, 1.0), (3 / 4, 4 / 3), expected)
        expected.random(flips)
        if turns:
            expected.integers(4)
        assert ours.bit_generator.state == expected.bit_generator.state


@pytest.mark.parametrize("decode", ["exact", "scaled", "pil"])
def test_exif_is_applied_on_request(decode):
    image = draw_image(0, 120, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, quality=95, exif=exif)
    turned = encode(image.transpose(Image.Transpose.ROTATE_270), "PNG")
    plain = {"image_size": (60, 40), "scale": (1.0, 1.0), "ratio": (2 / 3, 2 / 3), "decode": decode}
    rng = np.random.default_rng
    applied = TrainTransform(**plain, exif="apply")(data, rng(0)).float()
    assert (applied - TrainTransform(**plain)(turned, rng(0))).abs().mean() < 4
    assert (applied - TrainTransform(**plain)(data, rng(0))).abs().mean() > 20


def test_plan_hands_a_jpeg_over_as_it_is():
    transform = TrainTransform(32, decode="cuda", horizontal_flip=True)
    data = encode(draw_image(0, 90, 80))
    planned = transform.plan(data, np.random.default_rng(3))
    assert planned.data.numpy().tobytes() == data
    assert planned.framing == transform.draw(80, 90, np.random.default_rng(3))


@pytest.mark.parametrize(
    "data",
    [
        encode(draw_image(0, 90, 80), "PNG"),
        encode(draw_image(0, 90, 80).convert("CMYK")),
        encode(draw_image(0, 90, 80), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    ],
    ids=["PNG", "CMYK", "turned by its EXIF"],
)
def test_plan_decodes_what_the_device_does_not(data):
    transform = TrainTransform(32, decode="cuda", exif="apply")
    planned = transform.plan(data, np.random.default_rng(3))
    assert torch.equal(planned, transform(data, np.random.default_rng(3)))


@pytest.mark.parametrize("decode", ["exact", "scaled", "pil", "cuda"])
def test_a_transform_crosses_process_borders(decode):
    transform = TrainTransform(32, decode=decode)
    data = encode(draw_image(0, 90, 80))
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(data, np.random.default_rng(1)), transform(data, np.random.default_rng(1)))


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


@pytest.mark.parametrize("decode", ["exact", "scaled", "pil", "cuda"])
def test_broken_bytes(decode):
    transform = TrainTransform(32, decode=decode)
    cut = encode(draw_image(0, 200, 180))[:-500]
    for data, reason in ((b"text", "not_an_image"), (b"", "empty_image"), (cut, "broken_image")):
        with pytest.raises(BrokenSample, match=reason):
            transform(data, np.random.default_rng(0))


@pytest.mark.parametrize(
    "option",
    [
        {"interpolation": "nearest"},
        {"decode": "gpu"},
        {"decode": "fast"},
        {"exif": "rotate"},
        {"scale": (1.0, 0.9)},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
    ],
)
def test_options_are_checked(option):
    with pytest.raises(UserError, match=next(iter(option))):
        TrainTransform(32, **option)
