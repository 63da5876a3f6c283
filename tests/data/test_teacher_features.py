from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import quiltnet
from quiltnet.cli.teach import teach
from quiltnet.data import teaching
from quiltnet.data.decoding import decode_pil
from quiltnet.data.manifest import read_manifest, sha256_of
from quiltnet.data.prepared_images import PreparedForm
from quiltnet.data.preparing import plan_preparing, prepare_shards
from quiltnet.data.reading import Source
from quiltnet.data.tar_index import find_index
from quiltnet.data.teacher_features import TEACHER_EXTENSION, parse_features
from quiltnet.data.teaching import stored_teacher, teach_shards
from quiltnet.errors import UserError
from quiltnet.release.exporting import export_open_clip
from tests.data.made_sets import encoded, pair, read_tar, tissue, write_set
from tests.model.towers import tiny_model

FACTS = {"name": "a test", "embed_dim": 4, "logit_scale": 14.0, "sha256": "5ea1"}


class MeanColour:
    """A teacher by which one can tell what was encoded."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.images = 0

    def transform(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image.resize((8, 8))).astype(np.float32) / 255).permute(2, 0, 1)

    def tokenize(self, captions: list[str]) -> Tensor:
        return torch.tensor([[len(caption), ord(caption[0])] for caption in captions])

    def encode_image(self, image: Tensor) -> Tensor:
        self.images += len(image)
        return torch.cat([image.mean((2, 3)), torch.ones(len(image), 1)], dim=1)

    def encode_text(self, text: Tensor) -> Tensor:
        return torch.cat([text, text], dim=1).float()


def sample(number: int, image: bytes | None = None) -> dict[str, bytes | str]:
    captions = [f"{chr(97 + number)}{'x' * n}" for n in range(1 + number % 3)]
    return {**pair(f"tile{number}", image or encoded(tissue(number)), *captions), f"tile{number}.note": "kept"}


@pytest.fixture
def source(tmp_path):
    broken = sample(3, encoded(tissue(3))[:200])
    train = [sample(0) | sample(1) | sample(2), broken | sample(4)]
    return write_set(tmp_path / "source", {"train": train, "val": [sample(5)]})


def run(source, out, teacher=None, **options) -> dict:
    return teach_shards(source, out, teacher or MeanColour(), FACTS, batch_size=2, workers=2, **options)


def test_features_stand_beside_samples_that_are_what_they_were(source, tmp_path):
    out, seen = tmp_path / "out", []
    manifest = run(source, out, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(1, 3, 3), (2, 3, 5), (3, 3, 6)]
    for tar in source.glob("*/*.tar"):
        before, after = read_tar(tar), read_tar(out / tar.relative_to(source))
        assert {name: data for name, data in after.items() if not name.endswith(TEACHER_EXTENSION)} == before
    content = read_tar(out / "train" / "made-000000.tar")
    image, texts = parse_features(content[f"tile2.{TEACHER_EXTENSION}"], 3)
    expected = MeanColour().encode_image(MeanColour().transform(decode_pil(content["tile2.jpg"]))[None])[0]
    np.testing.assert_allclose(image, expected, rtol=1e-3)
    np.testing.assert_array_equal(texts[:, 0], [1, 2, 3])
    assert manifest == read_manifest(out)


def test_the_manifest_says_what_is_there(source, tmp_path):
    out = tmp_path / "out"
    before, after = read_manifest(source), run(source, out)
    assert after["teacher"] == {**FACTS, "without": 1}
    assert after["totals"] == before["totals"] and after["source"] == before["source"]
    for name, split in after["splits"].items():
        assert split["samples"] == before["splits"][name]["samples"]
        for entry in split["shards"]:
            tar = out / entry["path"]
            assert entry["sha256"] == sha256_of(tar) and entry["bytes"] == tar.stat().st_size
            assert find_index(tar) == tar.with_name(f"{tar.name}.index")
    assert not [path for path in out.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]


def test_a_broken_sample_is_copied_without_features(source, tmp_path):
    run(source, tmp_path / "out")
    names = set(read_tar(tmp_path / "out" / "train" / "made-000001.tar"))
    assert "tile3.jpg" in names and f"tile3.{TEACHER_EXTENSION}" not in names
    assert f"tile4.{TEACHER_EXTENSION}" in names


def test_a_stopped_run_goes_on_and_gives_the_same(source, tmp_path, monkeypatch):
    whole = run(source, tmp_path / "whole")
    out, original, written = tmp_path / "out", teaching._teach_shard, []

    def stopping(shard, work):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        return original(shard, work)

    monkeypatch.setattr(teaching, "_teach_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    monkeypatch.setattr(teaching, "_teach_shard", original)
    teacher = MeanColour()
    assert run(source, out, teacher) == whole and teacher.images == 1


def test_taught_again_by_another_its_features_take_the_place_of_the_first(source, tmp_path):
    run(source, tmp_path / "once")
    again = teach_shards(tmp_path / "once", tmp_path / "twice", MeanColour(), {**FACTS, "sha256": "0ther"})
    assert again["teacher"]["sha256"] == "0ther"
    once, twice = (read_tar(tmp_path / name / "val" / "made-000000.tar") for name in ("once", "twice"))
    assert once == twice


def test_what_is_no_whole_set_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="is not a whole shard set with its manifest"):
        run(source / "train", tmp_path / "out")
    with pytest.raises(UserError, match="holds or lies in the source"):
        run(source, source / "train" / "out")
    with open(source / "train" / "made-000000.tar", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match=r"holds 1 whole samples, and its manifest says 3"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_teacher_of_a_set_is_found(source, tmp_path):
    manifest, plain = run(source, tmp_path / "out"), source
    out, taught = tmp_path / "out", manifest["teacher"]
    for spec in (out / "train", [out / "train" / "made-000000.tar"], {"a": Source(out / "train", 2.0)}):
        assert stored_teacher(spec) == taught
    for spec in (f"file://{out}/train", f"file://{out}/train/made-{{000000..000001}}.tar", [f"file://{out}/val"]):
        assert stored_teacher(spec) == taught
    assert stored_teacher(plain / "train") is None
    assert stored_teacher({"a": Source(out / "train"), "b": Source(plain / "train")}) is None
    teach_shards(source, tmp_path / "other", MeanColour(), {**FACTS, "name": "another", "sha256": "0ther"})
    with pytest.raises(UserError, match="features of several teachers, a test and another"):
        stored_teacher([out / "train", tmp_path / "other" / "train"])


def test_the_command(source, tmp_path):
    model = tiny_model()
    export_open_clip(model, tmp_path / "teacher")
    app = typer.Typer()
    app.command()(teach)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [str(source), "--teacher", str(tmp_path / "teacher"), "--out", str(out)])
    assert result.exception is None, result.exception
    assert "5 of 6 samples have features of" in result.output and "objective.teacher=stored" in result.output
    facts = json.loads((out / "manifest.json").read_text())["teacher"]
    assert facts["embed_dim"] == 16 and math.isclose(facts["logit_scale"], 1 / 0.07, rel_tol=1e-5)
    assert len(facts["sha256"]) == len(hashlib.sha256().hexdigest())
    embedder = quiltnet.load(tmp_path / "teacher")
    content = read_tar(out / "train" / "made-000000.tar")
    image, texts = parse_features(content[f"tile1.{TEACHER_EXTENSION}"], 2)
    np.testing.assert_allclose(image, embedder.encode_images([decode_pil(content["tile1.jpg"])])[0], atol=5e-4)
    np.testing.assert_allclose(texts, embedder.encode_text(["b", "bx"]), atol=5e-4)


def test_prepared_shards_keep_the_features(source, tmp_path):
    run(source, tmp_path / "out")
    plan = plan_preparing(tmp_path / "out", tmp_path / "small", PreparedForm(48, 95, False))
    prepare_shards(plan)
    before, after = (read_tar(tmp_path / name / "val" / "made-000000.tar") for name in ("out", "small"))
    assert after[f"tile5.{TEACHER_EXTENSION}"] == before[f"tile5.{TEACHER_EXTENSION}"]
