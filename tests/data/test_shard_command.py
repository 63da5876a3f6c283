from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from quiltnet.cli.shard import shard
from quiltnet.cli.shard_progress import Bar, Lines, watch_progress
from quiltnet.data.held_out import ShardPairs
from quiltnet.data.manifest import read_manifest
from quiltnet.data.shard_files import resolve_shards
from quiltnet.data.source_pattern import SourcePattern
from quiltnet.data.stored_pairs import StoredPairs
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
    assert manifest["source"] == {
        "format": "csv",
        "table": "pairs.csv",
        "images": [tmp_path.name],
        "image_column": "file",
        "caption_column": "text",
        "split_column": "part",
    }
    assert "rejected rows: 1 missing_image, 1 null_caption" in output


def test_a_column_called_split_is_used_unasked(table, tmp_path):
    table.write_text(table.read_text().replace("part", "split"))
    arguments = [*CSV, "--table", table, "--images", tmp_path, "--out"]
    run(*arguments, tmp_path / "all")
    manifest = read_manifest(tmp_path / "all")
    assert list(manifest["splits"]) == ["train", "val"]
    assert manifest["source"]["split_column"] == "split"
    run(*arguments, tmp_path / "val", "--split", "val")
    assert list(read_manifest(tmp_path / "val")["splits"]) == ["val"]


def test_split_and_overwrite(table, tmp_path):
    arguments = [*CSV, "--table", table, "--images", tmp_path, "--out", tmp_path / "out"]
    run(*arguments, "--split-column", "part", "--split", "val")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest["splits"]) == ["val"]
    assert manifest["totals"]["rejected"] == {"filtered_split": 3, "null_caption": 1}
    with pytest.raises(UserError, match=r'exists already and holds another source: .*"split": "val"'):
        run(*arguments)
    with pytest.raises(UserError, match="exists already; give another folder"):
        run(*arguments, "--split-column", "part", "--split", "val")
    run(*arguments, "--overwrite")
    assert list(read_manifest(tmp_path / "out")["splits"]) == ["train"]


def test_what_is_asked_for_is_checked(table, tmp_path):
    out = ["--out", tmp_path / "out"]
    with pytest.raises(UserError, match="--table is not given; --format quilt1m needs it"):
        run("--images", tmp_path, *out)
    with pytest.raises(UserError, match="--images is not given"):
        run(*CSV, "--table", table, *out)
    with pytest.raises(UserError, match="--subset is for --format quilt1m; leave it out with --format csv"):
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
    assert re.search(r"filtered rows: \d+ split, \d+ subset", output)
    assert manifest["totals"]["rows"] == 1443 == 138 + sum(manifest["totals"]["rejected"].values())


QUILT = (
    "{},caption,image_path,subset,split,pathology,magnification,height,width,not_histology\n"
    "0,One word here.,{v}_image_{u}.jpg,quilt,train,\"['Renal']\",0.0,32,40,0\n"
    "1,A longer text of seven words here.,{v}_image_{u}.jpg,quilt,train,\"['Renal']\",1.0,32,40,1\n"
    "2,Other.,case__1.jpg,pubmed,val,,,32,40,0\n"
    "3,Two words.,slide7_3.jpg,laion,train,,2.0,32,40,\n"
)
NAMES = {"v": "_b_M_sOb4ZI", "u": "0760643c-9d0c-4bf2-8a6e-5f1a3b0c7d21"}


@pytest.fixture
def release(tmp_path: Path) -> list[object]:
    """Options that name a release of four rows, its images in two zips."""
    (tmp_path / "lookup.csv").write_text(QUILT.format("", **NAMES))
    names = [f"{NAMES['v']}_image_{NAMES['u']}.jpg", "case__1.jpg", "slide7_3.jpg"]
    (tmp_path / "zips").mkdir()
    for part in (1, 2):
        with zipfile.ZipFile(tmp_path / "zips" / f"images_part_{part}.zip", "w") as file:
            for number, name in enumerate(names):
                if number % 2 == part - 1:
                    file.writestr(f"quilt_1m/{name}", encode(draw_image(number)))
    return ["--table", tmp_path / "lookup.csv", "--images", tmp_path / "zips", "--out", tmp_path / "out"]


