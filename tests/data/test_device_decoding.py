from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.data import device_decoding
from quiltnet.data.device_decoding import DeviceDecoder, JoinedTiles, device_decoder_reason, resample_weights
from quiltnet.data.transforms import EncodedTile, TrainTransform
from tests.data.conftest import draw_image, encode

FILES = [
    encode(draw_image(0, 90, 80)),
    encode(draw_image(1, 90, 80), quality=95, subsampling=0),
    encode(draw_image(2, 60, 120)),
    encode(draw_image(3, 120, 60).convert("L")),
    encode(draw_image(4, 90, 80), "PNG"),
    encode(draw_image(5, 90, 80).convert("CMYK")),
    encode(draw_image(6, 30, 20)),
]


def planned(files: list[bytes], **options: object) -> tuple[TrainTransform, list[EncodedTile | torch.Tensor]]:
    transform = TrainTransform(**options, decode="cuda")
    return transform, [transform.plan(data, np.random.default_rng(n)) for n, data in enumerate(files)]


def called(transform: TrainTransform, files: list[bytes]) -> torch.Tensor:
    return torch.stack([transform(data, np.random.default_rng(n)) for n, data in enumerate(files)])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [48, (32, 64), 150])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.2, 0.5)])
def test_pixels_are_those_of_the_exact_path(interpolation, image_size, scale):
    options = {"horizontal_flip": True, "vertical_flip": True, "right_angle_rotations": True}
    transform, tiles = planned(FILES, image_size=image_size, interpolation=interpolation, scale=scale, **options)
    assert sum(isinstance(tile, EncodedTile) for tile in tiles) == len(FILES) - 2
    batch, broken = DeviceDecoder("cpu", image_size, interpolation=interpolation)(tiles)
    expected = called(transform, FILES)
    levels = (batch.int() - expected).abs()
    assert broken == [] and batch.dtype == torch.uint8 and batch.shape == expected.shape
    # Of what is enlarged, the exact path itself is 2 levels off in a few places.
    assert levels.max() <= (2 if image_size == 150 else 1) and (levels > 0).float().mean() < 0.03


@pytest.mark.parametrize("image_size", [64, 150])
def test_pixels_are_pillows(image_size):
    """Resized in float32 and rounded where Pillow rounds: equal but for ties."""
    noise = [np.random.default_rng(n).integers(0, 256, (70 + 20 * n, 100, 3), dtype=np.uint8) for n in range(3)]
    files = [encode(Image.fromarray(pixels), quality=95, subsampling=0) for pixels in noise]
    _, tiles = planned(files, image_size=image_size, scale=(0.5, 1.0))
    batch, _ = DeviceDecoder("cpu", image_size)(tiles)
    expected = called(TrainTransform(image_size, scale=(0.5, 1.0), decode="pil"), files)
    levels = (batch.int() - expected).abs()
    assert levels.max() <= 1 and (levels > 0).float().mean() < 2e-3


def test_the_batch_does_not_depend_on_who_else_is_in_it(monkeypatch):
    _, tiles = planned(FILES, image_size=48)
    together, _ = DeviceDecoder("cpu", 48)(tiles)
    monkeypatch.setattr(device_decoding, "CHUNK_SIZE", 1)
    one_at_a_time, _ = DeviceDecoder("cpu", 48)(tiles)
    assert (together.int() - one_at_a_time).abs().max() <= 1
    assert (together != one_at_a_time).float().mean() < 1e-4


def test_a_broken_file_does_not_lose_the_batch():
    files = [FILES[0], FILES[1][:-400], FILES[2], FILES[4]]
    transform, tiles = planned(files, image_size=48)
    batch, broken = DeviceDecoder("cpu", 48)(tiles)
    assert broken == [1] and not batch[1].any()
    whole = [files[n] for n in (0, 2, 3)]
    expected = torch.stack(
        [transform(data, np.random.default_rng(n)) for n, data in zip((0, 2, 3), whole, strict=True)]
    )
    assert (batch[[0, 2, 3]].int() - expected).abs().max() <= 1


def test_what_the_device_refuses_is_decoded_on_the_cpu(monkeypatch):
    """As nvJPEG raises, for the whole list, on one file of a kind that it lacks."""

    def refuse(files, device):
        raise RuntimeError("nvjpegDecodeBatched failed: 4")

    transform, tiles = planned(FILES, image_size=48)
    monkeypatch.setattr(device_decoding, "_decode_jpegs", refuse)
    batch, broken = DeviceDecoder("cpu", 48)(tiles)
    assert broken == [] and (batch.int() - called(transform, FILES)).abs().max() <= 1


