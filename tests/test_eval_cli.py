"""``python eval.py``: models side by side, and the folder it leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from quiltnet.cli.hydra_main import eval_main
from quiltnet.release.exporting import export_open_clip
from tests.conftest import ROOT
from tests.evaluation.miniatures import make_all
from tests.model.towers import tiny_model

SETS = 13


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models with weights of their own and a miniature of every published set."""
    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("base", "tuned")):
        model = tiny_model()
        torch.manual_seed(seed)
        with torch.no_grad():
            model.clip.text_projection.normal_(std=0.1)
        export_open_clip(model, folder / name)
    make_all(folder / "sets")
    return folder


def evaluate(place: Path, *options: str, models: str = "{{base: {place}/base, tuned: {place}/tuned}}") -> None:
    checkpoint = f"checkpoint={models.format(place=place)}"
    eval_main([checkpoint, f"data_root={place}/sets", *options], conf=str(ROOT / "conf"))


def test_all_published_sets_end_in_one_table_and_one_chart(place, work, capsys):
    evaluate(place, "evaluator=zeroshot_all", "prompts@evaluator.zeroshot_mhist.prompts=ensemble", "output=results")
    results = json.loads((work / "results" / "results.json").read_text())
    assert list(results["models"]) == ["base", "tuned"]
    assert results["models"]["base"]["weights_sha256"] != results["models"]["tuned"]["weights_sha256"]
    assert results["precision"] == "fp32"
    assert len(results["evaluators"]) == len(results["outcomes"]["tuned"]) == SETS
    mhist = results["evaluators"]["zeroshot_mhist"]
    assert mhist["dataset"]["split"] == "test" and len(mhist["dataset"]["sha256"]) == 64
    assert mhist["prompts"]["name"] == "ensemble"
    outcome = results["outcomes"]["tuned"]["zeroshot_mhist"]
    low, high = outcome["intervals"]["accuracy"]
    assert low <= outcome["scores"]["accuracy"] <= high
    assert sum(map(sum, outcome["confusion_matrix"])) == mhist["dataset"]["images"]
    change = results["differences"]["tuned"]["zeroshot_mhist/accuracy"]
    other = results["outcomes"]["base"]["zeroshot_mhist"]
    assert change[0] == pytest.approx(outcome["scores"]["accuracy"] - other["scores"]["accuracy"])

    printed = capsys.readouterr().out
    with open(work / "results" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in results["evaluators"]:
        assert name in printed
        assert {row["model"] for row in rows if row["evaluator"] == name} == {"base", "tuned"}
    for name in ("results.md", "results.tex", "balanced_accuracy.svg", "confusion-zeroshot_sicapv2-tuned.png"):
        assert (work / "results" / name).stat().st_size > 0
    with Image.open(work / "results" / "balanced_accuracy.png") as chart:
        assert min(chart.size) > 300
    assert not [path for path in (work / "results").iterdir() if path.name.startswith(".")]


def test_results_are_not_replaced_unasked(place, work, capsys):
    options = ("evaluator=[zeroshot_bach]", "output=results")
    evaluate(place, *options)
    before = (work / "results" / "results.json").read_text()
    with pytest.raises(SystemExit) as stopped:
        evaluate(place, *options)
    assert stopped.value.code == 2
    assert "results holds results already" in capsys.readouterr().err
    assert (work / "results" / "results.json").read_text() == before
    evaluate(place, *options, "overwrite=true", "precision=bf16")
    assert json.loads((work / "results" / "results.json").read_text())["precision"] == "bf16"


def test_features_are_kept_between_evaluations(place, work):
    options = ("evaluator=[zeroshot_bach,zeroshot_mhist]", "feature_cache=features")
    evaluate(place, *options)
    kept = {path: path.stat().st_mtime_ns for path in (work / "features").iterdir()}
    assert len(kept) == 4  # two sets, two models
    evaluate(place, *options, "prompts@evaluator.zeroshot_bach.prompts=plip")
    assert {path: path.stat().st_mtime_ns for path in (work / "features").iterdir()} == kept


@pytest.mark.parametrize(
    "option, models, message",
    [
        ("output=file", "{place}/base", "output=file is a file; give a folder"),
        ("precision=fp8", "{place}/base", "precision=fp8 must be one of"),
        ("data_root=/no", "{place}/base", "ICIAR2018_BACH_Challenge"),
        ("output=results", "[{place}/base,{place}/base]", "names a model twice"),
        ("output=results", "[]", "must name models"),
        ("output=results", "[{place}/base,7]", "must name models"),
    ],
)
def test_mistakes_are_said_at_the_door(place, work, capsys, option, models, message):
    (work / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        evaluate(place, "evaluator=[zeroshot_bach]", option, models=models)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (work / "results").exists()


def test_all_missing_sets_are_said_at_once(place, work, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(place, "evaluator=[zeroshot_bach,zeroshot_mhist]", "data_root=/no")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "2 evaluators cannot be made" in error and "- zeroshot_bach: " in error
    assert error.count("data_root=/no; data_root=… or QUILTNET_DATA names another place") == 1
    assert "ICIAR2018_BACH_Challenge" in error and "MHIST" in error and "Traceback" not in error
