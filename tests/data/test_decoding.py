from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from quiltnet.data import decoding
from quiltnet.data.decoding import (
    BrokenSample,
    decode_half,
    decode_image,
    decode_pil,
    find_defect,
    jpeg_size,
    read_orientation,
)
from tests.data.conftest import draw_image, encode

DECODERS = pytest.mark.parametrize("decode", [decode_image, decode_pil])


def png(width: int, height: int, lines: bytes = b"", *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of these scan lines; of none, one that says its size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(lines), b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def webp_header(width: int, height: int) -> bytes:
    """An extended WebP that says its size and has one empty frame."""
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    lossless = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(3)
    body += b"VP8L" + struct.pack("<I", len(lossless)) + lossless
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_header(width: int, height: int) -> bytes:
    """An uncompressed grey TIFF that says its size and has no pixels."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, height), (279, 4, width * height)]
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + bytes(4)


def npy(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize("sampling", [0x11, 0x12, 0x14, 0x21, 0x22, 0x41, 0x13, 0x42])
def test_every_way_of_subsampling_is_pillows(sampling):
    """4:4:1 (0x14) has no name in simplejpeg, which raises a KeyError; others libjpeg-turbo's interface refuses."""
    data = bytearray(encode(draw_image(1, 64, 64), subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = sampling  # of luma; the pixels become other ones, for both decoders
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode_image(bytes(data)).astype(int) - expected).max() <= 2


MODES = {
    "JPEG": ["RGB", "L", "1", "CMYK"],
    "PNG": ["RGB", "L", "1", "P", "RGBA", "LA"],
    "TIFF": ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"],
    "WEBP": ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"],
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_any_mode_becomes_what_pillow_makes_of_it(format, mode):
    data = encode(draw_image(2).convert(mode), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decode_pil(data)), expected)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range_in_training(format):
    grey = np.linspace(0, 65535, 20 * 30).astype(np.uint16).reshape(20, 30)
    data = encode(Image.fromarray(grey), format)
    assert np.array_equal(decode_image(data), np.rint(grey / 257)[..., None].astype(np.uint8).repeat(3, axis=2))
    clipped = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # what open_clip makes of it
    assert np.array_equal(np.asarray(decode_pil(data)), clipped)
    assert (clipped == 255).mean() > 0.9


def test_sixteen_bit_colour_is_pillows():
    values = np.linspace(0, 65535, 8 * 6 * 3).astype(">u2").reshape(8, 6, 3)
    data = png(6, 8, b"".join(b"\0" + line.tobytes() for line in values), depth=16)
    assert np.array_equal(decode_image(data), np.asarray(decode_pil(data)))
    assert np.abs(decode_image(data) - values / 257).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused_in_training(dtype):
    data = encode(Image.fromarray(np.arange(12, dtype=dtype).reshape(3, 4)), "TIFF")
    assert find_defect(data) == "unknown_pixel_range"
    assert decode_pil(data).size == (4, 3)


def turned_file(orientation: int, format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(draw_image(0, 40, 32), format, exif=exif)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_or_applied(orientation, format):
    data = turned_file(orientation, format)
    assert read_orientation(data) == orientation
    assert decode_image(data).shape == (32, 40, 3)
    assert decode_pil(data).size == (40, 32)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decode_image(data, apply_exif=True).astype(int) - upright).max() <= 1
    assert np.array_equal(np.asarray(decode_pil(data, apply_exif=True)), upright)


@pytest.mark.parametrize("stated", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_upright(stated):
    assert read_orientation(turned_file(stated, "JPEG")) == 1


def test_damaged_exif_does_not_lose_the_image():
    data = turned_file(6, "JPEG").replace(b"MM\0*", b"MM??").replace(b"II*\0", b"II??")
    assert decode_image(data, apply_exif=True).shape == (32, 40, 3)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several_frames_is_taken(format):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    data = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **{"lossless": True} if format == "WEBP" else {}
    )
    for pixels in (decode_image(data), np.asarray(decode_pil(data))):
        assert pixels.shape == (10, 20, 3) and (pixels == [255, 0, 0]).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_one_pixel_is_an_image(format):
    data = encode(Image.new("RGB", (1, 1), (200, 200, 200)), format)
    assert decode_image(data).shape == (1, 1, 3) and find_defect(data) is None


@DECODERS
@pytest.mark.parametrize("junk", [b"\0" * 100, b"<html>", b"\xff\xd8\xff\xe0", b"\xff\xd9" * 3])
def test_junk_after_the_end_is_ignored(decode, junk):
    whole = encode(draw_image(3, 200, 150))
    assert np.array_equal(np.asarray(decode(whole + junk)), np.asarray(decode(whole)))


@pytest.mark.parametrize("size", [(64, 64), (61, 83), (1, 7), (16, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_half_size_is_the_mean_of_four_pixels(size, mode):
    data = encode(draw_image(1, *size).convert(mode), quality=95)
    height, width = jpeg_size(data)
    assert (width, height) == size
    half = decode_half(data, height, width)
    assert half.shape == ((height + 1) // 2, (width + 1) // 2, 3)
    whole = decode_image(data)[: height // 2 * 2, : width // 2 * 2].astype(float)
    mean = whole.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    assert np.abs(half[: height // 2, : width // 2] - mean).mean() < 6 if mean.size else True


def test_what_is_left_to_pillow_has_no_fast_size():
    cmyk = encode(draw_image(0).convert("CMYK"))
    for data in (
        cmyk,
        encode(draw_image(0), "PNG"),
        b"",
        b"\xff\xd8\xff",
        claim_size(encode(draw_image(0)), 30_000, 30_000),
    ):
        assert jpeg_size(data) is None
    truncated = encode(draw_image(0, 90, 80))[:-200]
    assert decode_half(truncated, 80, 90) is None


def test_stored_pixels_are_not_copied():
    pixels = np.asarray(draw_image(4))
    data = npy(pixels)
    decoded = decode_image(data)
    assert np.array_equal(decoded, pixels) and not decoded.flags.writeable
    assert np.shares_memory(decoded, np.frombuffer(data, np.uint8))
    assert np.array_equal(np.asarray(decode_pil(data)), pixels)
    assert np.array_equal(decode_image(data, apply_exif=True), pixels)
    assert find_defect(data) is None


PIXELS = np.zeros((4, 5, 3), np.uint8)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@DECODERS
@pytest.mark.parametrize(
    "data",
    [
        npy(PIXELS.astype(np.uint16)),
        npy(PIXELS.astype(np.int8)),
        npy(PIXELS.astype(np.float32)),
        npy(PIXELS[..., :2]),
        npy(PIXELS[0]),
        npy(PIXELS[None]),
        npy(PIXELS[:0]),
        npy(np.asfortranarray(PIXELS)),
        npy(PIXELS, version=(2, 0)),
        npy(np.array([Bomb()], dtype=object)),
        npy(PIXELS)[:-1],
        npy(PIXELS) + b"0",
        npy(PIXELS)[:20],
        b"\x93NUMPY",
        npy(PIXELS).replace(b"(4, 5, 3)", b"(4,-5, 3)"),
        npy(PIXELS).replace(b"'shape'", b"'shale'"),
        npy(PIXELS).replace(b"{'descr'", b"__import"),
    ],
)
def test_stored_pixels_of_another_kind_are_refused(decode, data):
    with pytest.raises(BrokenSample, match="broken_image"):
        decode(data)


@DECODERS
def test_stored_pixels_have_a_bound_too(decode, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 19)
    with pytest.raises(BrokenSample, match="too_many_pixels"):
        decode(npy(PIXELS))


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
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (png(20_000, 20_000), "too_many_pixels"),
        (webp_header(16_000, 16_000), "too_many_pixels"),
        (tiff_header(20_000, 20_000), "too_many_pixels"),
        (claim_size(encode(draw_image(0)), 20_000, 20_000), "too_many_pixels"),
        (png(10_000, 9_000), "too_many_pixels"),
        (claim_size(encode(draw_image(0)), 60_000, 60_000), "too_many_pixels"),
        (png(20, 20), "broken_image"),
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
