"""quiltnet export: what it says, the card it writes, and a push that breaks off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from quiltnet.cli.export import export
from quiltnet.errors import UserError
from quiltnet.release import push
from quiltnet.release.exporting import export_open_clip
from tests.model.towers import tiny_model
from tests.release.test_hub import save_run


@pytest.fixture
def source(tmp_path):
    export_open_clip(tiny_model(), tmp_path / "source")
    return str(tmp_path / "source")


def test_a_push_that_breaks_off_leaves_the_export_and_goes_on(tmp_path, source, monkeypatch, capsys):
    sent = []

    def send(folder, repository, **options):
        sent.append((sorted(path.name for path in folder.iterdir()), repository, options["private"]))
        if len(sent) == 1:
            raise UserError("the connection broke off; give the same command to continue")
        return "sent"

    monkeypatch.setattr(push, "check_push", lambda *_, **__: None)
    monkeypatch.setattr(push, "push_folder", send)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="broke off"):
        export(source, out, push="some/model", private=True, license="mit")
    said = capsys.readouterr().out
    assert f"{out}: complete" in said
    assert f'quiltnet.load("{out}")' in said
    assert {"README.md", "open_clip_config.json", "open_clip_model.safetensors"} <= set(sent[0][0])
    export(source, out, push="some/model", private=True, license="mit")
    assert sent[1] == (sent[0][0], "some/model", True)
    assert "goes to the hub as it is" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        export(source, out)
    with pytest.raises(UserError, match="is not this export"):
        export(source, out, half=True, push="some/model", license="mit")
    another = tiny_model()
    another.clip.logit_scale.data += 0.1
    export_open_clip(another, tmp_path / "another")
    with pytest.raises(UserError, match="is not this export"):
        export(str(tmp_path / "another"), out, push="some/model", license="mit")
    assert len(sent) == 2


def test_mistakes_are_said_before_anything_is_loaded(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--private and --create-pr go with --push org/name"):
        export("nowhere", out, private=True, create_pr=True)
    with pytest.raises(UserError, match="--push needs --license"):
        export("nowhere", out, push="some/model", dry_run=True)
    with pytest.raises(UserError, match="choose of open_clip, transformers, onnx"):
        export("nowhere", out, format="keras")
    with pytest.raises(UserError, match="nowhere is no model"):
        export("nowhere", out)
    assert not list(tmp_path.iterdir())


def shifted(model, by):
    return {name: tensor + by for name, tensor in model.clip.state_dict().items()}


@pytest.fixture
def run(tmp_path) -> Path:
    """Two checkpoints, the first the better one, each with averaged weights; scores of the averages."""
    model, path = tiny_model(), tmp_path / "run"
    save_run(path, model, samples_seen=8, monitored=0.5, average=shifted(model, 0.01))
    save_run(path, model, samples_seen=16, monitored=0.7, average=shifted(model, 0.02))
    scores = {"zeroshot": {"scores": {"accuracy": 0.5}}, "zeroshot@ema": {"scores": {"accuracy": 0.625}}}
    best = {"samples_seen": 8, "scores": {"zeroshot/accuracy": 0.75, "zeroshot@ema/accuracy": 0.875}}
    results = {"samples_seen": 16, "outcomes": scores, "best": best, "evaluators": {"zeroshot": {}}}
    (path / "config.yaml").write_text("run_name: run\n")
    (path / "results.json").write_text(json.dumps(results))
    return path


@pytest.mark.parametrize(("suffix", "by", "accuracy"), [("@ema", 0.02, 0.625), ("@best@ema", 0.01, 0.875)])
def test_averaged_weights_are_exported_with_their_own_scores(run, suffix, by, accuracy, tmp_path):
    export(f"{run}{suffix}", tmp_path / "out")
    weights = load_file(tmp_path / "out/open_clip_model.safetensors")
    torch.testing.assert_close(weights, shifted(tiny_model(), by), rtol=0, atol=0)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "quiltnet exported the moving average of the weights of the run run." in card.text
    assert f"Measured of the averaged weights after {16 if by == 0.02 else 8} samples" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [accuracy]


@pytest.mark.parametrize("place", ["run/checkpoints/samples-000000000008", "run@best", "run@best@ema"])
def test_damaged_weights_are_not_exported(run, place, tmp_path):
    """One byte; a run's newest ones are passed over."""
    damaged = "average.safetensors" if place.endswith("@ema") else "model.safetensors"
    file = run / "checkpoints/samples-000000000008" / damaged
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=f"no valid checkpoint: {damaged} is damaged"):
        export(str(tmp_path / place), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_lies_in_a_run_has_no_card_of_that_run(run, tmp_path):
    """As deep in it as its checkpoints are."""
    another = tiny_model()
    another.clip.logit_scale.data += 0.1
    export_open_clip(another, run / "exports/another")
    export(str(run / "exports/another"), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "nothing is known of it here" in card and "0.5000" not in card


def test_what_a_run_needs_is_not_overwritten(run, source, tmp_path):
    kept = sorted(path.name for path in (run / "model").iterdir())
    with pytest.raises(UserError, match="is no export, and is not overwritten"):
        export(source, run / "model", overwrite=True)
    assert sorted(path.name for path in (run / "model").iterdir()) == kept


def test_a_licence_given_with_the_push_is_in_the_card_of_an_earlier_export(tmp_path, source, monkeypatch):
    monkeypatch.setattr(push, "check_push", lambda *_, **__: None)
    sent = []
    monkeypatch.setattr(push, "push_folder", lambda folder, *_, **__: sent.append(ModelCard.load(folder / "README.md")))
    out = tmp_path / "out"
    export(source, out)
    card = (out / "README.md").read_text()
    export(source, out, push="some/model", license="cc-by-nc-4.0")
    assert sent[0].data.license == "cc-by-nc-4.0"
    assert (out / "README.md").read_text().replace("license: cc-by-nc-4.0\n", "") == card
