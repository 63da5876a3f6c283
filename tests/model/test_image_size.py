"""Towers at another image size or context length: position embeddings resized and told, or the size refused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.release.exporting import export_open_clip
from quiltnet.release.hub import load_model
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, tiny_model

RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64, "patch_size": None}
BEIT = {
    "timm_model_name": "beit_base_patch16_224",
    "timm_model_args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    "timm_pool": "",
}
LEVIT = {"timm_model_name": "levit_128s", "timm_pool": "avg", "timm_proj": "linear"}
REGISTERS = {"timm_model_args": {"reg_tokens": 4, "init_values": 1e-5, "no_embed_class": True}}


def build(image, **options):
    torch.manual_seed(0)
    return build_model(image=image, text=TINY_TEXT, embed_dim=16, **options)


@pytest.mark.parametrize("image", [TINY_IMAGE, RESNET, TINY_VIT, {**TINY_VIT, **REGISTERS}], ids=str)
def test_an_earlier_model_starts_at_another_size(tmp_path, caplog, image):
    model = build({**image, "image_size": 64})
    export_open_clip(model, tmp_path / "out")
    larger = load_model(tmp_path / "out", image_size=96, context_length=20).eval()
    assert "position embeddings" in caplog.text and "from 12 to 20 tokens" in caplog.text
    assert larger.image_size == 96 and larger.tokenize(["a"]).shape == (1, 20)
    assert larger.transform.transforms[0].size == 96
    features = larger.encode_image(torch.rand(1, 3, 96, 96))
    assert features.isfinite().all()
    own, found = model.clip.state_dict(), larger.clip.state_dict()
    changed = {name for name in own if own[name].shape != found[name].shape or not torch.equal(own[name], found[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"positional_embedding", "pos_embed"} & {
        name.rpartition(".")[2] for name in own
    }
    assert len(changed) == 2  # of the image, and of the text
    assert export_open_clip(larger, tmp_path / "larger") <= 1e-5


def test_positions_are_resized_as_open_clip_and_timm_resize_them(tmp_path):
    model = tiny_model()
    weights = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    save_file(weights, tmp_path / "native.safetensors")
    larger = tiny_model(image_size=64, pretrained=str(tmp_path / "native.safetensors"), quick_gelu=False)
    resize_pos_embed(weights, larger.clip)
    torch.testing.assert_close(larger.clip.visual.positional_embedding.data, weights["visual.positional_embedding"])

    trunk = timm.create_model("test_vit", num_classes=0)
    save_file(trunk.state_dict(), tmp_path / "timm.safetensors")
    tower = build({**TINY_VIT, "image_size": 96, "pretrained": str(tmp_path / "timm.safetensors")}).clip.visual.trunk
    trunk.set_input_size((96, 96))
    torch.testing.assert_close(tower.pos_embed.data, trunk.pos_embed.data)


def test_relative_positions_are_resized_as_timm_resizes_them(tmp_path, caplog):
    model = build({**BEIT, "image_size": 64})
    table = model.clip.visual.trunk.blocks[0].attn.relative_position_bias_table
    torch.nn.init.normal_(table.data)
    export_open_clip(model, tmp_path / "out")
    larger = load_model(tmp_path / "out", image_size=96).clip.visual.trunk
    assert "are resized to windows of 6 x 6" in caplog.text
    model.clip.visual.trunk.set_input_size((96, 96))
    expected = model.clip.visual.trunk.blocks[0].attn.relative_position_bias_table
    torch.testing.assert_close(larger.blocks[0].attn.relative_position_bias_table, expected)


@pytest.mark.parametrize("name", ["test_maxvit", "test_coatnet"])
def test_windows_and_positions_of_the_image_without_patches(tmp_path, name):
    """Towers of convolutions and attention, which timm builds for images of 160 pixels."""
    model = build({"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 128})
    assert model.encode_image(torch.rand(1, 3, 128, 128)).isfinite().all()
    assert export_open_clip(model, tmp_path / "out") <= 1e-5
    assert load_model(tmp_path / "out").image_size == 128


def test_swins_windows_are_kept_by_an_export_and_a_reload(tmp_path):
    small = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
    swin = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_model_args": small, "timm_pool": "avg"}
    model = build({**swin, "image_size": 128})
    assert [stage.blocks[0].window_size for stage in model.clip.visual.trunk.layers] == [(4, 4), (4, 4)], "7 of 224"
    assert export_open_clip(model, tmp_path / "out") <= 1e-5
    again, image = load_model(tmp_path / "out"), torch.rand(1, 3, 128, 128)
    assert torch.equal(again.eval().encode_image(image), model.eval().encode_image(image))
    assert export_open_clip(load_model(tmp_path / "out", image_size=64), tmp_path / "small") <= 1e-5


def test_timms_own_weights_at_another_size_are_told(monkeypatch, caplog):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    build({**TINY_VIT, "image_size": 96, "pretrained": True})
    assert "position embeddings of timm's weights are resized from 10 x 10 to 6 x 6 patches" in caplog.text


def test_images_need_not_be_square(tmp_path):
    for number, image in enumerate((TINY_IMAGE, TINY_VIT)):
        export_open_clip(build({**image, "image_size": 64}), tmp_path / f"{number}")
        wide = load_model(tmp_path / f"{number}", image_size=[64, 96])
        assert wide.encode_image(torch.rand(1, 3, 64, 96)).isfinite().all()
        assert export_open_clip(wide, tmp_path / f"wide{number}") <= 1e-5


@pytest.mark.parametrize(
    ("image", "image_size", "message"),
    [
        (TINY_IMAGE, 40, "image_size=40 is not divisible by the patch of 16 pixels; the nearest sizes: 32 and 48"),
        (RESNET, 70, "by the patch of 32 pixels; the nearest sizes: 64 and 96"),
        (TINY_VIT, 100, "image_size=100 is not divisible by the patch of 16 pixels; the nearest sizes: 96 and 112"),
        (LEVIT, 256, "does not suit this timm tower .*it is made for 224"),
        ({"timm_model_name": "efficientvit_b0", "timm_pool": "avg"}, None, "open_clip has no use for this timm tower"),
        (TINY_IMAGE, 0, r"must be a side in pixels, such as 224, or \[height, width\]"),
        (TINY_IMAGE, "large", "must be a side in pixels"),
        (TINY_VIT, [64], "must be a side in pixels"),
    ],
    ids=str,
)
def test_a_size_that_does_not_suit_is_refused(image, image_size, message):
    with pytest.raises(UserError, match=message):
        build(image, image_size=image_size)


def test_a_context_of_no_tokens_is_refused():
    with pytest.raises(UserError, match="context_length=2 must be a number of tokens, 3 at least"):
        build(TINY_IMAGE, context_length=2)


def save_timm_folder(folder, **model_args):
    """As timm's ``push_to_hf_hub`` writes one, and as pathology's foundation models lie on the hub."""
    folder.mkdir()
    trunk = timm.create_model("test_vit", num_classes=0, **model_args)
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    save_file(trunk.state_dict(), folder / "model.safetensors")
    cfg = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 96, 96], "num_classes": 0}
    config = {"architecture": "test_vit", "num_classes": 0, "model_args": model_args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return trunk.eval()


def test_a_timm_folder_brings_options_weights_size_and_normalisation(tmp_path):
    trunk = save_timm_folder(tmp_path / "uni", img_size=96, init_values=1e-5, reg_tokens=4)
    model = build({"timm_model_name": f"local-dir:{tmp_path / 'uni'}", "timm_pool": "", "pretrained": True}).eval()
    assert model.image_size == 96
    assert model.description.preprocess_cfg["mean"] == (0.485, 0.456, 0.406)
    image = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(model.clip.visual.trunk(image), trunk(image))
    assert model.description.model_cfg["vision_cfg"]["timm_model_args"] == {"init_values": 1e-5, "reg_tokens": 4}
    # open_clip rebuilds it from the export, also elsewhere.
    assert export_open_clip(model, tmp_path / "out") <= 1e-5
    (tmp_path / "out").rename(tmp_path / "moved")
    again = load_model(tmp_path / "moved").eval()
    torch.testing.assert_close(again.encode_image(image), model.encode_image(image))
    assert again.description.model_cfg["vision_cfg"] == model.description.model_cfg["vision_cfg"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"timm_model_args": {"img_size": 64}}, "say image_size for img_size"),
        ({"timm_model_args": {"registers": 4}}, "registers.* do not suit this timm tower"),
        ({"timm_model_args": {"reg_tokens": 4}, "pretrained": True}, "without timm_model_args; give a path"),
        ({"timm_model_name": "local-dir:/nowhere"}, "no such file or folder"),
        ({"timm_model_name": "hf-hub:some/tower"}, r"some/tower could not be fetched.*local-dir:/path"),
    ],
    ids=str,
)
def test_options_of_timm_that_do_not_suit_are_refused(image, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        build({**TINY_VIT, **image})


def test_a_folder_that_is_not_timms_is_refused(tmp_path):
    image = {"timm_model_name": f"local-dir:{tmp_path}"}
    with pytest.raises(UserError, match="is no description of a timm model"):
        build(image)
    (tmp_path / "config.json").write_text('{"architecture": "vit_of_tomorrow"}')
    with pytest.raises(UserError, match="'vit_of_tomorrow', which this version of timm does not know"):
        build(image)
