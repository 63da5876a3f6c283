"""Blocks and layers of towers of every kind."""

from __future__ import annotations

import re
from typing import Any

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import nn
from transformers import MT5Config

from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning
from quiltnet.model.assembly import build_model
from quiltnet.model.tower_blocks import parameter_layers, projection_names, tower_blocks, towers
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, bert_folder, tiny_model
from tests.model.tuned import KINDS, model_of

# Image tower -> blocks, and names of parameters of its embeddings and its head.
NATIVE = {
    "ViT-B-32": (12, ["conv1.weight", "class_embedding", "ln_pre.bias"], ["ln_post.weight", "proj"]),
    "RN50": (16, ["conv1.weight", "bn3.weight"], ["attnpool.positional_embedding", "attnpool.c_proj.bias"]),
}
TIMM = {
    "test_vit": (6, ["patch_embed.proj.weight", "pos_embed", "cls_token"], ["norm.weight"]),
    "tf_efficientnet_lite0": (16, ["conv_stem.weight", "bn1.bias"], ["conv_head.weight", "bn2.bias"]),
    "convnext_atto": (12, ["stem.0.weight"], ["head.norm.weight"]),
    "swin_tiny_patch4_window7_224": (12, ["patch_embed.proj.weight"], ["norm.weight"]),
    "resnet18": (8, ["conv1.weight"], []),
    "vit_base_patch16_siglip_224": (12, ["pos_embed"], ["norm.weight", "attn_pool.latent"]),
}


def native(name: str) -> nn.Module:
    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config(name))


def timm(name: str, **options: str) -> nn.Module:
    """That tower beside a native text tower of its own class."""
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    if not name.startswith(("vit", "test_vit")):
        vision["timm_pool"] = "avg"
    vision |= options
    with torch.device("meta"):
        return open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=TINY_TEXT)


def check_layers(clip: nn.Module, tower: str, prefix: str, early: list[str], late: list[str]) -> None:
    """Every parameter has a layer and every layer a parameter; blocks follow one another between the two ends."""
    layers, blocks = parameter_layers(clip), tower_blocks(clip)[tower]
    assert set(layers) == {f"clip.{name}" for name, _ in clip.named_parameters()}
    assert layers["clip.logit_scale"] == ("", 0, 0)
    head = len(blocks) + 1
    of_tower = {name: layer for name, (kind, layer, _) in layers.items() if kind == tower}
    assert {last for kind, _, last in layers.values() if kind == tower} == {head}
    assert set(of_tower.values()) == set(range(head + 1))
    names = {id(parameter): f"clip.{name}" for name, parameter in clip.named_parameters()}
    for depth, block in enumerate(blocks, start=1):
        assert {of_tower[names[id(parameter)]] for parameter in block.parameters()} == {depth}
    assert {of_tower[f"clip.{prefix}{name}"] for name in early} == {0}
    assert {of_tower[f"clip.{prefix}{name}"] for name in late} <= {head}


@pytest.mark.parametrize("name", NATIVE)
def test_native_image_towers(name):
    clip = native(name)
    blocks, early, late = NATIVE[name]
    assert len(tower_blocks(clip)["image"]) == blocks
    check_layers(clip, "image", "visual.", early, late)


@pytest.mark.parametrize("name", TIMM)
def test_timm_image_towers(name):
    clip = timm(name)
    blocks, early, late = TIMM[name]
    assert len(tower_blocks(clip)["image"]) == blocks
    check_layers(clip, "image", "visual.trunk.", early, late)
    assert parameter_layers(clip)["clip.visual.head.proj.weight"] == ("image", blocks + 1, blocks + 1)


def test_a_downsampling_is_of_the_block_behind_it():
    layers = parameter_layers(timm("convnext_atto"))
    stage = "clip.visual.trunk.stages.1"
    assert layers[f"{stage}.downsample.1.weight"] == layers[f"{stage}.blocks.0.conv_dw.weight"]


