"""Which parameters decay, how fast they learn, and that it stays so."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning, freeze_waiting, waiting
from quiltnet.model.assembly import build_model
from quiltnet.training.engine import start_training, train_step
from quiltnet.training.optim import build_optimizer
from quiltnet.training.parameter_groups import describe_groups, group_table, parameter_groups
from quiltnet.training.precision import build_accelerator
from quiltnet.training.schedules import WarmupCosine
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, bert_folder, tiny_model


def groups_of(model: nn.Module, **options: float | bool) -> dict[str, dict]:
    return {group["name"]: group for group in parameter_groups(model, lr=1.0, weight_decay=0.2, **options)}


def rates(model: nn.Module, **options: float | bool) -> dict[str, float]:
    groups = groups_of(model, **options).values()
    return {name: group["lr"] for group in groups for name, _ in group["params"]}


def test_scale_norms_biases_and_positions_do_not_decay():
    model = tiny_model()
    groups = groups_of(model)
    assert list(groups) == ["decay", "no_decay"]
    decayed, exempt = ({name for name, _ in groups[name]["params"]} for name in groups)
    assert groups["decay"]["weight_decay"] == 0.2 and groups["no_decay"]["weight_decay"] == 0.0
    assert {"clip.logit_scale", "clip.positional_embedding", "clip.visual.positional_embedding"} <= exempt
    assert {"clip.ln_final.weight", "clip.visual.ln_post.bias"} <= exempt
    assert {"clip.visual.proj", "clip.text_projection", "clip.visual.conv1.weight"} <= decayed
    assert len(exempt) + len(decayed) == len(list(model.parameters()))


def test_positions_of_timm_and_hugging_face_towers_do_not_decay(tmp_path):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "hf_pooler_type": "mean_pooler", "context_length": 20}
    exempt = {name for name, _ in groups_of(build_model(image=TINY_VIT, text=text, embed_dim=16))["no_decay"]["params"]}
    assert {"clip.visual.trunk.pos_embed", "clip.visual.trunk.cls_token"} <= exempt
    assert "clip.text.transformer.embeddings.position_embeddings.weight" in exempt


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(2, 2)
    model.weight.requires_grad = False
    assert list(groups_of(model)) == ["no_decay"]


def test_rates_fall_with_depth():
    model = build_model(image={**TINY_IMAGE, "layers": 3}, text={**TINY_TEXT, "layers": 2}, embed_dim=16)
    lr = rates(model, layer_decay=0.5)
    assert lr["clip.visual.proj"] == lr["clip.visual.ln_post.weight"] == lr["clip.text_projection"] == 1.0
    blocks = "clip.visual.transformer.resblocks"
    assert [lr[f"{blocks}.{n}.mlp.c_fc.weight"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert lr["clip.visual.conv1.weight"] == lr["clip.visual.class_embedding"] == 0.0625
    assert lr["clip.token_embedding.weight"] == lr["clip.positional_embedding"] == 0.125  # a tower of two blocks
    assert lr["clip.logit_scale"] == 1.0
    assert set(lr) == {name for name, _ in model.named_parameters()}


def test_rates_differ_by_tower():
    lr = rates(tiny_model(), image_lr_factor=0.5, text_lr_factor=0.25, logit_scale_lr_factor=4.0)
    assert {rate for name, rate in lr.items() if name.startswith("clip.visual.")} == {0.5}
    assert lr.pop("clip.logit_scale") == 4.0
    assert {rate for name, rate in lr.items() if not name.startswith("clip.visual.")} == {0.25}


def test_projections_have_a_rate_of_their_own(tmp_path):
    lr = rates(tiny_model(), projection_lr_factor=10.0, text_lr_factor=0.5)
    assert lr.pop("clip.visual.proj") == 10.0 and lr.pop("clip.text_projection") == 5.0
    assert max(lr.values()) == 1.0
    names = list(groups_of(tiny_model(), projection_lr_factor=10.0))
    assert names == ["image+text/decay", "image.projection+text.projection/decay", "no_decay"]
    names = list(groups_of(tiny_model(), projection_lr_factor=10.0, layer_decay=0.5))
    assert "image.projection+text.projection/decay" in names and "image.block1+text.block1/decay" in names


def test_adapters_learn_at_the_rate_of_their_layer():
    model = build_model(image={**TINY_IMAGE, "layers": 2}, text=TINY_TEXT, embed_dim=16)
    apply_tuning(model, Tuning(image="lora", text="frozen"))
    lr = rates(model, layer_decay=0.5)
    by_block = [{rate for name, rate in lr.items() if f"resblocks.{n}." in name} for n in range(2)]
    assert by_block == [{0.25}, {0.5}] and lr["clip.visual.proj"] == 1.0
    assert len(lr) == 2 * 8 + 2  # attention's two, c_fc and c_proj of two blocks; projection and logit_scale
    assert groups_of(model, matrices_apart=True)["matrices"]["use_fallback"] is False


def test_equal_settings_share_a_group_whose_name_says_who():
    assert list(groups_of(tiny_model(), text_lr_factor=0.5)) == [
        "image/decay", "text/decay", "image+logit_scale/no_decay", "text/no_decay",
    ]  # fmt: skip
    names = list(groups_of(tiny_model(), layer_decay=0.5))
    assert names[:3] == [f"image.{part}+text.{part}/decay" for part in ("embeddings", "block1", "head")]
    assert names[-1] == "image.head+text.head+logit_scale/no_decay"


def test_groups_are_the_same_every_time():
    def layout() -> list[tuple]:
        groups = groups_of(tiny_model(), layer_decay=0.7, text_lr_factor=0.5)
        return [(name, group["lr"], [name for name, _ in group["params"]]) for name, group in groups.items()]

    assert layout() == layout()


def test_after_ten_steps_rates_still_differ_by_depth():
    """In the groups and in what moves: AdamW with gradients of one sign moves every weight by its rate a step."""
    model = tiny_model().train()
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.0, layer_decay=0.5)
    state = start_training(
        model,
        optimizer,
        WarmupCosine(total_samples=80, warmup_samples=8),
        global_batch_size=4,
        accelerator=build_accelerator("fp32", cpu=True),
    )
    watched = ["clip.visual.conv1.weight", "clip.visual.transformer.resblocks.0.mlp.c_fc.weight", "clip.visual.proj"]
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in watched}
    for parameter in parameters.values():
        parameter.register_hook(torch.ones_like)  # clipped alike
    image = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    batch = SimpleNamespace(image=image, text=torch.ones(4, 12, dtype=torch.int64), second_image=None)
    for _ in range(10):
        train_step(state, batch, lambda features, _: {"loss": sum(part.sum() for part in features[:3])})
    lr = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert lr[watched[1]] == pytest.approx(2 * lr[watched[0]]) and lr[watched[2]] == pytest.approx(4 * lr[watched[0]])
    moved = [(parameters[name] - before[name]).abs().mean().item() for name in watched]
    assert moved[1] / moved[0] == pytest.approx(2, rel=1e-3) and moved[2] / moved[1] == pytest.approx(2, rel=1e-3)


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else():
    groups = groups_of(tiny_model(), matrices_apart=True)
    assert {name: group["use_fallback"] for name, group in groups.items()} == {
        "matrices": False, "decay": True, "no_decay": True,
    }  # fmt: skip
    assert all(".resblocks." in name and parameter.ndim == 2 for name, parameter in groups["matrices"]["params"])
    rest = {name for name, _ in groups["decay"]["params"]}
    assert rest == {
        "clip.visual.conv1.weight",
        "clip.visual.proj",
        "clip.token_embedding.weight",
        "clip.text_projection",
    }


def test_table_says_what_is_trained():
    groups = build_optimizer(tiny_model(), lr=1e-5, text_lr_factor=0.5).param_groups
    rows = describe_groups(groups)
    assert [row.name for row in rows] == ["image/decay", "text/decay", "image+logit_scale/no_decay", "text/no_decay"]
    assert sum(row.parameters for row in rows) == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert {(row.lr, row.weight_decay) for row in rows} == {(1e-5, 0.2), (5e-6, 0.2), (1e-5, 0.0), (5e-6, 0.0)}
    lines = group_table(groups).splitlines()
    assert lines[0].split() == ["parameter", "group", "tensors", "parameters", "lr", "weight_decay"]
    assert re.fullmatch(r"text/decay +\d+ +[\d,]+ +5e-06 +0\.2", lines[2])
    assert lines[-1].split()[:2] == ["all", f"{len(list(tiny_model().parameters()))}"]


def test_table_says_what_is_frozen():
    model = tiny_model()
    apply_tuning(model, Tuning(image="frozen", text_thaw_samples=8))
    tower = [parameter.numel() for parameter in model.clip.visual.parameters()]
    optimizer = build_optimizer(model, lr=1e-5)
    freeze_waiting(model, waiting(model, Tuning(text_thaw_samples=8)), 0)  # what will train is not frozen
    lines = group_table(optimizer.param_groups, model).splitlines()
    assert lines[-1].split() == ["frozen", f"{len(tower)}", f"{sum(tower):,}"]
    assert lines[-2].split()[1] == f"{len(list(model.parameters())) - len(tower)}"


def without_blocks() -> nn.Module:
    model = tiny_model()
    model.clip.visual = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay=0.0 must be greater than 0 and at most 1"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 must be"),
        ({"text_lr_factor": 0.0}, "text_lr_factor=0.0 must be greater than 0"),
        ({"projection_lr_factor": 0.0}, "projection_lr_factor=0.0 must be"),
        ({"logit_scale_lr_factor": -1.0}, "logit_scale_lr_factor=-1.0 must be"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        groups_of(tiny_model(), **options)


@pytest.mark.parametrize("options", [{"layer_decay": 0.5}, {"matrices_apart": True}])
def test_layers_that_cannot_be_told_apart_are_not_guessed(options):
    with pytest.raises(UserError, match="those of the image tower cannot be told apart"):
        groups_of(without_blocks(), **options)
    assert set(groups_of(without_blocks(), text_lr_factor=0.5)) > {"image/decay", "text/decay"}


def test_towers_of_a_model_without_towers():
    with pytest.raises(UserError, match="need a ContrastiveModel"):
        groups_of(nn.Linear(2, 2), image_lr_factor=0.5)


def test_a_table_needs_no_optimiser_but_its_groups():
    group = {"name": "decay", "params": [torch.zeros(2, 3)], "lr": 0.5, "weight_decay": 0.1}
    assert describe_groups(SimpleNamespace(param_groups=[group]).param_groups) == [("decay", 1, 6, 0.5, 0.1)]
