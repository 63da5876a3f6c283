from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from quiltnet.cli.check import check
from quiltnet.cli.prepare import prepare
from quiltnet.data.manifest import read_manifest
from quiltnet.errors import UserError
from tests.data.made_sets import encoded, pair, read_tar, tissue, write_set

app = typer.Typer()
app.command()(prepare)


@pytest.fixture
def source(tmp_path) -> Path:
    images = [encoded(tissue(0, 300, 200)), encoded(tissue(1, 90, 90)), encoded(tissue(2, 300, 200))[:-60]]
    members = {k: v for n, image in enumerate(images) for k, v in pair(f"t{n}", image, f"Text {n}.").items()}
    return write_set(tmp_path / "source", {"train": [members]})


def run(*arguments: object) -> str:
    """Output of ``quiltnet prepare``; a UserError is raised (the command line prints it)."""
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--workers", 1)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_jpegs(source, tmp_path):
    output = run(source, tmp_path / "out", "--size", 100, "--jpeg", 80)
    assert "1 tars\nestimated size of what is to be written: 0.000 GB" in output
    assert "2 samples, 1 of them copied byte for byte\nrejected rows: 1 broken_image" in output
    assert "error at 224 pixels of 1 images that were resized or encoded anew" in output
    content = read_tar(tmp_path / "out" / "train" / "made-000000.tar")
    with Image.open(io.BytesIO(content["t0.jpg"])) as image:
        assert image.size == (150, 100)
    assert content["t1.jpg"] == encoded(tissue(1, 90, 90)) and "t2.jpg" not in content
    assert read_manifest(tmp_path / "out")["prepared"]["quality"] == 80


def test_pixels(source, tmp_path):
    run(source, tmp_path / "out", "--size", 100, "--raw")
    content = read_tar(tmp_path / "out" / "train" / "made-000000.tar")
    shapes = {key: np.load(io.BytesIO(data), allow_pickle=False).shape for key, data in content.items() if "npy" in key}
    assert shapes == {"t0.npy": (100, 150, 3), "t1.npy": (90, 90, 3)}
    assert read_manifest(tmp_path / "out")["prepared"]["format"] == "raw"


@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_what_is_prepared_passes_the_check(source, tmp_path, options):
    run(source, tmp_path / "out", *options)
    arguments = ["data", str(tmp_path / "out"), "--checksums", "--workers", "1", "--against", str(source)]
    assert CliRunner().invoke(check, [*arguments, "--max-leaks", "-1"]).exit_code == 0
    report = json.loads((tmp_path / "out" / "check" / "report.json").read_text())
    assert report["findings"]["leaks source in train"]["count"] == 2  # the images are still recognised


def test_ctrl_c_says_what_goes_on(source, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quiltnet.data.preparing._manifest", stop)
        result = CliRunner().invoke(app, [str(source), str(tmp_path / "out"), "--workers", "1"])
    assert result.exit_code == 130 and "out.partial, and the same command continues" in result.output
    assert "1 of them are finished, from a run that was stopped" in run(source, tmp_path / "out")


def test_names_are_shown_as_they_are(source, tmp_path):
    assert f"shards: {tmp_path}/new [old]\n" in run(source, tmp_path / "new [old]")


def test_mistakes_are_told(source, tmp_path):
    with pytest.raises(UserError, match="--raw keeps no JPEG, and --jpeg 80 asks for one"):
        run(source, tmp_path / "out", "--raw", "--jpeg", 80)
    with pytest.raises(UserError, match="--size 16 is the shorter side in pixels; give 32 at least"):
        run(source, tmp_path / "out", "--size", 16)
    with pytest.raises(UserError, match="is, holds or lies in the source"):
        run(source, source)
    run(source, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        run(source, tmp_path / "out")
