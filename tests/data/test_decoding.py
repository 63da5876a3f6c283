from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from quiltnet.data.decoding import BrokenSample, decode_image, decode_pil, find_defect
from tests.data.conftest import draw_image, encode

DECODERS = pytest.mark.parametrize("decode", [decode_image, decode_pil])


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, idat)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def claim_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The same data under a frame header that claims another size."""
    data = bytearray(jpeg)
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [40, 90])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_jpeg_has_the_pixels_of_pillow(subsampling, quality, progressive):
    data = encode(draw_image(1, 83, 61), quality=quality, subsampling=subsampling, progressive=progressive)
    fast, exact = decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert fast.shape == (61, 83, 3) and fast.dtype == np.uint8
    assert np.abs(fast.astype(int) - exact).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_any_mode_becomes_what_pillow_makes_of_it(mode, format):
    image = draw_image(2).convert("L").convert("I").convert("I;16") if mode == "I;16" else draw_image(2).convert(mode)
    try:
        data = encode(image, format)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"{format} has no {mode}")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decode_pil(data)), expected)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(draw_image(0, 40, 32), exif=exif)
    assert decode_image(data).shape == (32, 40, 3)
    assert decode_pil(data).size == (40, 32)


@DECODERS
def test_truncated_jpeg_is_refused(decode):
    data = encode(draw_image(3, 200, 150), quality=95)
    for kept in range(200, len(data) - 2, 97):
        with pytest.raises(BrokenSample) as caught:
            decode(data[:kept])
        assert caught.value.reason in ("broken_image", "not_an_image")
    for cut in (3, 10, 100, len(data) // 2):
        with pytest.raises(BrokenSample, match="broken_image"):
            decode(data[:-cut])


@pytest.mark.parametrize("damage", ["no end marker", "half an end marker", "lines that are not there", "padding"])
def test_decoders_agree_on_what_one_of_them_finds_odd(damage):
    whole = encode(draw_image(3, 200, 150))
    data = {
        "no end marker": whole[:-2],
        "half an end marker": whole[:-1],
        "lines that are not there": claim_size(whole, 200, 170),
        "padding": whole[:-2] + bytes(20) + whole[-2:],
    }[damage]
    outcomes = []
    for decode in (decode_image, decode_pil):
        try:
            outcomes.append(np.asarray(decode(data)).astype(int))
        except BrokenSample as error:
            outcomes.append(error.reason)
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], str):
        assert outcomes == ["broken_image", "broken_image"]
    else:
        assert np.abs(outcomes[0] - outcomes[1]).max() <= 1


@DECODERS
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_other_truncated_files_are_refused(decode, format):
    data = encode(draw_image(3, 200, 150), format)
    with pytest.raises(BrokenSample):
        decode(data[: len(data) // 2])


@DECODERS
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_image"),
        (b"this is a text file called .jpg", "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (png_header(20_000, 20_000), "too_many_pixels"),
        (png_header(10_000, 9_000), "too_many_pixels"),
        (claim_size(encode(draw_image(0)), 60_000, 60_000), "too_many_pixels"),
        (png_header(20, 20), "broken_image"),
    ],
)
def test_reasons(decode, data, reason):
    with pytest.raises(BrokenSample) as caught:
        decode(data)
    assert caught.value.reason == reason == find_defect(data)


def test_broken_sample_crosses_process_borders():
    error = pickle.loads(pickle.dumps(BrokenSample("no_image", "key")))
    assert (error.reason, error.key, str(error)) == ("no_image", "key", "key: no_image")


def test_real_tiles(shared_data):
    for path in sorted((shared_data / "quilt_like" / "images").iterdir())[::60]:
        data = path.read_bytes()
        difference = np.abs(decode_image(data).astype(int) - np.asarray(decode_pil(data)))
        assert difference.max() <= 1, path
