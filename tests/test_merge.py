"""``quiltnet merge``: tables, the curve, the model it exports, and the mistakes it tells."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quiltnet.cli.app import main
from quiltnet.cli.merge import parse_alphas
from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.folder import WEIGHTS_NAME
from quiltnet.release.exporting import export_open_clip
from quiltnet.release.hub import load_model
from quiltnet.training.interpolation import interpolate, uniform_soup
from tests.model.towers import TINY_IMAGE, TINY_TEXT, tiny_model

TILES = "evaluator.zeroshot_synthetic.dataset.tiles"
EVALUATOR = ("--evaluator", "zeroshot_synthetic", "--target", "zeroshot_synthetic/auroc")
OPTIONS = (f"{TILES}.count=20", f"{TILES}.size=48", "feature_cache=null")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Three models of one architecture, a diverged one, one of another architecture, one with another activation."""
    folder = tmp_path_factory.mktemp("models")
    export_open_clip(tiny_model(), folder / "base")
    for seed, name in enumerate(("base", "tuned", "third", "diverged")):
        if name != "base":
            shutil.copytree(folder / "base", folder / name)
        tensors = load_file(folder / name / WEIGHTS_NAME)
        torch.manual_seed(seed)
        tensors["text_projection"].normal_(std=0.1)[0, 0] += torch.nan if name == "diverged" else 0
        save_file(tensors, folder / name / WEIGHTS_NAME)
    torch.manual_seed(0)
    wide = build_model(image=TINY_IMAGE, text=TINY_TEXT, embed_dim=8)
    export_open_clip(wide, folder / "wide")
    export_open_clip(tiny_model(quick_gelu=True), folder / "quick")
    return folder


