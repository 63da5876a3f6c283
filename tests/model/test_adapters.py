"""What trains in each mode, to the byte, in towers of every kind; what is frozen is quiet; mistakes are named."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch
import yaml
from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning, freeze_waiting, waiting
from quiltnet.model.assembly import build_model
from quiltnet.model.patch_dropout import set_patch_dropout
from tests.conftest import ROOT
from tests.model.towers import TINY_TEXT, tiny_model
from tests.model.tuned import KINDS, gradients, model_of, pairs_for, take_steps

CONFIGS = sorted((ROOT / "conf" / "tuning").glob("*.yaml"))
MODES = {
    "full": {},
    "locked image tower": {"image": "frozen"},
    "locked text tower": {"text": "frozen"},
    "last block": {"image": "last_n", "image_last_n": 1, "text": "last_n", "text_last_n": 1},
    "projections": {"image": "projection_only", "text": "projection_only"},
    "adapters": {"image": "lora", "text": "lora"},
    "projection, and all of text but logit_scale": {"image": "projection_only", "logit_scale": False},
}
# Kind of model -> by tower: all of it; its projection; its last block and what follows that.
PATTERNS = {
    "native": {
        "image": (r"visual\.", r"visual\.proj", r"visual\.(proj|ln_post|transformer\.resblocks\.1)\b"),
        "text": (
            r"transformer|token_embedding|positional|ln_final|text_proj",
            r"text_projection",
            r"text_projection|ln_final|transformer\.resblocks\.1\b",
        ),
    },
    "timm vit and bert": {
        "image": (r"visual\.", r"visual\.head\.", r"visual\.(head|trunk\.norm|trunk\.blocks\.5)\b"),
        "text": (r"text\.", r"text\.proj\.", r"text\.(proj|transformer\.pooler|transformer\.encoder\.layer\.0)\b"),
    },
    "timm cnn": {
        "image": (r"visual\.", r"visual\.head\.", r"visual\.(head|trunk\.(conv_head|bn2|blocks\.4\.0))\b"),
        "text": (r"(transformer|token_emb|positional|ln_final|text_proj)", r"text_projection", ""),
    },
}
PATTERNS["timm cnn"]["text"] = PATTERNS["native"]["text"]


def intended(kind: str, tuning: Tuning, names: set[str]) -> set[str]:
    """By the patterns above, and nothing that the package finds out."""
    found = {"logit_scale"} if tuning.logit_scale else set()
    for tower, (whole, projection, last) in PATTERNS[kind].items():
        adapters = rf"(?:{whole}).*lora_[AB]"
        pattern = {
            "full": whole, "frozen": "(?!)", "last_n": last, "projection_only": projection,
            "lora": f"{projection}|{adapters}",
        }[tuning.mode(tower)]  # fmt: skip
        found |= {name for name in names if re.match(pattern, name)}
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_what_shall_train_changes(kind, mode, tmp_path):
    model, tuning = model_of(kind, tmp_path), Tuning(**MODES[mode])
    apply_tuning(model, tuning)
    names = {name for name, _ in model.clip.named_parameters()}
    shall = intended(kind, tuning, names)
    trained = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    assert trained == shall
    assert {f"clip.{name}" for name in shall} == set(gradients(model.train()))
    before = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    take_steps(model, 3)
    after = model.clip.state_dict()  # buffers too: BatchNorm's statistics and counts
    assert {name for name in after if not torch.equal(after[name], before[name])} == shall


def test_a_frozen_tower_finds_the_same_features_each_time(tmp_path):
    """The loss of a locked tower's dropout and stochastic depth would be noise in what the other learns to read."""
    model = model_of("timm vit and bert", tmp_path, timm_drop_path=0.5).train()
    batch = pairs_for(model)
    first, second = model(batch.image, batch.text), model(batch.image, batch.text)
    assert not torch.equal(first.image_features, second.image_features)
    assert not torch.equal(first.text_features, second.text_features)
    for options, quiet in (({"image": "frozen"}, "image"), ({"text": "frozen"}, "text")):
        model = model_of("timm vit and bert", tmp_path, timm_drop_path=0.5).train()
        apply_tuning(model, Tuning(**options))
        first, second = model.train()(batch.image, batch.text), model(batch.image, batch.text)
        same = {"image": torch.equal(first[0], second[0]), "text": torch.equal(first[1], second[1])}
        assert same == {tower: tower == quiet for tower in same}


def test_the_frozen_trunk_under_a_projection_is_quiet(tmp_path):
    native = model_of("native", tmp_path)
    set_patch_dropout(native.clip, 0.5)
    for model in (native, model_of("timm vit and bert", tmp_path, timm_drop_path=0.5)):
        apply_tuning(model, Tuning(image="projection_only", text="projection_only"))
        batch = pairs_for(model.train())
        first, second = model(batch.image, batch.text), model(batch.image, batch.text)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_of_a_tower_that_trains_in_part_only_the_frozen_part_is_in_eval_mode(tmp_path):
    model = model_of("native", tmp_path)
    apply_tuning(model, Tuning(image="last_n", image_last_n=1))
    blocks = model.train().tower_blocks()["image"]
    assert [block.training for block in blocks] == [False, True]
    assert not model.clip.visual.conv1.training and model.clip.visual.ln_post.training
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_tuned_trains_whole(kind, tmp_path):
    model = model_of(kind, tmp_path).train()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    still = {module for norm in norms for module in norm.modules()}  # timm's hold their activation
    assert {module for module in model.modules() if not module.training} == still
    names = [name for name, _ in model.named_parameters()]
    apply_tuning(model, Tuning())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert names == [name for name, _ in model.named_parameters()]


