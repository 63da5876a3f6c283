"""``quiltnet explain``: the figure is written, and mistakes end before any model is loaded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from quiltnet.cli.app import app
from quiltnet.errors import UserError
from quiltnet.release.exporting import export_open_clip
from tests.model.towers import tiny_model


@pytest.fixture
def tile(work) -> None:
    """A working directory with one tile and what is no image."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("tile.png")
    (work / "broken.png").write_bytes(b"no image")
    (work / "there.png").write_bytes(b"")


def run(*options: str):
    return CliRunner().invoke(app, ["explain", *options])


def test_two_models_side_by_side(tile, work):
    export_open_clip(tiny_model(), work / "one")
    export_open_clip(tiny_model(), work / "other")
    pair = ("--image", "tile.png", "--text", "fatty tissue")
    done = run(*pair, *pair, "--model", "one", "--compare", "other", "--out", "new/fig.png")
    assert done.exit_code == 0, done.output
    assert done.output.count('tile.png, "fatty tissue": similarity one ') == 2 and ", other " in done.output
    with Image.open(work / "new/fig.png") as figure:
        assert figure.width > 900 and figure.height > 600
    assert [path.name for path in (work / "new").iterdir()] == ["fig.png"]


PAIR = ["--image", "tile.png", "--text", "fat"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*PAIR, "--text", "more", "--out", "a.png"], "1 --image and 2 --text"),
        (["--image", "tile.png", "--text", " ", "--out", "a.png"], "a --text is empty"),
        (["--image", "none.png", "--text", "fat", "--out", "a.png"], "none.png is no file"),
        (["--image", "broken.png", "--text", "fat", "--out", "a.png"], "cannot read --image broken.png"),
        ([*PAIR, "--out", "a.txt"], "let its name end in one of .png"),
        ([*PAIR, "--out", "there.png"], "there.png exists already"),
    ],
    ids=["numbers", "empty", "missing", "broken", "ending", "exists"],
)
def test_mistakes_are_told_before_a_model_is_loaded(tile, options, message):
    done = run(*options, "--model", "no model")
    assert isinstance(done.exception, UserError) and message in str(done.exception)
