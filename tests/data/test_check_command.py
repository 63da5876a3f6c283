from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import typer
from typer.testing import CliRunner

from quiltnet.cli.check import check, is_truncated
from quiltnet.cli.door import at_the_door
from quiltnet.errors import UserError
from quiltnet.model.folder import write_description
from tests.data.made_sets import encoded, pair, tissue, write_set, write_tar
from tests.model.towers import tiny_model

LONG = "A gland of the colon with goblet cells and a brush border. " * 9


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and output of ``quiltnet check``; a UserError is raised (the command line prints it)."""
    result = CliRunner().invoke(check, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def sample(seed: int, caption: str = "A gland.") -> dict[str, bytes | str]:
    return pair(f"tile{seed}", encoded(tissue(seed)), caption)


@pytest.fixture
def folder(tmp_path) -> Path:
    train = {**sample(0), **sample(1, LONG), **sample(2)}
    return write_set(tmp_path / "set", {"train": [train], "val": [sample(3)]})


def test_a_set_within_its_limits(folder):
    code, output = run("data", folder, "--workers", 1)
    assert code == 0 and "nothing is above its limit" in output and f"report: {folder}/check" in output
    report = json.loads((folder / "check" / "report.json").read_text())
    assert report["passed"] and report["sets"] == {"train": 3, "val": 1}
    assert report["findings"]["truncated_captions"]["count"] == 1
    assert report["limits"] == {
        "broken": 0.01, "leaks": 0, "duplicates": None, "duplicate_captions": None, "truncated": None
    }  # fmt: skip
    assert (folder / "check" / "contact_sheet.png").is_file()
    assert run("data", folder, "--workers", 1)[0] == 0  # its own report is not in the way


def test_limits_decide_the_exit_code(folder, tmp_path):
    images = tmp_path / "eval"
    images.mkdir()
    (images / "a.png").write_bytes(encoded(tissue(2), "PNG"))
    out = ["--out", tmp_path / "out", "--workers", 1]
    code, output = run("data", folder, "--against", images, *out)
    assert code == 1 and "above its limit: leaks eval in train" in output
    assert run("data", folder, "--against", images, "--max-leaks", 1, *out)[0] == 0
    assert run("data", folder, "--against", images, "--max-leaks", -1, *out)[0] == 0
    assert run("data", folder, "--max-truncated", 0.2, *out)[0] == 1
    assert run("data", folder, "--max-truncated", 0.3, *out)[0] == 0
    assert run("data", folder, "--max-duplicate-captions", 0.2, *out)[0] == 1
    (folder / "train" / "made-000000.tar").write_bytes(b"")
    code, output = run("data", folder, *out)
    assert code == 1 and "unreadable_shards" in output


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_report_never_lies_among_the_tars(folder, split):
    code, _ = run("data", folder / split, "--workers", 1)
    assert (
        code == 0 and (folder / f"check-{split}" / "report.json").is_file() and not (folder / split / "check").exists()
    )


def test_foreign_tars_and_a_single_one(tmp_path):
    tar = write_tar(tmp_path / "foreign" / "0.tar", sample(0))
    assert run("data", tar.parent, "--workers", 1)[0] == 0 and (tar.parent / "check").is_dir()
    assert run("data", tar, "--workers", 1)[0] == 0 and (tar.parent / "check-0").is_dir()


def test_lines_are_whole_and_names_as_they_are(folder, tmp_path):
    images = tmp_path / f"an evaluation set with a name that is long {'x' * 60}"
    images.mkdir()
    (images / "a.png").write_bytes(encoded(tissue(2), "PNG"))
    _, output = run("data", folder, "--against", images, "--out", tmp_path / "new [old]", "--workers", 1)
    assert f"leaks {images.name} in train" in output and f"report: {tmp_path}/new [old]\n" in output
    assert run("data", folder, "--examples", -1)[0] == 2


def test_whose_tokeniser_counts(folder, tmp_path):
    model = tiny_model()  # 12 tokens
    write_description(model, tmp_path / "run" / "model")
    captions = ["gland " * count for count in (9, 10, 11, 75, 76)] + [LONG]
    assert is_truncated(captions, model=str(tmp_path / "run")) == [False, False, True, True, True, True]
    assert is_truncated(captions, model=str(tmp_path / "run" / "model")) == [False, False, True, True, True, True]
    assert is_truncated(captions, model="ViT-B-32") == [False, False, False, False, True, True]
    encode = open_clip.SimpleTokenizer().encode
    assert [len(encode(caption)) + 2 > 77 for caption in captions] == is_truncated(captions, model="ViT-B-32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B-33"], "--model ViT-B-33 is neither an open_clip architecture .* nor a run directory"),
        (["--workers", 0], "--workers 0: one process at least works"),
        (["--max-broken", 3], "--max-broken 3.0 is not a share"),
        (["--max-leaks", -2], "--max-leaks -2 is not a number of images"),
        (["--against", "nowhere"], "--against nowhere: there is nothing"),
        (["--out", "/proc/check"], "/proc/check cannot be written .*; choose another place with --out"),
    ],
)
def test_mistakes_are_told(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        run("data", folder, *arguments)
    assert not (folder / "check" / "report.json").exists()


def test_a_mistake_ends_with_2(tmp_path, capsys, monkeypatch):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.add_typer(check, name="check")
    monkeypatch.setattr(sys, "argv", ["quiltnet", "check", "data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as exit_:
        at_the_door(app)()
    assert exit_.value.code == 2 and "there is no such folder" in capsys.readouterr().err


def test_help_does_not_wait_for_heavy_imports():
    code = "import sys, json, quiltnet.cli.check, quiltnet.cli.prepare; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert not {"torch", "pandas", "numpy", "imagehash", "open_clip"} & set(loaded)
