"""What transformers makes of an export: the same pixels, tokens and embeddings, or a refusal that says why."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPModel, CLIPProcessor

import quiltnet
from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.transformers_weights import open_clip_weights, transformers_weights
from quiltnet.release.comparison import CAPTIONS
from quiltnet.release.exporting import export_model
from quiltnet.release.hub import load_model
from tests.model.towers import TINY_VIT, bert_folder
from tests.model.transformers_folder import save_clip, small_clip

VISION = {"image_size": 48, "patch_size": 16, "width": 32, "head_width": 8, "layers": 2, "mlp_ratio": 3.0}
TEXT = {"context_length": 20, "width": 24, "heads": 3, "layers": 2}


def native_model(quick_gelu=False, **options):
    """No two parameters alike; sizes that tell each field of the configuration from the others."""
    torch.manual_seed(0)
    options = {"text": TEXT, "mean": [0.7, 0.5, 0.6], "std": [0.2, 0.3, 0.25], **options}
    model = build_model(image=VISION, embed_dim=40, quick_gelu=quick_gelu, **options)
    with torch.no_grad():
        for parameter in model.clip.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def exported(request, tmp_path_factory):
    model = native_model(request.param == "quick_gelu")
    out = tmp_path_factory.mktemp("exported") / "out"
    compared = export_model(model, out, formats=["transformers", "open_clip"])
    return model, out, compared


@torch.no_grad()
def test_clip_model_gives_the_same_embeddings(exported):
    model, out, compared = exported
    theirs = CLIPModel.from_pretrained(out).eval()
    processor = CLIPProcessor.from_pretrained(out, backend="pil")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 96, 3), dtype=np.uint8))
    inputs = processor(text=list(CAPTIONS), images=image, padding=True, truncation=True, return_tensors="pt")
    pixels = model.transform(image)[None]
    assert_close(inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
    output = theirs(**inputs)
    text = model.tokenize(CAPTIONS)
    assert_close(output.image_embeds, model.encode_image(pixels), atol=1e-5, rtol=0)
    assert_close(output.text_embeds, model.encode_text(text), atol=1e-5, rtol=0)
    expected = model.logit_scale * model.encode_image(pixels) @ model.encode_text(text).T
    assert_close(output.logits_per_image, expected, atol=1e-3, rtol=0)
    kept = inputs["attention_mask"].bool()
    for ours, ids, mask in zip(text, inputs["input_ids"], kept, strict=True):
        assert ours[: int(mask.sum())].tolist() == ids[mask].tolist()
    assert {comparison.library for comparison in compared} == {"open_clip", "transformers"}
    assert all(comparison.passed for comparison in compared)


def test_the_published_files_are_there_and_no_others(exported):
    model, out, _ = exported
    assert {path.name for path in out.iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "config.json", "model.safetensors",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "quiltnet_export.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    activation = "quick_gelu" if model.description.model_cfg["quick_gelu"] else "gelu"
    assert config["architectures"] == ["CLIPModel"]
    assert {config[tower]["hidden_act"] for tower in ("text_config", "vision_config")} == {activation}
    assert (config["text_config"]["eos_token_id"], config["text_config"]["max_position_embeddings"]) == (49407, 20)
    assert (config["vision_config"]["patch_size"], config["vision_config"]["intermediate_size"]) == (16, 96)


def test_quiltnet_loads_either_half_of_the_folder(exported, tmp_path):
    model, out, _ = exported
    image = Image.new("RGB", (60, 50), "pink")
    expected = quiltnet.load(out).encode_images([image])  # open_clip's, of the two
    for path in out.iterdir():
        if not path.name.startswith("open_clip"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    alone = quiltnet.load(tmp_path)
    assert_close(alone.encode_images([image]), expected, atol=1e-6, rtol=0)
    assert_close(alone.encode_text(CAPTIONS), quiltnet.load(out).encode_text(CAPTIONS), atol=1e-6, rtol=0)
    assert alone.model.description.preprocess_cfg["mean"] == model.description.preprocess_cfg["mean"]
    weights = alone.model.clip.state_dict()
    assert_close(weights, model.clip.state_dict(), rtol=0, atol=0)


def test_pixels_are_identical_but_where_the_two_crops_round_apart(exported):
    """torchvision rounds half a pixel to the even number, transformers down."""
    model, out, _ = exported
    process = CLIPProcessor.from_pretrained(out, backend="pil").image_processor
    draw = np.random.default_rng(0)
    for surplus in range(8):
        image = Image.fromarray(draw.integers(0, 256, (48, 48 + surplus, 3), dtype=np.uint8))
        ours, theirs = model.transform(image), process(image, return_tensors="pt")["pixel_values"][0]
        if surplus % 4 == 3:
            ours, theirs = ours[..., :-1], theirs[..., 1:]
        assert_close(ours, theirs, atol=1e-6, rtol=0, msg=f"{surplus} pixels more")


def test_names_of_tensors_go_both_ways():
    weights = dict(small_clip().state_dict())
    again = transformers_weights(open_clip_weights(weights))
    assert list(sorted(again)) == sorted(weights)
    assert_close(again, weights, rtol=0, atol=0)


@pytest.mark.parametrize("eos_token_id", [None, 2])
def test_a_model_of_transformers_comes_back(tmp_path, eos_token_id):
    """With a tokeniser of its own and pooling at its end token; 2 is the old name of the highest id."""
    folder = save_clip(small_clip(eos_token_id=eos_token_id), tmp_path / "clip")
    export_model(load_model(folder), tmp_path / "out", formats=["transformers"])
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after["text_config"]["eos_token_id"] == 55, "the tokeniser's own, which is its highest id"
    expected = CLIPModel.from_pretrained(folder).state_dict()
    assert_close(CLIPModel.from_pretrained(tmp_path / "out").state_dict(), expected, rtol=0, atol=0)


def test_a_bias_of_siglips_loss_travels_in_the_configuration(tmp_path):
    model = native_model(init_logit_bias=-10)
    export_model(model, tmp_path / "out", formats=["transformers"])
    assert load_model(tmp_path / "out").logit_bias.item() == pytest.approx(model.logit_bias.item())


def test_squashed_and_bilinear_images(tmp_path):
    model = native_model()
    model.description.preprocess_cfg.update(resize_mode="squash", interpolation="bilinear")
    model = type(model)(model.clip, model.description, model.tokenize)
    export_model(model, tmp_path / "out", formats=["transformers"])
    config = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (config["size"], config["do_center_crop"], config["resample"]) == ({"height": 48, "width": 48}, False, 2)


def test_what_is_no_clip_model_is_refused_with_all_reasons(tmp_path):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "cls_pooler", "context_length": 20}
    refused = {
        "image tower is timm's test_vit; its text tower is the Hugging Face model": build_model(
            image=TINY_VIT, text=text, embed_dim=16
        ),
        "its image tower is a ResNet": tiny_model_with(image={"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}),
        "pools by last, not at the end token": tiny_model_with(text={**TEXT, "pool_type": "last"}),
        "text_cfg.no_causal_mask=True has no place there": tiny_model_with(text={**TEXT, "no_causal_mask": True}),
        "CLIPTokenizer does not have": tiny_model_with(text={**TEXT, "tokenizer_kwargs": {"clean": "whitespace"}}),
    }
    for reason, model in refused.items():
        with pytest.raises(UserError, match=f"is no CLIPModel, since .*{reason}.*--format open_clip or --format onnx"):
            export_model(model, tmp_path / "out", formats=["open_clip", "transformers"])
    assert not (tmp_path / "out").exists()


def tiny_model_with(**towers):
    return build_model(**{"image": VISION, "text": TEXT, "embed_dim": 16, **towers})
