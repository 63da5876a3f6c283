"""Exported folders are what open_clip and quiltnet.load make of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import quiltnet
from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.release import hub
from quiltnet.release.hub import export_open_clip
from tests.model.towers import TINY_TEXT, TINY_VIT, bert_folder, tiny_model
from tests.model.transformers_folder import save_clip, small_clip

CAPTIONS = ["fatty tissue of a gland", "glands"]


def models(tmp_path):
    timm_bert = build_model(
        image=TINY_VIT,
        text={"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "mean_pooler", "context_length": 20},
        embed_dim=16,
    )
    cnn = {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 48}
    return {
        "native": tiny_model(),
        "quickgelu": build_model("ViT-S-32-alt", quick_gelu=True, context_length=16),
        "timm + bert": timm_bert,
        "cnn": build_model(image=cnn, text=TINY_TEXT, embed_dim=16, mean=[0.7, 0.6, 0.7]),
    }


@pytest.mark.parametrize("kind", ["native", "quickgelu", "timm + bert", "cnn"])
def test_open_clip_loads_what_quiltnet_exports(tmp_path, kind):
    model, out = models(tmp_path)[kind], tmp_path / "out"
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
    model = models(tmp_path)["timm + bert"]
    export_open_clip(model, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "bert")
    moved = quiltnet.load(tmp_path / "elsewhere")
    torch.testing.assert_close(moved.encode_text(CAPTIONS), hub.Embedder(model).encode_text(CAPTIONS))


def test_a_folder_of_transformers_loads_and_is_exported(tmp_path):
    folder = save_clip(small_clip(), tmp_path / "clip")
    ours = quiltnet.load(folder)
    assert export_open_clip(ours.model, tmp_path / "out") <= 1e-5
    shutil.rmtree(folder)
    torch.testing.assert_close(quiltnet.load(tmp_path / "out").encode_text(CAPTIONS), ours.encode_text(CAPTIONS))


@pytest.mark.parametrize("layout", ["transformers", "open_clip", "both"])
def test_the_hub_may_hold_either_layout(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(hub, "snapshot_download", lambda repository: str(tmp_path / repository))
    if layout != "open_clip":
        save_clip(small_clip(), tmp_path / "some/model")
    if layout != "transformers":
        export_open_clip(tiny_model(), tmp_path / "export")
        shutil.copytree(tmp_path / "export", tmp_path / "some/model", dirs_exist_ok=True)
    assert hub.load_model("hub:some/model").image_size == 32
    width = hub.load_model("hub:some/model").description.model_cfg["vision_cfg"]["width"]
    assert width == (48 if layout == "transformers" else 32), "open_clip's layout is the more exact one"


def test_a_repository_of_neither_layout_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda repository: str(tmp_path))
    with pytest.raises(UserError, match=r"hub:some/model is no model: .*names CLIPModel"):
        hub.load_model("hub:some/model")


def test_an_export_that_does_not_come_back_equal_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "compare_with_open_clip", lambda *_: 1e-3)
    with pytest.raises(RuntimeError, match=r"differ by 1.0e-03"):
        export_open_clip(tiny_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export_open_clip(tiny_model(), tmp_path)


def test_a_tower_that_open_clip_cannot_rebuild_is_refused(tmp_path):
    model = build_model(image=TINY_VIT, text=TINY_TEXT, embed_dim=16, image_size=64)
    with pytest.raises(UserError, match="at its own image size only"):
        export_open_clip(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_features_are_the_same_whatever_the_batches():
    embedder = hub.Embedder(tiny_model(), batch_size=2)
    images = [Image.new("L", (40 + i, 60), i * 40) for i in range(5)]
    one_by_one = torch.cat([embedder.encode_images([image]) for image in images])
    torch.testing.assert_close(embedder.encode_images(images), one_by_one)
    assert embedder.encode_images(images).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "is no model: give a run directory"),
        ("hub:some/model", r"the model some/model could not be fetched.*give a local folder"),
        ("ViT-B-99:openai", "unknown architecture"),
    ],
)
def test_what_is_no_model_is_said_with_what_would_be(source, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        quiltnet.load(source)