def records(out: Path) -> dict[str, dict]:
    pairs = StoredPairs(resolve_shards([path for path in sorted(out.glob("*")) if path.is_dir()]))
    return {pairs[number].record["image_path"]: pairs[number].record for number in range(len(pairs))}


@pytest.mark.parametrize(
    ("options", "rejected", "captions"),
    [
        ([], {}, 4),
        (["--subset", "quilt,laion"], {"filtered_subset": 1}, 3),
        (["--split", "train"], {"filtered_split": 1}, 3),
        (["--magnification", "1,2"], {"filtered_magnification": 2}, 2),
        (["--drop-not-histology"], {"filtered_not_histology": 1}, 3),
        (["--min-words", "2", "--max-words", "3"], {"filtered_words": 2}, 2),
        (["--keep-list", "keep.txt"], {"filtered_keep_list": 3}, 1),
        (
            ["--keep-list", "scores.csv", "--keep-column", "Any impairment", "--keep-max", "0.5"],
            {"filtered_keep_list": 2},
            2,
        ),
    ],
)
def test_filters(release, tmp_path, monkeypatch, options, rejected, captions):
    monkeypatch.chdir(tmp_path)
    Path("keep.txt").write_text("case__1.jpg\nelsewhere.jpg\n")
    Path("scores.csv").write_text("image_path,Any impairment\ncase__1.jpg,0.5\nslide7_3.jpg,0.7\n"
                                  f"{NAMES['v']}_image_{NAMES['u']}.jpg,0.2\n")  # fmt: skip
    run(*release, *options)
    totals = read_manifest(tmp_path / "out")["totals"]
    assert (totals["rejected"], totals["captions"], totals["rows"]) == (rejected, captions, 4)
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""


def test_source_pattern(release, tmp_path):
    run(*release, "--source-pattern", r"^(slide\d+)_")
    sources = {path: record["source_id"] for path, record in records(tmp_path / "out").items()}
    assert sources.pop("slide7_3.jpg") == "slide7"
    assert all(path == source for path, source in sources.items())  # what it does not match is its own source
    with pytest.raises(UserError, match=r"--source-pattern \(x: .*regular expression"):
        run(*release, "--source-pattern", "(x", "--overwrite")
    with pytest.raises(UserError, match="--source-pattern nothing matches no image path"):
        run(*release, "--source-pattern", "nothing", "--overwrite")
    assert read_manifest(tmp_path / "out")["source"]["source_pattern"] == r"^(slide\d+)_"


def test_the_group_of_a_source_pattern():
    assert SourcePattern(r"(.)_(?P<source>\w+)__")("a_case7__1.jpg") == "case7"
    assert SourcePattern(r"(\w)_(\w+?)__")("a_case7__1.jpg") == "a"
    assert SourcePattern(r"case\d")("a_case7__1.jpg") == "case7"
    assert SourcePattern(r"(x)?case")("case.jpg") == "case.jpg"


