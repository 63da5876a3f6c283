"""Backbones by family, at a small size: SigLIP by open_clip's name, DINO and foundation towers by timm's."""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.release.exporting import export_open_clip
from quiltnet.release.hub import load_model
from tests.conftest import ROOT
from tests.model.towers import TINY_TEXT, bert_folder

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
# ViT-B-16-SigLIP2 as open_clip has it, but for its sizes.
SIGLIP2 = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 12, "vocab_size": 11, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 64, "heads": 1, "layers": 2, "no_causal_mask": True,
        "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
    },
}  # fmt: skip


@pytest.fixture
def siglip(tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: deepcopy(SIGLIP2))
    return {"architecture": "ViT-B-16-SigLIP2", "tokenizer": str(bert_folder(tmp_path))}


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_towers_of_the_dino_family(tmp_path, name):
    patch = 16 if name.endswith("dinov3") else 14
    image = {"timm_model_name": name, "timm_model_args": SMALL, "timm_pool": "", "image_size": 4 * patch}
    torch.manual_seed(0)
    model = build_model(image=image, text=TINY_TEXT, embed_dim=16)
    assert len(model.tower_blocks()["image"]) == 2
    layers = model.parameter_layers()
    assert {layer for tower, layer, _ in layers.values() if tower == "image"} == {0, 1, 2, 3}
    assert layers["clip.visual.head.proj.weight"][1] == 3
    assert layers["clip.visual.trunk.patch_embed.proj.weight"][1] == 0
    assert export_open_clip(model, tmp_path / "out") <= 1e-5
    larger = load_model(tmp_path / "out", image_size=6 * patch)
    assert larger.encode_image(torch.rand(1, 3, 6 * patch, 6 * patch)).isfinite().all()


def test_siglip_by_its_name(tmp_path, siglip):
    model = build_model(**siglip)
    assert model.logit_bias.item() == -10
    assert {tower: len(blocks) for tower, blocks in model.tower_blocks().items()} == {"image": 6, "text": 2}
    text = model.tokenize(["Fatty tissue!", "gland"])
    assert model.batch_tokenizer().lengths == [12], "it pools at the last place, so padding belongs to the text"
    assert export_open_clip(model, tmp_path / "out") <= 1e-5
    again = load_model(tmp_path / "out").eval()
    torch.testing.assert_close(again.encode_text(text), model.eval().encode_text(text))

    save_file(model.clip.state_dict(), tmp_path / "weights.safetensors")
    larger = build_model(**siglip, pretrained=str(tmp_path / "weights.safetensors"), image_size=192)
    assert larger.clip.visual.trunk.pos_embed.shape[1] == 12 * 12 + 1  # test_vit's class token too
    assert larger.encode_image(torch.rand(1, 3, 192, 192)).shape == (1, 64)
    assert export_open_clip(larger, tmp_path / "larger") <= 1e-5


def test_siglip_without_a_network_asks_for_its_tokeniser(siglip):
    with pytest.raises(UserError, match=r"tokeniser of ViT-B-16-SigLIP2 .*model.tokenizer=/path/to/folder"):
        build_model(siglip["architecture"])
    with pytest.raises(UserError, match="no such file or folder"):
        build_model(siglip["architecture"], tokenizer="/nowhere")


@pytest.mark.parametrize("name", ["dinov2-pubmedbert", "uni-pubmedbert"])
def test_configurations_of_foundation_towers(tmp_path, name):
    """Built with fewer and narrower layers; the weights are those of a tower of the same options."""
    cfg = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/model/{name}.yaml"))
    cfg["image"]["timm_model_args"] = {**cfg["image"].get("timm_model_args", {}), **SMALL}
    cfg["image"]["pretrained"] = False
    cfg["text"].update(hf_model_name=str(bert_folder(tmp_path)), context_length=20, pretrained=False)
    model = instantiate(cfg, _convert_="all")
    assert model.image_size == 224
    assert model.description.preprocess_cfg["mean"] == (0.485, 0.456, 0.406)
    trunk = model.clip.visual.trunk
    assert hasattr(trunk.blocks[0].ls1, "gamma"), "both are trained with layer scale"
    assert model.encode_image(torch.rand(1, 3, 224, 224)).shape == (1, 512)
