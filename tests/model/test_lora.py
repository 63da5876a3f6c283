"""Adapters train exactly, change nothing of the weights they are added to, and merge into them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning, has_lora, merge_lora, read_adapters, save_adapters
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.lora import Lora, add_lora
from quiltnet.training.gradcache import cached_backward
from quiltnet.training.placement import Placement
from tests.model.tuned import KINDS, contrast, gradients, model_of, pairs_for, start, take_steps

BOTH = Tuning(image="lora", text="lora")


def trained_model(kind: str, folder: Path, tuning: Tuning = BOTH, steps: int = 2) -> ContrastiveModel:
    """After two steps B is no longer zero and A has moved."""
    model = model_of(kind, folder)
    torch.manual_seed(1)
    apply_tuning(model, tuning)
    take_steps(model, steps)
    return model.eval()


def features(model: ContrastiveModel) -> Tensor:
    batch = pairs_for(model, seed=9)
    with torch.no_grad():
        return torch.cat(model(batch.image, batch.text)[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind, tmp_path):
    plain = model_of(kind, tmp_path)
    model = trained_model(kind, tmp_path)
    merged = merge_lora(model)
    assert has_lora(model) and not has_lora(merged)
    torch.testing.assert_close(features(merged), features(model), rtol=0, atol=1e-5)
    assert (features(merged) - features(plain.eval())).abs().max() > 0.01
    shapes = {name: tensor.shape for name, tensor in plain.clip.state_dict().items()}
    assert {name: tensor.shape for name, tensor in merged.clip.state_dict().items()} == shapes
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_open_in_a_new_model(kind, tmp_path):
    targets = {"native": ["c_fc", "1.attn"], "timm vit and bert": ["qkv"], "timm cnn": ["conv_pwl"]}[kind]
    tuning = Tuning(image="lora", image_lora_targets=targets, lora_rank=3, lora_alpha=5.0, lora_dropout=0.25)
    model = trained_model(kind, tmp_path, tuning)
    save_adapters(model, tmp_path)
    again = model_of(kind, tmp_path)
    apply_tuning(again, read_adapters(tmp_path))
    again.clip.load_state_dict(model.clip.state_dict())  # strictly
    assert torch.equal(features(again.eval()), features(model))


def test_only_a_model_with_adapters_writes_them(tmp_path):
    save_adapters(model_of("native", tmp_path), tmp_path)
    assert not list(tmp_path.iterdir()) and read_adapters(tmp_path) is None
    (tmp_path / "adapters.json").write_text('{"ranks": 8}')
    with pytest.raises(UserError, match=r"adapters.json does not say what adapters the model has"):
        read_adapters(tmp_path)


def test_adapters_of_attention_by_definition():
    """Values and gradients, against the attention of explicitly added weights; L below E, under a causal mask."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).double()
    x, mask = torch.randn(3, 5, 16).double(), torch.full((5, 5), -torch.inf).triu(1).double()
    tower = nn.Sequential()
    tower.text_projection = None
    tower.attn = attention
    original = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    add_lora(tower, Lora(2, 6.0, 0.0), ["attn"])
    tower.double()  # peft draws float32
    factors = {name: p for name, p in tower.attn.named_parameters() if ".lora_" in f".{name}"}
    assert len(factors) == 4
    for factor in factors.values():
        nn.init.normal_(factor, std=0.3)
        factor.requires_grad_(True)
    found, _ = tower.attn(x, x, x, need_weights=False, attn_mask=mask)
    found_gradients = torch.autograd.grad(found.square().sum(), list(factors.values()))

    inner, outer = ("lora_{}.default.weight", "base_layer.out_proj.lora_{}.default.weight")
    in_proj, out_proj = (3.0 * factors[n.format("B")] @ factors[n.format("A")] for n in (inner, outer))
    q, k, v = F.linear(x, original["in_proj_weight"] + in_proj, original["in_proj_bias"]).chunk(3, -1)
    heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v)]
    mixed = F.softmax(heads[0] @ heads[1].mT / 8**0.5 + mask, -1) @ heads[2]
    weight = original["out_proj.weight"] + out_proj
    defined = F.linear(mixed.transpose(1, 2).flatten(2), weight, original["out_proj.bias"])
    torch.testing.assert_close(found, defined)
    expected = torch.autograd.grad(defined.square().sum(), list(factors.values()))
    torch.testing.assert_close(found_gradients, expected)
    after = {name: tensor for name, tensor in tower.attn.state_dict().items() if name not in factors}
    assert {name.replace("base_layer.", ""): True for name in after} == dict.fromkeys(original, True)
    assert all(torch.equal(tensor, original[name.replace("base_layer.", "")]) for name, tensor in after.items())


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_have_the_gradient_of_the_whole_batch(kind, tmp_path):
    """Without dropout, which an undivided batch draws otherwise."""
    model = trained_model(kind, tmp_path, Tuning(image="lora", text="frozen"))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model.train())
    batch = pairs_for(model)
    cached_backward(model, start(model).accelerator, (batch.image, batch.text), partial(contrast, batch=batch), 2)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuning", [BOTH, Tuning(image="last_n", image_last_n=1, text="frozen")], ids=["lora", "last"])
@pytest.mark.parametrize("kind", ["native", "timm vit and bert"])
def test_activation_checkpointing_has_the_same_gradients(kind, tuning, tmp_path):
    found = []
    for checkpointed in (False, True):
        model = trained_model(kind, tmp_path, tuning)
        torch.manual_seed(2)
        start(model, Placement(activation_checkpointing=checkpointed))
        torch.manual_seed(3)
        found.append(gradients(model.train()))
    torch.testing.assert_close(found[1], found[0])


def test_under_bfloat16_gradients_of_adapters_are_float32(tmp_path):
    model = trained_model("native", tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged, merged = features(model), features(merge_lora(model))
        found = gradients(model.train())
    torch.testing.assert_close(unmerged, merged, rtol=0, atol=0.02)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_short_texts_go_through_adapters_too(tmp_path):
    model = trained_model("native", tmp_path)
    text = pairs_for(model).text
    text[:, 7] = 49407
    text[:, 8:] = 0
    torch.testing.assert_close(model.encode_text(text[:, :8]), model.encode_text(text), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "tower", "target", "message"),
    [
        ("native", "image", "qkv", "'qkv' is no module of this tower; there are attn, c_fc, c_proj"),
        ("native", "text", "out_proj", "out_proj is a part of attn; there are attn, c_fc, c_proj"),
        ("timm vit and bert", "image", "attn", "there are qkv, proj, fc1, fc2"),
        ("timm vit and bert", "text", "attn", "there are query, key, value, dense"),
        ("timm cnn", "image", "conv_dw", "'conv_dw' is no module of this tower; there are conv"),
    ],
)
def test_a_target_that_does_not_exist_lists_those_that_do(kind, tower, target, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        apply_tuning(model_of(kind, tmp_path), Tuning(**{tower: "lora", f"{tower}_lora_targets": [target]}))


def test_adapters_are_added_once(tmp_path):
    model = trained_model("native", tmp_path, steps=0)
    with pytest.raises(UserError, match="has adapters already"):
        apply_tuning(model, Tuning())
    apply_tuning(merge_lora(model), BOTH)