def test_layout_of_rows(release, tmp_path):
    run(*release, "--layout", "rows")
    assert read_manifest(tmp_path / "out")["totals"]["samples"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--subset", "atlas"], "has no subset atlas; it has laion, pubmed, quilt"),
        (["--magnification", "5"], "has no magnification 5; it has 0, 1, 2"),
        (["--min-words", "100"], "has no caption of 100 to any number of words"),
        (["--keep-max", "0.5"], "are about --keep-list, which is not given"),
        (["--split-column", "split"], "--split-column is for --format csv; leave it out with --format quilt1m"),
        (["--format", "folder"], "--table is for --format quilt1m or csv; leave it out with --format folder"),
        (["--caption-column", "corrected_text"], "--caption-column is for --format csv; leave it out"),
        (["--image-column", "file"], "--image-column is for --format csv; leave it out with --format quilt1m"),
        (["--samples", "3"], "--samples is for --format synthetic; leave it out with --format quilt1m"),
        (["--subset", ""], "has no subset ; it has laion, pubmed, quilt"),
        (["--split", ""], "has no split ; it has train, val"),
        (["--source-pattern", ""], "matches no image path"),
    ],
)
def test_options_that_ask_for_nothing(release, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(*release, *options)
    assert not list(tmp_path.glob("out*"))


def test_folder_and_then_its_tars(tmp_path):
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(encode(draw_image(number)))
        (tmp_path / "in" / f"{number}.txt").write_text(f"Tile {number}.")
    run("--format", "folder", "--images", tmp_path / "in", "--split", "val", "--out", tmp_path / "first")
    run("--format", "webdataset", "--images", tmp_path / "first", "--out", tmp_path / "second")
    assert records(tmp_path / "second") == records(tmp_path / "first")
    assert list(read_manifest(tmp_path / "second")["splits"]) == ["val"]
    with pytest.raises(UserError, match="takes one --images, not 2"):
        twice = ["--images", tmp_path / "in"] * 2
        run("--format", "folder", *twice, "--out", tmp_path / "third")


def test_what_is_written_does_not_lie_among_what_is_read(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encode(draw_image(0)))
    (tmp_path / "0.txt").write_text("A tile.")
    for format in ("folder", "webdataset"):
        with pytest.raises(UserError, match=r"--out .*deep/out lies in --images .*; give a folder elsewhere"):
            run("--format", format, "--images", tmp_path, "--out", tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jpg", "0.txt"]


def test_names_are_shown_as_they_are(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"shards: {tmp_path}/new [old]\n" in run(*CSV, "--table", table, "--images", tmp_path, "--out", "new [old]")
    bar = Bar(Console(file=(written := io.StringIO()), force_terminal=True, width=100))
    bar.say("new [old]")
    assert written.getvalue() == "new [old]\n"


def test_paths_that_are_spelt_for_another_system(tmp_path):
    (tmp_path / "t.csv").write_text("image_path,caption\ntiles\\0.jpg,One.\n,Two.\ntiles\\1.jpg,Three.\n")
    message = r"such as missing_image \(row [02], tiles\\[01]\.jpg\); check .*; a path's folders are told apart by /"
    with pytest.raises(UserError, match=message):
        run("--format", "csv", "--table", tmp_path / "t.csv", "--images", tmp_path, "--out", tmp_path / "out")


def test_paths_that_are_absolute(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encode(draw_image(0)))
    (tmp_path / "t.csv").write_text(f"image_path,caption\n{tmp_path}/0.jpg,One.\n")
    with pytest.raises(
        UserError, match=r"unsafe_path \(row 0, /.*/0.jpg, paths start from the folder of images, without"
    ):
        run("--format", "csv", "--table", tmp_path / "t.csv", "--images", tmp_path, "--out", tmp_path / "out")


def test_a_zip_that_is_none(release, tmp_path):
    (tmp_path / "zips" / "images_part_3.zip").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"images_part_3\.zip is not a zip"):
        run(*release)
    assert not list(tmp_path.glob("out*"))


def test_lines_of_a_log(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = Lines()
    lines.stage("packing images", 5000)
    for _ in range(25):
        now[0] += 1
        lines.advance(100)
    lines.stage("reading rows", None)
    now[0] += 10
    lines.advance(20_000)
    lines.close()
    assert capsys.readouterr().err.splitlines() == [
        "packing images: 1,000 of 5,000, 100/s",
        "packing images: 2,000 of 5,000, 100/s",
        "reading rows: 20,000, 2,000/s",
    ]


def test_a_bar_on_a_terminal():
    written = io.StringIO()
    bar = Bar(Console(file=written, force_terminal=True, width=100))
    bar.stage("reading rows", None)
    bar.advance(7)
    bar.say("60 samples to pack")
    bar.stage("packing images", 60)
    bar.advance(60)
    bar.close()
    assert "60 samples to pack" in written.getvalue() and "60/60" in written.getvalue()
    assert isinstance(watch_progress(), Lines)  # standard error is none


def test_help_does_not_wait_for_heavy_imports():
    code = "import sys, json, quiltnet.cli.shard; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert not {"torch", "pandas", "numpy", "webdataset"} & set(loaded)