def test_a_resnet_of_clips_own(tmp_path):
    image = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    model = build_model(image=image, text=TINY_TEXT, embed_dim=16)
    apply_tuning(model, Tuning(image="projection_only"))
    assert {name for name, p in model.clip.visual.named_parameters() if p.requires_grad} == {
        "attnpool.c_proj.weight",
        "attnpool.c_proj.bias",
    }
    assert not any(module.training for module in model.train().clip.visual.layer1.modules())
    model = build_model(image=image, text=TINY_TEXT, embed_dim=16)
    apply_tuning(model, Tuning(image="lora"))
    found = gradients(model.train())
    assert any("layer1.0.conv1.lora_B" in name for name in found)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_bias_of_siglip_is_the_losss_to_thaw():
    model = tiny_model(init_logit_bias=-10)
    before = model.logit_bias.requires_grad
    apply_tuning(model, Tuning(logit_scale=False))
    assert model.logit_bias.requires_grad == before and not model.clip.logit_scale.requires_grad
    model = tiny_model(init_logit_bias=-10)
    model.logit_bias.requires_grad_(True)
    apply_tuning(model, Tuning(image="frozen"))
    assert model.logit_bias.requires_grad


def test_trunks_wait_by_the_clock_and_projections_do_not(tmp_path):
    model = model_of("native", tmp_path)
    apply_tuning(model, Tuning(image="last_n", image_last_n=1, image_thaw_samples=8, text_thaw_samples=16))
    final = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    thaw_samples = waiting(model, Tuning(image_thaw_samples=8, text_thaw_samples=16))
    model.train()

    def trained(samples_seen: int) -> tuple[bool, set[str]]:
        changed = freeze_waiting(model, thaw_samples, samples_seen)
        return changed, {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}

    assert trained(0) == (True, {"logit_scale", "visual.proj", "text_projection"})
    assert not model.clip.visual.transformer.training and not model.clip.transformer.training
    assert trained(7)[0] is False
    changed, names = trained(8)
    assert changed and names == {name for name in final if name.startswith("visual.")} | {
        "logit_scale", "text_projection",
    }  # fmt: skip
    assert model.clip.visual.transformer.resblocks[1].training and not model.clip.transformer.training
    assert trained(16) == (True, final) and trained(17)[0] is False
    assert trained(0)[0] is True  # either way: a function of the clock


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "frozen", "text": "frozen"}, "leave nothing to train"),
        ({"image": "locked"}, "tuning.image='locked': choose full, frozen, last_n, lora, projection_only"),
        ({"text": "last_n"}, "say tuning.text_last_n=2"),
        ({"image": "last_n", "image_last_n": 0}, "say tuning.image_last_n=2"),
        ({"image_last_n": 2}, "tuning.image_last_n=2 is of mode last_n, and tuning.image=full"),
        ({"image_thaw_samples": -1}, "must be at least 0"),
        ({"image": "frozen", "image_thaw_samples": 8}, "tuning.image=frozen never thaws"),
        ({"lora_rank": 0}, "tuning.lora_rank=0 must be at least 1"),
        ({"lora_alpha": 0.0}, "tuning.lora_alpha=0.0 must be greater than 0"),
        ({"lora_dropout": 1.0}, "tuning.lora_dropout=1.0 must be"),
        ({"text_lora_targets": ["attn"]}, "is of mode lora, and tuning.text=full"),
        ({"text": "lora", "text_lora_targets": "attn"}, "must be a list of names"),
        ({"text": "lora", "text_lora_targets": []}, "must be a list of names"),
    ],
)
def test_tunings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Tuning(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("native", {"image": "last_n", "image_last_n": 3}, "image_last_n=3, but the image tower has 2 blocks"),
        ("timm vit and bert", {"text": "last_n", "text_last_n": 2}, "text_last_n=2, but the text tower has 1 blocks"),
        ("no projection", {"image": "projection_only"}, "this image tower has no projection"),
        ("no projection", {"image_thaw_samples": 8, "text": "frozen"}, "nothing of the towers would train"),
        ("no blocks", {"image": "last_n", "image_last_n": 1}, "blocks of this image tower cannot be told apart"),
        ("no blocks", {"image": "lora"}, "finds no attention, linear layer or 1x1 convolution"),
    ],
)
def test_what_a_tower_has_not_is_named(kind, options, message, tmp_path):
    if kind in KINDS:
        model = model_of(kind, tmp_path)
    else:
        model = tiny_model()
        model.clip.visual = nn.Sequential(nn.Linear(2, 2)) if kind == "no blocks" else model.clip.visual
        model.clip.visual.proj = None
    with pytest.raises(UserError, match=re.escape(message)):
        apply_tuning(model, Tuning(**options))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_say_every_option(path):
    config = yaml.safe_load(path.read_text())
    assert config.pop("_target_") == "quiltnet.model.adapters.Tuning"
    assert list(config) == [field.name for field in fields(Tuning)]
    Tuning(**config)
