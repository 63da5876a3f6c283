"""Exports come back from open_clip and onnxruntime as the model they were made of, or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import quiltnet
from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning
from quiltnet.model.assembly import build_model
from quiltnet.release import exporting, open_clip_export
from quiltnet.release.comparison import Comparison, NotEqual, take_reference
from quiltnet.release.exporting import export_model, export_open_clip
from quiltnet.release.hub import Embedder
from quiltnet.release.open_clip_export import name_repository
from tests.model.towers import TINY_TEXT, TINY_VIT, bert_folder, tiny_model

CAPTIONS = ["fatty tissue of a gland", "glands"]


def timm_and_bert(folder):
    text = {"hf_model_name": str(bert_folder(folder)), "hf_pooler_type": "mean_pooler", "context_length": 20}
    return build_model(image=TINY_VIT, text=text, embed_dim=16)


def model_of(kind, folder):
    if kind == "timm + bert":
        return timm_and_bert(folder)
    if kind == "quickgelu":
        return build_model("ViT-S-32-alt", quick_gelu=True, context_length=16)
    if kind == "cnn":
        cnn = {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 48}
        return build_model(image=cnn, text=TINY_TEXT, embed_dim=16, mean=[0.7, 0.6, 0.7])
    return tiny_model()


@pytest.mark.parametrize("kind", ["native", "quickgelu", "timm + bert", "cnn"])
def test_open_clip_loads_what_quiltnet_exports(tmp_path, kind):
    model, out = model_of(kind, tmp_path), tmp_path / "out"
    assert export_open_clip(model, out) <= 1e-5
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors", ".txt", ".jinja"}, "no pickle"
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs.eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    ours = quiltnet.load(out)
    with torch.no_grad():
        expected = theirs.encode_image(transform(image)[None], normalize=True)
        torch.testing.assert_close(ours.encode_images([image]), expected, atol=1e-5, rtol=0)
        expected = theirs.encode_text(tokenize(CAPTIONS), normalize=True)
        torch.testing.assert_close(ours.encode_text(CAPTIONS), expected, atol=1e-5, rtol=0)
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == list(model.description.preprocess_cfg["mean"])
    assert config["model_cfg"].get("quick_gelu", False) == (kind == "quickgelu")


def test_a_moved_folder_still_loads(tmp_path):
    model = timm_and_bert(tmp_path)
    export_open_clip(model, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "bert")
    moved = quiltnet.load(tmp_path / "elsewhere")
    torch.testing.assert_close(moved.encode_text(CAPTIONS), Embedder(model).encode_text(CAPTIONS))
    name_repository(tmp_path / "elsewhere", "some/model")
    written = (tmp_path / "elsewhere/open_clip_config.json").read_text()
    assert str(tmp_path) not in written, "paths of this machine stay here"
    assert json.loads(written)["model_cfg"]["text_cfg"]["hf_model_name"] == "some/model"
    torch.testing.assert_close(quiltnet.load(tmp_path / "elsewhere").encode_text(CAPTIONS), moved.encode_text(CAPTIONS))


def test_an_export_that_does_not_come_back_equal_is_not_written(tmp_path, monkeypatch):
    wrong = [Comparison("open_clip", 1e-3, 1e-4, "embeddings")]
    monkeypatch.setattr(exporting, "compare_with_open_clip", lambda *_: wrong)
    with pytest.raises(NotEqual, match=r"embeddings differ by 1.0e-03, limit 1e-04"):
        export_open_clip(tiny_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert not Comparison("open_clip", float("nan"), 1e-4, "embeddings").passed


def test_weights_that_were_changed_on_the_way_are_noticed(tmp_path, monkeypatch):
    save_file = open_clip_export.save_file

    def save_another_projection(weights, path, metadata):
        save_file({**weights, "visual.proj": weights["visual.proj"].flip(0)}, path, metadata)

    monkeypatch.setattr(open_clip_export, "save_file", save_another_projection)
    with pytest.raises(NotEqual, match="open_clip makes something else of the export"):
        export_open_clip(tiny_model(), tmp_path / "out")

    def save_another_scale(weights, path, metadata):
        save_file({**weights, "logit_scale": weights["logit_scale"] * 2}, path, metadata)

    monkeypatch.setattr(open_clip_export, "save_file", save_another_scale)
    with pytest.raises(NotEqual, match="has the logit_scale"):
        export_open_clip(tiny_model(), tmp_path / "out")


@pytest.mark.parametrize("tower", ["visual.proj", "text_projection"])
def test_weights_that_are_no_numbers_are_not_exported(tmp_path, tower):
    model = tiny_model()
    with torch.no_grad():
        model.clip.get_parameter(tower)[0, 0] = torch.nan
    with pytest.raises(UserError, match="features are not finite numbers"):
        export_open_clip(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_features_that_are_lost_in_one_tower_alone_do_not_pass():
    reference = take_reference(tiny_model())
    image, text = reference.image_features, reference.text_features
    for features in ((image, torch.full_like(text, torch.nan)), (torch.full_like(image, torch.nan), text)):
        assert not Comparison("nobody", reference.features_difference(*features), 1, "embeddings").passed


def test_an_export_is_for_whoever_may_read_its_folder(tmp_path):
    before = os.umask(0o027)
    try:
        export_model(tiny_model(), tmp_path / "out", formats=["open_clip", "transformers"])
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {"0o640"}, modes


def test_what_exists_is_replaced_only_by_a_whole_export_and_when_asked(tmp_path):
    out = tmp_path / "out"
    export_model(tiny_model(), out, finish=lambda folder, _: (folder / "README.md").write_text("first"))
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        export_open_clip(tiny_model(), out)

    def fail(folder, comparisons):
        assert out.joinpath("README.md").read_text() == "first"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_model(tiny_model(), out, overwrite=True, finish=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "README.md").read_text() == "first"
    export_model(tiny_model(), out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "README.md").exists()
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UserError, match="is no export, and is not overwritten"):
        export_model(tiny_model(), tmp_path / "thesis", overwrite=True)


def test_a_tower_that_open_clip_cannot_rebuild_is_refused(tmp_path, monkeypatch):
    def refuse(name):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", refuse)
    with pytest.raises(UserError, match=r"open_clip cannot load this model back \(size mismatch\)"):
        export_open_clip(tiny_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_half_is_stored_as_float16_and_says_how_far_that_moves(tmp_path):
    model = tiny_model()
    before = model.weights_sha256()
    rounding, *loaded = export_model(model, tmp_path / "out", formats=["open_clip", "transformers"], half=True)
    assert model.weights_sha256() == before, "the model itself is left as it is"
    assert 1e-5 < rounding.difference < 1e-2
    assert {(comparison.library, comparison.limit) for comparison in loaded if comparison.what == "embeddings"} == {
        ("open_clip", 1e-4),  # which computes in float32 with the rounded weights
        ("transformers", 1e-2),  # which computes in float16
    }
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / name).values()} == {torch.float16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    with torch.no_grad():
        model.clip.token_embedding.weight[7] = 1e6
    with pytest.raises(UserError, match=r"--half: token_embedding.weight has values beyond 65504"):
        export_model(model, tmp_path / "large", half=True)


def test_onnx_graphs_take_any_batch_and_shorter_texts(tmp_path):
    """Of a model with adapters: they are merged."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny_model(init_logit_bias=-10)
    apply_tuning(model, Tuning(image="lora", text="frozen"))
    for name, parameter in model.clip.named_parameters():
        if "lora_B" in name:  # zeros at the start
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(0))
    (comparison,) = export_model(model, tmp_path / "out", formats=["onnx"])
    assert comparison.library == "onnxruntime"
    assert comparison.difference <= 1e-4
    onnx = tmp_path / "out/onnx"
    assert {path.name for path in onnx.iterdir()} == {"image_encoder.onnx", "inputs.json", "text_encoder.onnx"}
    inputs = json.loads((onnx / "inputs.json").read_text())
    assert inputs["image"]["mean"] == list(model.description.preprocess_cfg["mean"])
    assert inputs["logit_scale"] == pytest.approx(model.logit_scale.item())
    assert (inputs["logit_bias"], inputs["text"]["may_be_shorter"]) == (-10, True)
    image = torch.rand(7, 3, 32, 32)
    session = onnxruntime.InferenceSession(onnx / "image_encoder.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["inputs"]) == inputs
    features = torch.from_numpy(session.run(["image_features"], {"image": image.numpy()})[0])
    torch.testing.assert_close(features, model.eval().encode_image(image).detach(), atol=1e-4, rtol=0)
    session = onnxruntime.InferenceSession(onnx / "text_encoder.onnx")
    text = model.tokenize(CAPTIONS)
    for length in (7, 12):
        features = torch.from_numpy(session.run(["text_features"], {"text": text[:, :length].numpy()})[0])
        torch.testing.assert_close(features, model.encode_text(text).detach(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_onnx_graphs_of_timm_and_bert(tmp_path):
    pytest.importorskip("onnxruntime")
    model = timm_and_bert(tmp_path)
    compared = export_model(model, tmp_path / "out", formats=["open_clip", "onnx"])
    assert [comparison.library for comparison in compared] == ["open_clip", "onnxruntime"]
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_formats_that_are_not_possible_are_said_first(tmp_path, monkeypatch):
    for formats in ([], ["open_clip", "keras"]):
        with pytest.raises(UserError, match="choose of open_clip, transformers, onnx"):
            export_model(tiny_model(), tmp_path / "out", formats=formats)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(UserError, match=r"needs onnxscript, which is not installed: pip install 'quiltnet\[onnx\]'"):
        export_model(tiny_model(), tmp_path / "out", formats=["onnx"])
    assert not list(tmp_path.iterdir())
