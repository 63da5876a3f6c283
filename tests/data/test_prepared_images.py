from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from quiltnet.data.prepared_images import PreparedForm, summarise_error
from quiltnet.errors import UserError
from tests.data.made_sets import encoded, tissue
from tests.data.test_preparing import decoded, large


@pytest.mark.parametrize(("width", "height"), [(200, 120), (120, 200), (121, 97), (65, 64), (64, 900)])
def test_the_shorter_side_and_the_aspect(width, height):
    image = PreparedForm(64, None).prepare(encoded(tissue(0, width, height)))
    expected = tuple(round(side * 64 / min(width, height)) for side in (height, width))
    assert image.size == decoded(image.data).shape[:2] == expected and min(image.size) == 64


def test_what_is_small_enough_is_not_touched():
    small, png, grey = tissue(0, 60, 90), tissue(1, 60, 90), tissue(2, 60, 90).convert("L")
    form = PreparedForm(64)
    data = encoded(small, quality=40)
    assert form.prepare(data).data is data and form.prepare(data).is_lossless
    assert form.prepare(encoded(grey)).data == encoded(grey)
    assert form.prepare(encoded(png, "PNG")).size == (90, 60)  # encoded anew, not enlarged
    stored = PreparedForm(64, None).prepare(data)
    assert stored.is_lossless and (decoded(stored.data) == decoded(data)).all()


def test_jpegs_keep_their_colours():
    """4:4:4 at the quality that was asked for."""
    image = PreparedForm(64, 90).prepare(large(3))
    with Image.open(io.BytesIO(image.data)) as opened:
        assert opened.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]
        tables = opened.quantization
    with Image.open(io.BytesIO(encoded(tissue(0), quality=90, subsampling=0))) as reference:
        assert tables == reference.quantization


def test_exif_is_applied_when_asked():
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(tissue(0, 60, 90), exif=turned)
    assert PreparedForm(64).prepare(data).data is data
    upright = PreparedForm(64, 100, apply_exif=True).prepare(data)
    assert upright.size == (60, 90)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB").transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(decoded(upright.data).astype(int) - expected).mean() < 1
    assert PreparedForm(64, 100, apply_exif=True).error_levels(data, upright.data)[10:].sum() == 0


def test_summary_of_errors():
    levels = np.zeros(256, np.int64)
    levels[[0, 1, 4]] = 97, 2, 1
    expected = {"mean_abs": 0.06, "p99": 1, "max": 4, "psnr_db": round(10 * np.log10(255**2 / 0.18), 2), "samples": 7}
    assert summarise_error(levels, 7) == expected
    assert summarise_error(np.zeros(256, np.int64), 0)["mean_abs"] is None
    levels[[1, 4]] = 0
    assert summarise_error(levels, 7)["psnr_db"] is None  # all equal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 31}, "--size 31 is the shorter side in pixels; give 32 at least"),
        ({"quality": 0}, "--jpeg 0 is a JPEG quality, between 1 and 100"),
        ({"quality": 101}, "--jpeg 101 is a JPEG quality"),
    ],
)
def test_bad_forms(options, message):
    with pytest.raises(UserError, match=message):
        PreparedForm(**options)
