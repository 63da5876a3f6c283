"""Relevance against slow, obvious definitions on the explicit attention of each library, in float64."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning, merge_lora
from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.relevance import Relevance, relevance
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, bert_folder

IMAGE = {**TINY_IMAGE, "layers": 3, "patch_size": 8}
TEXT = {**TINY_TEXT, "layers": 3}
CNN = {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 64}
SWIN = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "avg", "image_size": 224}
SWIN["timm_model_args"] = {"depths": [1, 1, 1, 1], "embed_dim": 24}
RESNET = {"image_size": 128, "width": 8, "layers": [1, 1, 1, 1], "head_width": 8}
CAPTION = "numerous sebaceous glands"


def model_with(image=IMAGE, text=TEXT) -> ContrastiveModel:
    torch.manual_seed(0)
    return build_model(image=image, text=text, embed_dim=16)


def pair(model: ContrastiveModel) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, 3, model.image_size, model.image_size), model.tokenize([CAPTION])


def explained(model: ContrastiveModel) -> Relevance:
    return relevance(model, *pair(model))


def rollout(attention: list[Tensor], score: Tensor) -> Tensor:
    """(N, N) as the authors' notebook on CLIP computes it, a layer at a time, from the identity up."""
    total = torch.eye(attention[0].shape[-1], dtype=torch.float64)
    for weights, gradient in zip(attention, torch.autograd.grad(score, attention, retain_graph=True), strict=True):
        total = total + (gradient * weights).clamp(min=0).mean(dim=1)[0] @ total
    return total


