from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from quiltnet.cli.shard import shard
from quiltnet.data.reading import ShardPairs
from quiltnet.data.shards import read_manifest
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode

app = typer.Typer()
app.command()(shard)


def run(*arguments: object) -> str:
    """Output of ``quiltnet shard``; a UserError is raised (the command line prints it)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(draw_image(number), "PNG"))
    path = tmp_path / "pairs.csv"
    path.write_text(
        "file,text,part\n0.png,One.,train\n0.png,Two.,train\n1.png,Three.,val\n2.png,,val\n9.png,Four.,train\n"
    )
    return path


CSV = ["--format", "csv", "--image-column", "file", "--caption-column", "text"]


def test_csv(table, tmp_path):
    output = run(*CSV, "--table", table, "--images", tmp_path, "--split-column", "part", "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert {split: entry["captions"] for split, entry in manifest["splits"].items()} == {"train": 2, "val": 1}
    assert manifest["totals"]["rejected"] == {"missing_image": 1, "null_caption": 1}
    assert manifest["source"] == {"format": "csv", "table": "pairs.csv", "subset": None, "split": None}
    assert "rejected rows: 1 missing_image, 1 null_caption" in output


def test_split_and_overwrite(table, tmp_path):
    arguments = [*CSV, "--table", table, "--images", tmp_path, "--out", tmp_path / "out"]
    run(*arguments, "--split-column", "part", "--split", "val")
    assert list(read_manifest(tmp_path / "out")["splits"]) == ["val"]
    with pytest.raises(UserError, match="exists already"):
        run(*arguments)
    run(*arguments, "--overwrite")
    assert list(read_manifest(tmp_path / "out")["splits"]) == ["train"]


def test_what_is_asked_for_is_checked(table, tmp_path):
    out = ["--out", tmp_path / "out"]
    with pytest.raises(UserError, match="--table is not given"):
        run("--images", tmp_path, *out)
    with pytest.raises(UserError, match="--images is not given"):
        run(*CSV, "--table", table, *out)
    with pytest.raises(UserError, match="--subset chooses among the subsets of Quilt-1M"):
        run(*CSV, "--table", table, "--images", tmp_path, "--subset", "quilt", *out)
    with pytest.raises(UserError, match="is no folder"):
        run(*CSV, "--table", table, "--images", tmp_path / "nowhere", *out)
    assert not (tmp_path / "out").exists()


def test_synthetic(tmp_path):
    run("--format", "synthetic", "--samples", 20, "--size", 64, "--samples-per-shard", 8, "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    splits = {split: (e["samples"], len(e["shards"])) for split, e in manifest["splits"].items()}
    assert splits == {"train": (18, 3), "val": (2, 1)}
    assert manifest["source"] == {"format": "synthetic", "samples": 20, "size": 64}
    assert manifest["splits"]["train"]["shards"][0]["path"] == "train/synthetic-000000.tar"
    image, captions, _ = ShardPairs(tmp_path / "out" / "val")[0]
    assert image.size == (64, 64) and len(captions) > 1


def test_quilt1m_subset(shared_data, tmp_path):
    folder = shared_data / "quilt_like"
    output = run(
        *("--table", folder / "quilt_1M_lookup.csv", "--images", folder / "images"),
        *("--subset", "atlas", "--split", "val", "--out", tmp_path / "out"),
    )
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest["splits"]) == ["val"]
    assert manifest["totals"]["captions"] == 2 * manifest["totals"]["samples"] == 138
    assert "rejected rows: none" in output


def test_help_does_not_wait_for_heavy_imports():
    code = "import sys, json, quiltnet.cli.shard; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert not {"torch", "pandas", "numpy", "webdataset"} & set(loaded)