def merge(models: Path, monkeypatch, sources: str, *arguments: str) -> None:
    """As typed, but for the folder of the models."""
    paths = [str(models / name) for name in sources.split()]
    monkeypatch.setattr(sys, "argv", ["quiltnet", "merge", *paths, "--out", "merged", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    if stopped.value.code:
        raise UserError(str(stopped.value.code))


def weights(source: Path) -> dict[str, torch.Tensor]:
    return load_model(source).clip.state_dict()


def test_alphas_are_scored_and_the_best_is_exported(models, work, monkeypatch, capsys):
    general = ("--general", "zeroshot_synthetic/balanced_accuracy")
    merge(models, monkeypatch, "base tuned", "--alpha", "0:1:0.5", *EVALUATOR, *general, *OPTIONS)
    printed = capsys.readouterr().out
    result = json.loads((work / "merged" / "merge.json").read_text())
    assert [row["name"] for row in result["merged"]] == ["0", "0.5", "1"]
    means = [
        (row["scores"]["zeroshot_synthetic/auroc"] + row["scores"]["zeroshot_synthetic/balanced_accuracy"]) / 2
        for row in result["merged"]
    ]
    assert len(set(means)) == 3 and result["exported"] == ["0", "0.5", "1"][means.index(max(means))]
    expected = interpolate(weights(models / "base"), weights(models / "tuned"), float(result["exported"]))
    torch.testing.assert_close(dict(weights(work / "merged" / "model")), expected, rtol=0, atol=0)
    with open(work / "merged" / "merge.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["alpha"] for row in rows if row["mark"] == "exported"] == [result["exported"]]
    assert (work / "merged" / "merge.md").read_text().count("\n") == 5
    assert "zeroshot_synthetic/auroc" in printed and "results: merged" in printed
    with Image.open(work / "merged" / "curve.png") as picture:
        assert min(picture.size) > 300
    assert sorted(path.name for path in work.iterdir()) == ["merged"]


def test_a_test_set_is_shown_and_not_chosen_by(models, work, monkeypatch, capsys):
    on_test = "evaluator.zeroshot_synthetic.dataset.split=test"
    merge(models, monkeypatch, "base tuned", "--alpha", "0:1:1", *EVALUATOR, *OPTIONS, on_test)
    assert "no model is exported: zeroshot_synthetic/auroc is measured on a test set" in capsys.readouterr().out
    assert json.loads((work / "merged" / "merge.json").read_text())["exported"] is None
    assert (work / "merged" / "curve.png").exists() and not (work / "merged" / "model").exists()


def test_a_uniform_soup_needs_no_evaluator(models, work, monkeypatch):
    merge(models, monkeypatch, "base tuned third", "--soup", "uniform")
    expected = uniform_soup(weights(models / name) for name in ("base", "tuned", "third"))
    torch.testing.assert_close(dict(weights(work / "merged" / "model")), expected, rtol=0, atol=0)
    assert sorted(path.name for path in (work / "merged").iterdir()) == ["merge.json", "model"]


def test_a_greedy_soup_is_not_worse_than_its_best_model(models, work, monkeypatch):
    merge(models, monkeypatch, "base tuned third", "--soup", "greedy", *EVALUATOR, *OPTIONS)
    *alone, soup = json.loads((work / "merged" / "merge.json").read_text())["merged"]
    scores = [row["scores"]["zeroshot_synthetic/auroc"] for row in alone]
    assert soup["mark"] == "exported" and soup["scores"]["zeroshot_synthetic/auroc"] >= max(scores)
    assert alone[scores.index(max(scores))]["mark"] == "in the soup"
    assert soup["name"] == f"soup of {sum(row['mark'] == 'in the soup' for row in alone)}"


def test_one_alpha_is_merged_without_a_score(models, work, monkeypatch):
    merge(models, monkeypatch, "base tuned", "--alpha", "0.25")
    expected = interpolate(weights(models / "base"), weights(models / "tuned"), 0.25)
    torch.testing.assert_close(dict(weights(work / "merged" / "model")), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "sources, arguments, message",
    [
        ("base", ["--soup", "uniform"], "two models at least"),
        ("base nowhere", ["--soup", "uniform"], "nowhere is no model"),
        ("base base", ["--soup", "uniform"], "names a model twice"),
        ("base base/.", ["--soup", "uniform"], "names a model twice"),
        ("base diverged", ["--soup", "uniform"], "diverged are not finite, text_projection is the first"),
        ("base tuned", ["--alpha", "0.5", "--target", "a/b"], "of this merge (none; say --evaluator NAME)"),
        ("base tuned", [], "say one of --alpha"),
        ("base tuned", ["--alpha", "0.5", "--soup", "uniform"], "say one of --alpha"),
        ("base tuned third", ["--alpha", "0.5"], "between two models"),
        ("base tuned", ["--alpha", "0:1:0.1"], "chosen by a score"),
        ("base tuned", ["--alpha", "half"], "no number and no range"),
        ("base tuned", ["--soup", "uniform", "--evaluator", "zeroshot_synthetik"], "nearest: zeroshot_synthetic"),
        (
            "base tuned",
            ["--alpha", "0:1:1", "--evaluator", "zeroshot_synthetic", "--target", "a/b", *OPTIONS],
            "a/b must be",
        ),
        ("base wide", ["--soup", "uniform"], "different architectures"),
        ("base quick", ["--soup", "uniform"], "quick_gelu is False and True"),
        ("base tuned", ["--soup", "uniform", "data.vall=x"], "there is no option data.vall; the nearest: data.val"),
        (
            "base tuned",
            ["--alpha", "0:1:1", *EVALUATOR[:3], "zeroshot_synthetic/auc", *OPTIONS],
            "auc is not measured; what the evaluators measure: zeroshot_synthetic/accuracy",
        ),
        (
            "base tuned",
            ["--soup", "greedy", *EVALUATOR, *OPTIONS, "evaluator.zeroshot_synthetic.dataset.split=test"],
            "on a test set",
        ),
        (
            "base tuned",
            ["--alpha", "0:1:1", *EVALUATOR, "--general", "zeroshot_synthetic/expected_calibration_error", *OPTIONS],
            "one gets better as it rises",
        ),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(models, work, monkeypatch, capsys, sources, arguments, message):
    with pytest.raises(UserError, match="2"):
        merge(models, monkeypatch, sources, *arguments)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(work.iterdir())


def test_a_folder_that_exists_is_left_alone(models, work, monkeypatch, capsys):
    (work / "merged").mkdir()
    with pytest.raises(UserError):
        merge(models, monkeypatch, "base tuned", "--soup", "uniform")
    assert "merged exists already" in capsys.readouterr().err


def test_a_run_named_like_an_option_is_a_model(models, work, monkeypatch, capsys):
    (work / "lr=1e-4").mkdir()
    with pytest.raises(UserError):
        merge(models, monkeypatch, "base", "lr=1e-4@best", "--alpha", "0.5")
    assert "only they keep an average or a best" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, alphas",
    [
        ("0.5", (0.5,)),
        ("0", (0.0,)),
        ("0:1:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("0.2:0.8:0.3", (0.2, 0.5, 0.8)),
    ],
)
def test_ranges_have_both_ends(text, alphas):
    assert parse_alphas(text) == alphas


@pytest.mark.parametrize(
    "text", ["0:2:0.1", "-0.1", "1.5", "1:0:0.1", "0:1:0", "0:1:-0.1", "0:1:0.3", "0:1", "nan", "0:1:1e-9", "a:b:c"]
)
def test_ranges_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="--alpha"):
        parse_alphas(text)
