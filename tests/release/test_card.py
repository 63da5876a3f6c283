"""The model card: what it says of a run, what it never says, and what its owner wrote."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.release.card import UNWRITTEN, write_card
from quiltnet.release.card_text import plain
from quiltnet.release.comparison import Comparison
from quiltnet.release.exporting import export_model
from quiltnet.release.run_files import RunFiles, read_run
from tests.model.towers import TINY_IMAGE, TINY_TEXT

COMPARISONS = [Comparison("open_clip", 2e-7, 1e-4, "embeddings")]
EVIL = (
    "{{ 7*7 }} {% include 'x' %} <script>alert(1)</script> [x](javascript:y) `a` | b\n---\nlicense: evil\n# H ![i](u)"
)


@pytest.fixture
def run(tmp_path) -> Path:
    """The files of a run that trained on a shard set beside it, as `train.py` writes them."""
    shards = tmp_path / "ward-7/train"
    shards.mkdir(parents=True)
    rejected = {"filtered_not_histology": 1200, "missing_image": 3}
    totals = {"rows": 6203, "samples": 4000, "captions": 5000, "duplicate_captions": 0, "rejected": rejected}
    manifest = {"totals": totals, "splits": {"train": {"samples": 3600}}, "source": {"csv": "/home/me/reports.csv"}}
    (shards.parent / "manifest.json").write_text(json.dumps(manifest))
    folder = tmp_path / "outputs/first"
    folder.mkdir(parents=True)
    config = {
        "run_name": "first",
        "total_samples": 7200,
        "global_batch_size": 16,
        "precision": "fp32",
        "seed": 0,
        "averaging": {"decay": 0.99},
        "model": {"architecture": "ViT-B-32", "pretrained": "openai"},
        "tuning": {"image": "lora", "text": "full", "lora_rank": 4, "lora_alpha": 8.0},
        "optim": {"name": "adamw", "lr": 1e-5, "weight_decay": 0.2},
        "schedule": {"_target_": "quiltnet.training.schedules.WarmupCosine", "warmup_samples": 32},
        "loss": {"_target_": "quiltnet.training.losses.InfoNCE"},
        "data": {"train": {"shards": str(shards), "caption_policy": "random", "crop_scale": [0.9, 1.0]}},
        "logger": {"wandb": {"api_key": "hf_" + "a" * 30}},
    }
    environment = {
        "command": ["train.py", f"data.train.shards={shards}"],
        "time": "2026-11-28T23:11:28+0000",
        "python": "3.11.7",
        "packages": {"torch": "2.14.1", "zlib": "1"},
        "gpus": [],
        "cpus": 2,
        "world_size": 1,
        "data": {"samples": 3600, "tars": 5, "sha256": "59e2"},
    }
    scores = {"accuracy": 0.75, "drop@blur": 0.5, "loss": None}
    averaged = {"scores": {"accuracy": 0.8}, "intervals": {}}
    results = {
        "samples_seen": 7200,
        "start": {"zeroshot_lungs/accuracy": 0.25, "zeroshot_lungs@ema/accuracy": 0.25},
        "outcomes": {
            "zeroshot_lungs": {"scores": scores, "intervals": {"accuracy": [0.7, 0.8125]}},
            "zeroshot_lungs@ema": averaged,
        },
        "changes": {"zeroshot_lungs/accuracy": [0.5, 0.4375, 0.5625]},
        "evaluators": {"zeroshot_lungs": {"dataset": {"source": "/home/me/lungs", "split": "test"}}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """An exported folder, as far as a card looks at it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "open_clip_config.json").write_text("{}")
    return out


def write(out: Path, run: Path | RunFiles | None, **options: Any) -> str:
    run = read_run(run) if isinstance(run, Path) else run
    options = {"comparisons": COMPARISONS, "license": "mit", **options}
    return write_card(out, run, **options).read_text()


