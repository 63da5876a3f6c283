"""Decay groups and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.training.optim import WarmupCosine, adamw, parameter_groups
from tests.model.towers import TINY_VIT, bert_folder


def test_scale_norms_biases_and_positions_do_not_decay():
    model = build_model("ViT-S-32-alt")
    groups = {g["name"]: g for g in parameter_groups(model, 0.2, model.no_weight_decay())}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt = {names[id(p)] for p in groups["no_decay"]["params"]}
    decayed = {names[id(p)] for p in groups["decay"]["params"]}
    assert groups["decay"]["weight_decay"] == 0.2 and groups["no_decay"]["weight_decay"] == 0.0
    assert {"clip.logit_scale", "clip.positional_embedding", "clip.visual.positional_embedding"} <= exempt
    assert {"clip.ln_final.weight", "clip.visual.ln_post.bias"} <= exempt
    assert {"clip.visual.proj", "clip.text_projection", "clip.visual.conv1.weight"} <= decayed
    assert len(exempt) + len(decayed) == len(list(model.parameters()))


def test_positions_of_timm_and_hugging_face_towers_do_not_decay(tmp_path):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "mean_pooler", "context_length": 20}
    model = build_model(image=TINY_VIT, text=text, embed_dim=16)
    exempt = model.no_weight_decay()
    assert {"clip.visual.trunk.pos_embed", "clip.visual.trunk.cls_token"} <= exempt
    assert "clip.text.transformer.embeddings.position_embeddings.weight" in exempt
    assert exempt & {name for name, _ in model.named_parameters()}


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(2, 2)
    model.weight.requires_grad = False
    assert [g["name"] for g in parameter_groups(model, 0.1)] == ["no_decay"]


@pytest.mark.parametrize("lr", [0, -1e-3, math.nan])
def test_a_learning_rate_must_be_positive(lr):
    with pytest.raises(UserError, match="greater than 0"):
        adamw(nn.Linear(2, 2), lr=lr)


def test_schedule_follows_its_definition():
    schedule = WarmupCosine(total_samples=1000, warmup_samples=100, final_factor=0.1)
    factors = [schedule(seen, 10) for seen in range(0, 1000, 10)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)  # half way down
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule(1000, 10) == pytest.approx(0.1)


def test_schedule_without_warmup_starts_at_the_base_rate():
    assert WarmupCosine(total_samples=100, warmup_samples=0)(0, 10) == 1.0


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="less than total_samples"):
        WarmupCosine(total_samples=100, warmup_samples=100)


def test_betas_and_eps_are_clips():
    optimizer = adamw(nn.Linear(2, 2), lr=1e-5)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-6)