def test_native_text_towers():
    early, late = ["token_embedding.weight", "positional_embedding"], ["ln_final.weight", "text_projection"]
    check_layers(native("ViT-B-32"), "text", "", early, late)
    check_layers(timm("test_vit"), "text", "text.", early, late)


def test_hugging_face_text_towers(tmp_path):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "cls_pooler", "context_length": 20}
    clip = build_model(image=TINY_VIT, text={**text, "hf_proj_type": "mlp"}, embed_dim=16).clip
    early = ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "embeddings.LayerNorm.bias"]
    check_layers(clip, "text", "text.transformer.", early, ["pooler.dense.weight"])
    assert parameter_layers(clip)["clip.text.proj.0.weight"] == ("text", 2, 2)
    # One block, with a longer list of modules inside it.
    MT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    clip.text = HFTextEncoder(str(tmp_path / "t5"), 16, pooler_type="mean_pooler", proj_type="linear", pretrained=False)
    check_layers(clip, "text", "text.", ["transformer.embed_tokens.weight"], ["transformer.final_layer_norm.weight"])


@pytest.mark.parametrize("kind", ["native", "vit and bert", "resnet", "efficientnet"])
def test_blocks_are_called_one_after_another(kind, tmp_path):
    """As modules, once each and in this order: what sharding and checkpointing hang on."""
    text: dict[str, Any] = TINY_TEXT
    size, image = 32, TINY_IMAGE
    if kind != "native":
        size = 160 if kind == "vit and bert" else 32
        name = {"vit and bert": "test_vit", "resnet": "test_resnet", "efficientnet": "tf_efficientnet_lite0"}[kind]
        pool = "" if kind == "vit and bert" else "avg"
        image = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": size}
    if kind == "vit and bert":
        text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "mean_pooler", "context_length": 12}
    model = build_model(image=image, text=text, embed_dim=16).eval()
    called: list[nn.Module] = []
    for blocks in model.tower_blocks().values():
        for block in blocks:
            block.register_forward_hook(lambda module, *_: called.append(module))
    model(torch.zeros(1, 3, size, size), torch.ones(1, 12, dtype=torch.int64))
    assert called == [block for blocks in model.tower_blocks().values() for block in blocks]


@pytest.mark.parametrize(
    ("clip", "image", "text"),
    [
        (lambda: native("ViT-B-32"), {"proj"}, {"text_projection"}),
        (lambda: native("RN50"), {"attnpool.c_proj.weight", "attnpool.c_proj.bias"}, {"text_projection"}),
        (lambda: timm("convnext_atto"), {"head.proj.weight"}, {"text_projection"}),
        (lambda: timm("resnet18", timm_proj=""), {"trunk.fc.weight", "trunk.fc.bias"}, {"text_projection"}),
        (lambda: timm("resnet18", timm_proj="none"), set(), {"text_projection"}),
    ],
)
def test_projections(clip, image, text):
    found = towers(clip())
    assert projection_names(found["image"]) == image and projection_names(found["text"]) == text


def test_adapters_are_of_the_layer_they_are_in(tmp_path):
    for kind in KINDS:
        model = model_of(kind, tmp_path)
        plain = model.parameter_layers()
        apply_tuning(model, Tuning(image="lora", text="lora"))
        found = model.parameter_layers()
        of_weight = {name.replace(".base_layer", ""): place for name, place in found.items() if ".lora_" not in name}
        assert of_weight == plain
        for name, place in found.items():
            weight = re.sub(r"\.lora_[AB]\.default", "", name).replace(".base_layer", "")
            assert place == plain.get(weight, plain.get(weight.replace("attn.weight", "attn.in_proj_weight")))


def test_a_tower_without_recognisable_blocks_is_named():
    clip = tiny_model().clip
    with torch.device("meta"):
        clip.visual = TimmModel("inception_v3", 16, pool="avg")
    with pytest.raises(UserError, match=r"the image tower .InceptionV3. has no repeated blocks"):
        tower_blocks(clip)
    layers = parameter_layers(clip)
    assert {place for place in layers.values() if place[0] == "image"} == {("image", 0, 0)}
    assert {last for kind, _, last in layers.values() if kind == "text"} == {2}