def cells(card: str) -> dict[str, list[str]]:
    """First cell of a row -> the others, of all tables, as a reader sees them."""
    rows = {}
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
    row: list[str] = []
    for token in tokens:
        if token.type == "tr_open":
            row = []
        elif token.type == "inline":
            row.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            rows[row[0]] = row[1:]
    return rows


def test_the_metadata_is_the_hubs(out, run):
    data = ModelCard(write(out, run)).data  # parses model-index, or raises
    assert (data.license, data.library_name) == ("mit", "open_clip")
    assert data.pipeline_tag == "zero-shot-image-classification" and "histopathology" in data.tags
    assert data.base_model == "timm/vit_base_patch32_clip_224.openai"
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("zeroshot_lungs", "accuracy", 0.75)
    assert (result.task_type, result.dataset_split) == ("zero-shot-image-classification", "test")
    assert result.metric_args == {"interval_95": [0.7, 0.8125]}
    (result,) = ModelCard(write(out, run, averaged=True)).data.eval_results
    assert (result.metric_value, result.metric_args) == (0.8, None)


def test_the_run_is_told_in_numbers(out, run):
    card = write(out, run)
    shown = cells(card)
    assert shown["zeroshot_lungs"] == [
        "accuracy",
        "0.2500",
        "0.7500",
        "0.7000 to 0.8125",
        "+0.5000 (+0.4375 to +0.5625)",
    ]
    assert shown["filtered_not_histology"] == ["1,200"] and shown["rows read"] == ["6,203"]
    assert shown["image tower"] == ["lora, rank 4, alpha 8.0"] and shown["learning rate"] == ["1e-05"]
    assert shown["passes over the data, planned"] == ["2.00"] and shown["torch"] == ["2.14.1"]
    assert shown["open_clip"] == ["embeddings", "2.0e-07", "1e-04"]
    assert "Not for diagnosis" in card and "zlib" not in card
    manifest = run.parents[1] / "ward-7/manifest.json"
    manifest.write_text(manifest.read_text().replace("3600", "9999"))
    assert "filtered_not_histology" not in cells(write(out, run)), "the shards are others than those of the run"


def test_numbers_are_those_of_the_exported_weights(out, run):
    """Not of the run's last ones, where an earlier checkpoint was exported."""
    (run / "metrics.jsonl").write_text('{"samples_seen": 1600, "train/loss": 1.0, "zeroshot_lungs/accuracy": 0.5}\n')
    results = json.loads((run / "results.json").read_text())
    best = {"samples_seen": 3200, "scores": {"zeroshot_lungs/accuracy": 0.875}}
    (run / "results.json").write_text(json.dumps({**results, "best": best}))
    change = "+0.5000 (+0.4375 to +0.5625)"
    expected = {1600: ["0.5000", "", ""], 3200: ["0.8750", "", change], 7200: ["0.7500", "0.7000 to 0.8125", ""]}
    for samples_seen, numbers in expected.items():
        card = write(out, run, samples_seen=samples_seen)
        assert cells(card)["zeroshot_lungs"] == ["accuracy", "0.2500", *numbers]
        assert cells(card)["samples seen"] == [f"{samples_seen:,}"]
        assert ModelCard(card).data.eval_results[0].metric_value == float(numbers[0])
    card = write(out, run, samples_seen=99)
    assert "Nothing was measured of the weights after 99 samples" in card and not ModelCard(card).data.eval_results


def test_places_names_and_secrets_stay_here(out, run, tmp_path):
    card = write(out, run)
    for private in (str(tmp_path), "ward-7", "/home/me", "reports.csv", "hf_aaa", "api_key"):
        assert private not in card
    shared = write(out, run, share_samples=True)
    assert "ward-7/train" in shared and str(tmp_path) not in shared and "hf_aaa" not in shared