def upsampled(grid: Tensor, side: int) -> Tensor:
    large = F.interpolate(grid[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
    return (large - large.min()) / (large.max() - large.min())


def explicit_blocks(transformer: nn.Module, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """open_clip's residual blocks with their attention written out: tokens (1, N, D), and weights a layer."""
    attention = []
    for block in transformer.resblocks:
        heads = block.attn.num_heads
        mixed = F.linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in mixed.chunk(3, dim=-1))
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        attention.append(weights)
        tokens = tokens + block.attn.out_proj((weights @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.ln_2(tokens))
    return tokens, attention


def logit(model: ContrastiveModel, image_features: Tensor, text_features: Tensor) -> Tensor:
    similarity = (F.normalize(image_features, dim=-1) * F.normalize(text_features, dim=-1)).sum()
    return model.logit_scale * similarity


def test_native_towers_as_the_published_rule_says():
    model = model_with()
    found = explained(model)
    exact = deepcopy(model).double().eval()
    image, text = pair(model)
    visual, clip = exact.clip.visual, exact.clip
    tokens, of_image = explicit_blocks(visual.transformer, visual._embeds(image.double()), None)
    image_features = visual.ln_post(tokens)[:, 0] @ visual.proj
    embedded = clip.token_embedding(text) + clip.positional_embedding
    tokens, of_text = explicit_blocks(clip.transformer, embedded, clip.attn_mask)
    end = int(text[0].argmax())
    score = logit(exact, image_features, clip.ln_final(tokens)[:, end] @ clip.text_projection)

    class_row = rollout(of_image, score)[0, 1:].reshape(4, 4)
    torch.testing.assert_close(found.image_map.double(), upsampled(class_row, 32), atol=1e-5, rtol=1e-4)
    end_row = rollout(of_text, score)[end]
    torch.testing.assert_close(found.token_scores.double(), end_row, atol=1e-5, rtol=1e-4)
    assert found.token_scores[1:end].min() > 0 and found.token_scores[end + 1 :].abs().max() == 0
    assert found.similarity == pytest.approx((score / exact.logit_scale).item(), abs=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_vit4"], ids=["class", "attention", "average"])
def test_timm_transformers_as_the_published_rule_says(name):
    """timm writes attention out where it is told not to fuse it; the weights then go through its dropout module."""
    model = model_with({"timm_model_name": name, "timm_pool": "", "image_size": 160})
    for gamma in (p for n, p in model.named_parameters() if n.endswith("gamma")):
        gamma.data.fill_(1)  # 1e-5 would hide the blocks
    found = explained(model)
    exact = deepcopy(model).double().eval()
    trunk, attention = exact.clip.visual.trunk, []
    for block in trunk.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, output: attention.append(output))
    image, text = pair(model)
    tokens = trunk.forward_features(image.double())
    pooled, pooling = trunk.forward_head(tokens), None
    if trunk.attn_pool is not None:
        written_out, pooling = latent_attention(trunk.attn_pool, tokens)
        torch.testing.assert_close(written_out, pooled)
        pooled = written_out
    score = logit(exact, exact.clip.visual.head(pooled), exact.clip.encode_text(text))

    total, prefix = rollout(attention, score), trunk.num_prefix_tokens
    if pooling is not None:
        gradient = torch.autograd.grad(score, pooling)[0]
        row = (gradient * pooling).clamp(min=0).mean(dim=1)[0, 0] @ total
    elif trunk.global_pool == "token":
        row = total[0]
    else:  # with weights of 1 / N, and this is their gradient times weight
        gradient = torch.autograd.grad(score, tokens)[0]
        row = (gradient * tokens).sum(dim=-1).clamp(min=0)[0] @ total
    expected = upsampled(row[prefix:].reshape(trunk.patch_embed.grid_size), 160)
    torch.testing.assert_close(found.image_map.double(), expected, atol=1e-4, rtol=1e-3)


def latent_attention(pool: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """timm's ``AttentionPoolLatent`` written out: pooled (1, D), weights (1, heads, 1, N)."""
    query = pool.q_norm(pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2))
    key, value = pool.kv(tokens).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ pool.k_norm(key).transpose(-2, -1) * pool.scale).softmax(dim=-1)
    pooled = pool.proj((weights @ value).transpose(1, 2).flatten(2))
    return (pooled + pool.mlp(pool.norm(pooled)))[:, 0], weights


def bert(tmp_path: Path, pooler: str) -> ContrastiveModel:
    folder = bert_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    text = {"hf_model_name": str(folder), "context_length": 12, "pretrained": False, "hf_pooler_type": pooler}
    return model_with(text=text)


@pytest.mark.parametrize("pooler", ["cls_last_hidden_state_pooler", "mean_pooler"])
def test_bert_as_the_published_rule_says(tmp_path, pooler):
    model = bert(tmp_path, pooler)
    image, _ = pair(model)
    text = model.tokenize(["a gland of fatty tissue"])
    found = relevance(model, image, text)
    exact = deepcopy(model).double().eval()
    tower = exact.clip.text
    tower.transformer.set_attn_implementation("eager")
    mask = (text != 0).long()
    out = tower.transformer(input_ids=text, attention_mask=mask, output_attentions=True)
    features = tower.proj(tower.pooler(out, mask))
    score = logit(exact, exact.clip.encode_image(image.double()), features)
    gradient = torch.autograd.grad(score, out.last_hidden_state, retain_graph=True)[0]
    total = rollout(list(out.attentions), score)
    mean_row = (gradient * out.last_hidden_state).sum(dim=-1).clamp(min=0)[0] @ total
    expected = mean_row if pooler == "mean_pooler" else total[0]
    torch.testing.assert_close(found.token_scores.double(), expected, atol=1e-5, rtol=1e-4)
    assert found.token_scores[int(mask.sum()) :].abs().max() == 0


def test_where_attention_cannot_be_read_words_have_gradient_times_embedding(tmp_path):
    def without_softmax(module, query, key, value, attention_mask, scaling=None, **_):
        scores = query @ key.transpose(-2, -1) * (scaling or query.shape[-1] ** -0.5) + attention_mask
        weights = (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()
        return (weights @ value).transpose(1, 2).contiguous(), None

    model = bert(tmp_path, "mean_pooler")
    image, text = pair(model)[0], model.tokenize(["a gland of fatty tissue"])
    tower = model.clip.text
    AttentionInterface.register("without_softmax", without_softmax)
    AttentionMaskInterface.register("without_softmax", eager_mask)
    tower.transformer.set_attn_implementation("without_softmax")
    found = relevance(model, image, text)
    exact = deepcopy(model).double().eval()
    embeddings = []
    exact.clip.text.transformer.embeddings.word_embeddings.register_forward_hook(lambda *a: embeddings.append(a[-1]))
    score = logit(exact, exact.clip.encode_image(image.double()), exact.clip.encode_text(text))
    expected = (torch.autograd.grad(score, embeddings)[0] * embeddings[0]).sum(dim=-1)[0]
    torch.testing.assert_close(found.token_scores.double(), expected, atol=1e-5, rtol=1e-3)
    assert found.token_scores.min() < 0 < found.token_scores.max()


@pytest.mark.parametrize("image", [CNN, RESNET, SWIN], ids=["timm", "resnet", "swin"])
def test_maps_of_features_by_grad_cam(image):
    model = model_with(image)
    found = explained(model)
    exact = deepcopy(model).double().eval()
    visual, maps = exact.clip.visual, []
    last = visual.layer4 if image is RESNET else visual.trunk.norm if image is SWIN else visual.trunk.layer4
    last.register_forward_hook(lambda _, __, output: maps.append(output))
    image, text = pair(model)
    score = logit(exact, exact.clip.encode_image(image.double()), exact.clip.encode_text(text))
    gradient = torch.autograd.grad(score, maps[0])[0][0]
    features = maps[0][0]
    if features.shape[-1] != features.shape[-2]:  # (h, w, C)
        features, gradient = features.permute(2, 0, 1), gradient.permute(2, 0, 1)
    cam = sum(g.mean() * f for g, f in zip(gradient, features, strict=True)).clamp(min=0)
    assert cam.max() > 0
    expected = upsampled(cam, model.image_size)
    torch.testing.assert_close(found.image_map.double(), expected, atol=1e-4, rtol=1e-3)


def test_adapters_count_as_if_they_were_merged():
    model = model_with()
    apply_tuning(model, Tuning(image="lora", text="lora", lora_rank=2))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found, merged, plain = explained(model), explained(merge_lora(model)), explained(model_with())
    torch.testing.assert_close(found.image_map, merged.image_map, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.token_scores, merged.token_scores, atol=1e-4, rtol=1e-4)
    assert (found.image_map - plain.image_map).abs().max() > 0.01


@pytest.mark.parametrize("image", [IMAGE, TINY_VIT, CNN], ids=["native", "timm", "cnn"])
def test_a_model_in_training_is_left_as_it_was(image):
    model = model_with(image).train()
    model.clip.transformer.grad_checkpointing = True
    model.clip.visual.requires_grad_(False)
    model.clip.logit_scale.grad = torch.tensor(3.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [(module, module.training) for module in model.modules()]
    random = torch.get_rng_state()
    pictured = pair(model)
    torch.set_rng_state(random)
    found = relevance(model, *pictured)
    assert all(module.training == mode for module, mode in modes) and model.clip.transformer.grad_checkpointing
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {"clip.logit_scale"} and model.clip.logit_scale.grad == 3
    trains = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert "visual" not in trains and "positional_embedding" in trains
    # Eval mode, all of it trainable: the same explanation.
    fresh = explained(model_with(image).eval())
    torch.testing.assert_close(found.image_map, fresh.image_map)
    torch.testing.assert_close(found.token_scores, fresh.token_scores)


@pytest.mark.parametrize("image", [IMAGE, TINY_VIT, CNN], ids=["native", "timm", "cnn"])
def test_similarity_is_the_models_own_where_gradients_are_off(image):
    model = model_with(image).eval().requires_grad_(False)
    picture, text = pair(model)
    with torch.inference_mode():
        found = relevance(model, picture.clone(), text.clone())
        similarity = (model.encode_image(picture) * model.encode_text(text)).sum()
    assert found.similarity == pytest.approx(similarity.item(), abs=1e-6)
    assert found.image_map.max() == 1 and found.token_scores.max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_about_the_same(dtype):
    model = model_with().eval()
    found, whole = explained(deepcopy(model).to(dtype)), explained(model)
    assert found.similarity == pytest.approx(whole.similarity, abs=0.02)
    assert (found.image_map - whole.image_map).abs().mean() < 0.05
    assert (found.token_scores - whole.token_scores).abs().max() < 0.05 * whole.token_scores.max()


def test_a_tower_without_a_known_method_is_refused():
    over_channels = {"timm_model_name": "xcit_nano_12_p16_224", "timm_pool": "", "image_size": 224}
    with pytest.raises(UserError, match="how a Xcit arrives at its features cannot be traced back to the image"):
        explained(model_with(over_channels))
