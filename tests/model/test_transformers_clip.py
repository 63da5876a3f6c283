"""A folder of transformers' CLIPModel gives the features that transformers gives."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from quiltnet.errors import UserError
from quiltnet.model.transformers_clip import is_transformers_clip, load_transformers_clip
from tests.model.transformers_folder import save_clip, small_clip, small_processor, small_tokenizer

CAPTIONS = ["glands of a gland", "fat", "a very long caption of more than twelve tokens"]


def unit(features):
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)


def assert_equal_features(folder, theirs: CLIPModel):
    ours = load_transformers_clip(folder).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    options = {"padding": "max_length", "max_length": 12, "truncation": True, "return_tensors": "pt"}
    tokens = small_tokenizer()(CAPTIONS, **options)
    with torch.no_grad():
        assert (ours.tokenize(CAPTIONS) == tokens.input_ids).all()
        texts, images = unit(theirs.get_text_features(**tokens)), unit(theirs.get_image_features(pixels))
        torch.testing.assert_close(ours.encode_image(pixels), images, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.encode_text(tokens.input_ids), texts, atol=1e-5, rtol=0)
        trimmed, _ = ours.batch_tokenizer()(CAPTIONS[:2])
        torch.testing.assert_close(ours.encode_text(trimmed), texts[:2], atol=1e-5, rtol=0)
    assert ours.logit_scale.item() == pytest.approx(theirs.logit_scale.exp().item())
    assert (texts[0] - texts[1]).abs().max() > 0.02 < (images[0] - images[1]).abs().max(), "they do tell things apart"
    return ours


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_features_are_those_of_transformers(tmp_path, hidden_act):
    theirs = small_clip(hidden_act)
    ours = assert_equal_features(save_clip(theirs, tmp_path), theirs)
    assert ours.description.model_cfg["quick_gelu"] == (hidden_act == "quick_gelu")


def test_the_activations_can_be_told_apart(tmp_path):
    """Otherwise the test above would say nothing of them."""
    theirs = small_clip("gelu")
    save_clip(theirs, tmp_path)
    edit_json(
        tmp_path / "config.json", lambda config: [tower.update(hidden_act="quick_gelu") for tower in towers(config)]
    )
    with pytest.raises(AssertionError):
        assert_equal_features(tmp_path, theirs)


def test_the_end_token_of_old_configurations_means_the_highest_id(tmp_path):
    old = small_clip(eos_token_id=2)  # "c" in the vocabulary, which a caption may contain
    ours = assert_equal_features(save_clip(old, tmp_path), old)
    assert ours.description.model_cfg["text_cfg"]["pool_type"] == "argmax"


def test_another_end_token_is_looked_for_by_its_id(tmp_path):
    """A letter ends a text here: the first such letter counts, not the token of the highest id."""
    theirs = small_clip(eos_token_id=small_tokenizer().convert_tokens_to_ids("a</w>"))
    ours = assert_equal_features(save_clip(theirs, tmp_path), theirs)
    assert ours.description.model_cfg["text_cfg"]["pool_type"] == "eos"


def test_another_epsilon_is_taken_over(tmp_path):
    theirs = small_clip(layer_norm_eps=0.1)
    assert_equal_features(save_clip(theirs, tmp_path), theirs)


def test_weights_in_half_precision_and_old_buffers_are_read(tmp_path):
    save_clip(small_clip(), tmp_path)
    weights = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(weights, tmp_path / "model.safetensors")
    assert_equal_features(tmp_path, CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval())


def test_pickled_weights_are_read_as_tensors_only(tmp_path):
    theirs = small_clip()
    save_clip(theirs, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert_equal_features(tmp_path, theirs)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"logit_scale": Image.new("L", (1, 1))}, protocol=2))
    with pytest.raises(UserError, match=r"pytorch_model.bin cannot be read as weights"):
        load_transformers_clip(tmp_path)


def test_weights_in_several_files_are_read(tmp_path):
    theirs = small_clip()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    small_processor().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_features(tmp_path, theirs)


def test_images_are_prepared_as_the_processor_does(tmp_path):
    """Within what two ways of resizing differ by: transformers resizes tensors, open_clip pictures."""
    ours = load_transformers_clip(save_clip(small_clip(), tmp_path))
    smooth = np.linspace(0, 255, 40 * 64 * 3).reshape(40, 64, 3).astype(np.uint8)
    image = Image.fromarray(smooth)
    expected = small_processor()(images=image, text="", return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ours.transform(image), expected, atol=0.05, rtol=0)
    cfg = ours.description.preprocess_cfg
    assert (cfg["mean"], cfg["std"]) == ((0.7, 0.5, 0.6), (0.2, 0.3, 0.2))
    assert (cfg["size"], cfg["interpolation"], cfg["resize_mode"]) == (32, "bicubic", "shortest")


def test_a_processor_of_today_is_one_file(tmp_path):
    """transformers 5 saves the image processor inside ``processor_config.json``."""
    small_clip().save_pretrained(tmp_path)
    small_processor().save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert load_transformers_clip(tmp_path).description.preprocess_cfg["mean"] == (0.7, 0.5, 0.6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": 32, "crop_size": 32}, {"resize_mode": "shortest"}),  # as older versions wrote them
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, {"resize_mode": "squash"}),
        ({"resample": 2}, {"interpolation": "bilinear"}),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    ],
)
def test_choices_of_the_processor_are_taken_over(tmp_path, change, expected):
    save_clip(small_clip(), tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", lambda stated: stated.update(change))
    cfg = load_transformers_clip(tmp_path).description.preprocess_cfg
    assert {name: cfg[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"size": {"shortest_edge": 40}},
            r"size \{'shortest_edge': 40\}.* images of 32 pixels: resize the shorter side",
        ),
        ({"do_center_crop": False}, "no crop is not what open_clip"),
        ({"do_resize": False}, "is not what open_clip"),
        ({"resample": 0}, "resample must be one of"),
        ({"do_rescale": False}, "divided by 255"),
    ],
)
def test_a_processor_that_open_clip_cannot_imitate_is_refused(tmp_path, change, message):
    save_clip(small_clip(), tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", lambda stated: stated.update(change))
    with pytest.raises(UserError, match=message):
        load_transformers_clip(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "holds no weights; it should contain one of model.safetensors, pytorch_model.bin"),
        ("preprocessor_config.json", "should contain preprocessor_config.json"),
        ("tokenizer.json", "has no tokeniser"),
    ],
)
def test_what_is_missing_is_named(tmp_path, missing, message):
    save_clip(small_clip(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=message):
        load_transformers_clip(tmp_path)


def test_towers_that_open_clip_has_no_equal_for_are_refused(tmp_path):
    save_clip(small_clip(), tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config["text_config"].update(hidden_act="quick_gelu"))
    with pytest.raises(UserError, match="activations gelu and quick_gelu; open_clip has"):
        load_transformers_clip(tmp_path)
    edit_json(
        tmp_path / "config.json", lambda config: config["text_config"].update(hidden_act="gelu", num_hidden_layers=3)
    )
    with pytest.raises(UserError, match=r"transformer.resblocks.2.*only in the model"):
        load_transformers_clip(tmp_path)


def test_only_a_clip_model_is_taken_for_one(tmp_path):
    assert not is_transformers_clip(tmp_path)
    for content in ("{", "[]", '{"architectures": ["BertModel"]}', '{"architectures": null}'):
        (tmp_path / "config.json").write_text(content)
        assert not is_transformers_clip(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    assert is_transformers_clip(tmp_path)


def towers(config):
    return config["text_config"], config["vision_config"]


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