def evil(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: evil(inner) for key, inner in value.items()}
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("share_samples", [False, True])
def test_no_field_becomes_markup_or_metadata(out, run, share_samples):
    read = read_run(run)
    outcomes = {EVIL: read.results["outcomes"]["zeroshot_lungs"]}
    results = {**read.results, "outcomes": outcomes, "evaluators": {EVIL: {"split": EVIL}}}
    bad = RunFiles(run.with_name(EVIL.replace("/", "")), evil(read.config), evil(read.environment), results, [])
    comparisons = [Comparison(EVIL, 1e-7, 1e-4, EVIL)]
    card = write(out, bad, comparisons=comparisons, share_samples=share_samples)
    data, plain_card = ModelCard(card).data, ModelCard(write(out, run))
    assert data.license == "mit" and data.eval_results[0].dataset_name == EVIL
    text = ModelCard(card).text
    assert not re.search(r"\{\{|\{%|<script", text)
    markdown = MarkdownIt("commonmark").enable("table")
    kinds = [{token.type for token in flat(markdown.parse(it))} for it in (text, plain_card.text)]
    assert kinds[0] <= kinds[1], "links, images, code or headings that the run put there"
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == len([line for line in plain_card.text.splitlines() if line.startswith("#")])


def flat(tokens):
    for token in tokens:
        yield token
        yield from flat(token.children or [])


@pytest.mark.parametrize(
    "text", ["- a", "1. a", "---", "www.x.y http://x.y @me", "*a* _b_ a_b", "<!-- yours: uses -->"]
)
def test_plain_text_is_shown_as_it_is(text):
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(plain(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}
    assert "".join(child.content for child in tokens[1].children) == text


def test_the_owners_words_survive(out, run, tmp_path):
    card = write(out, run)
    for name in ("description", "uses", "citation"):
        assert UNWRITTEN[name] in card
    edited = card.replace(UNWRITTEN["uses"], "Only *mice*.").replace(
        "license: mit\n", "license: mit\ndatasets:\n- a/b\n"
    )
    edited += "\n<!-- yours: thanks -->\nTo all.\n<!-- end of thanks -->\n"
    (tmp_path / "old.md").write_text(edited.replace("0.7500", "0.9999"))
    again = write(out, run, license="apache-2.0", previous=tmp_path / "old.md")
    assert "Only *mice*." in again and "To all." in again and UNWRITTEN["citation"] in again
    assert "0.7500" in again and "0.9999" not in again
    assert ModelCard(again).data.datasets == ["a/b"] and ModelCard(again).data.license == "apache-2.0"
    assert write(out, run, license="apache-2.0", previous=out / "README.md") == again


def test_a_card_by_hand_becomes_the_description(out, tmp_path):
    (tmp_path / "old.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    assert "<!-- yours: description -->\n# Mine\n\nWords.\n<!-- end of description -->" in write(
        out, None, previous=tmp_path / "old.md"
    )


def test_what_is_no_card_or_no_license_is_said(out, tmp_path):
    with pytest.raises(UserError, match=r"'MIT License' is no identifier of the hub's.*apache-2.0"):
        write(out, None, license="MIT License")
    (tmp_path / "old.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match=r"old.md cannot be read as a model card"):
        write(out, None, previous=tmp_path / "old.md")
    assert not (out / "README.md").exists()


def small_model() -> ContrastiveModel:
    """Large enough that transformers' two image processors differ by less than an export may."""
    torch.manual_seed(0)
    image = {**TINY_IMAGE, "image_size": 96, "patch_size": 32}
    return build_model(image=image, text=TINY_TEXT, embed_dim=32)


def test_its_code_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    def finish(folder: Path, comparisons: list[Comparison]) -> None:
        write_card(folder, None, comparisons=comparisons, license="mit", final=tmp_path / "out")

    formats = ("open_clip", "transformers")
    export_model(small_model(), tmp_path / "out", formats=formats, finish=finish)
    Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / "tile.png")
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    assert len(codes) == 1 + len(formats)
    shown = []
    for code in codes:
        exec(compile(code, "README.md", "exec"), {})
        shown.append(literal_eval(capsys.readouterr().out.splitlines()[-1]))
    _, first, *others = (list(probabilities.values()) for probabilities in shown)
    for probabilities in others:
        assert probabilities == pytest.approx(first, abs=1e-3)