def test_one_file_that_the_device_refuses_does_not_send_the_others_to_the_cpu(monkeypatch):
    _, tiles = planned([FILES[n % 4] for n in range(40)], image_size=48)
    refused, decode, on_cpu = tiles[29].data, device_decoding._decode_jpegs, []

    def refuse(files, device):
        if any(data is refused for data in files):
            raise RuntimeError("nvjpegDecodeBatched failed: 4")
        return decode(files, device)

    decoder = DeviceDecoder("cpu", 48)
    expected, _ = decoder(tiles)
    alone = decoder._decode_alone
    monkeypatch.setattr(device_decoding, "_decode_jpegs", refuse)
    monkeypatch.setattr(decoder, "_decode_alone", lambda data: on_cpu.append(data) or alone(data))
    batch, broken = decoder(tiles)
    assert broken == [] and [data is refused for data in on_cpu] == [True]
    assert torch.equal(batch, expected)


def test_a_box_outside_of_what_was_decoded_is_broken(monkeypatch):
    """A decoder that answers with another size than the header said."""
    _, tiles = planned(FILES[:2], image_size=48)
    whole = device_decoding._decode_jpegs
    monkeypatch.setattr(
        device_decoding, "_decode_jpegs", lambda files, device: [image[:, :40] for image in whole(files, device)]
    )
    batch, broken = DeviceDecoder("cpu", 48)(tiles)
    assert broken == [0, 1] and not batch.any()


def test_of_nothing_and_of_pixels_only():
    decoder = DeviceDecoder("cpu", 8)
    batch, broken = decoder([])
    assert batch.shape == (0, 3, 8, 8) and broken == []
    pixels = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
    batch, broken = decoder([pixels])
    assert torch.equal(batch[0], pixels) and broken == []


@pytest.mark.parametrize(("support", "resampling"), [(2, Image.Resampling.BICUBIC), (1, Image.Resampling.BILINEAR)])
@pytest.mark.parametrize(
    ("start", "length", "out_size"), [(0, 50, 20), (7, 31, 20), (7, 31, 60), (49, 1, 5), (3, 20, 20)]
)
def test_weights_are_pillows(support, resampling, start, length, out_size):
    """By resizing each unit vector, in Pillow's float mode."""
    weights = resample_weights(
        torch.tensor([start], dtype=torch.float64), torch.tensor([length], dtype=torch.float64), 50, out_size, support
    )[0]
    assert weights.shape == (out_size, 50)
    for place in range(50):
        line = np.zeros((1, 50), np.float32)
        line[0, place] = 1
        part = Image.fromarray(line).crop((start, 0, start + length, 1)).resize((out_size, 1), resampling)
        assert np.abs(np.asarray(part)[0] - weights[:, place].numpy()).max() < 1e-5


def test_joined_tiles_come_apart_again():
    _, tiles = planned(FILES, image_size=48)
    joined = JoinedTiles.join(tiles)
    assert joined.data.dtype == torch.uint8 and joined.data.ndim == 1
    for tile, ours in zip(tiles, joined.split(), strict=True):
        assert type(tile) is type(ours)
        if isinstance(tile, EncodedTile):
            assert torch.equal(tile.data, ours.data) and tile.framing == ours.framing
        else:
            assert torch.equal(tile, ours)
    batch, _ = DeviceDecoder("cpu", 48)(joined.split())
    assert torch.equal(batch, DeviceDecoder("cpu", 48)(tiles)[0])


def test_the_reason_is_said_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in device_decoder_reason()


def test_the_reason_is_said_where_torchvision_lacks_nvjpeg(monkeypatch):
    def refuse(files, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_decoding, "_decode_jpegs", refuse)
    assert "not compiled with nvJPEG support)" in device_decoder_reason()
    monkeypatch.setattr(device_decoding, "_decode_jpegs", lambda files, device: files)
    assert device_decoder_reason() is None


@pytest.mark.gpu
def test_on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert device_decoder_reason() is None
    transform, tiles = planned(FILES, image_size=48)
    batch, broken = DeviceDecoder("cuda", 48)(tiles)
    assert broken == [] and batch.device.type == "cuda"
    assert (batch.cpu().int() - called(transform, FILES)).abs().float().mean() < 4
