"""Sharded, compressed, checkpointed and compiled runs against one process; states that each opens of the others."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quiltnet.distributed import broadcast_object, rank, world_size
from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.patch_dropout import set_patch_dropout
from quiltnet.training import placement as module
from quiltnet.training.engine import TrainState, start_training, train_step
from quiltnet.training.losses import InfoNCE
from quiltnet.training.optim import build_optimizer
from quiltnet.training.placement import Placement, check_placement, check_towers, place
from quiltnet.training.precision import build_accelerator
from tests.conftest import ROOT
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, bert_folder
from tests.ranks import run_ranks

CONFIGS = sorted((ROOT / "conf" / "placement").glob("*.yaml"))
STEPS, SAVED_AT = 5, 3
LR = 3e-4
PLACEMENTS = {
    "ddp": Placement(),
    "fsdp": Placement(sharding="fsdp"),
    "fsdp checkpointed": Placement(sharding="fsdp", activation_checkpointing=True),
    "ddp compressed": Placement(gradient_compression=True),
    "ddp compiled checkpointed": Placement(activation_checkpointing=True, compile=True),
    "fsdp compiled": Placement(sharding="fsdp", compile=True),
}


def model_of_two_layers() -> nn.Module:
    torch.manual_seed(0)
    model = build_model(image={**TINY_IMAGE, "layers": 2}, text={**TINY_TEXT, "layers": 2}, embed_dim=16)
    model.clip.token_embedding = nn.Embedding(11, TINY_TEXT["width"])  # few words: less for the optimiser to do
    return model.train()


def pairs(step: int) -> SimpleNamespace:
    """8 pairs, a rank its half; texts of two lengths by turns."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 10, (8, 12 - 4 * (step % 2)), generator=generator)
    text[:, -1] = 10
    rows = slice(4 * rank(), 4 * rank() + 4) if world_size() > 1 else slice(None)
    return SimpleNamespace(image=image[rows], text=text[rows], second_image=None)


def start(placement: Placement, precision: str = "fp32") -> TrainState:
    model = model_of_two_layers()
    return start_training(
        model,
        build_optimizer(model, lr=LR),
        lambda seen, step: 1.0,
        global_batch_size=8,
        accelerator=build_accelerator(precision, cpu=True),
        placement=placement,
    )


def train(state: TrainState, steps: int = STEPS) -> list[dict[str, Tensor]]:
    loss = InfoNCE()
    return [
        train_step(state, pairs(step), lambda features, batch: {"loss": loss(*features[:3])})
        for step in range(state.step, steps)
    ]


def whole(state: TrainState) -> dict[str, Any]:  # all ranks
    """A checkpoint of rank 0 as every rank would read it."""
    return broadcast_object(copy.deepcopy(state.state_dict()))


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def features_of(state: TrainState) -> tuple[Tensor, Tensor]:
    """Outside of ``forward``, as evaluators encode."""
    with torch.no_grad():
        return state.unwrapped.encode_image(pairs(9).image), state.unwrapped.encode_text(pairs(9).text)


def on_two_ranks(saved_by_one: dict[str, Any]) -> dict[str, Any]:
    module._COMPILE_BACKEND = "eager"  # tracing, graphs and hooks, but for the slow part
    results: dict[str, Any] = {"end": {}, "norms": {}, "saved": {}, "resumed": {}}
    for name, placement in PLACEMENTS.items():
        state = start(placement)
        metrics = train(state, SAVED_AT)
        if name in ("ddp", "fsdp"):
            results["saved"][name] = whole(state)
        metrics += train(state)
        results["end"][name] = whole(state)
        results["norms"][name] = [float(step["grad_norm"]) for step in metrics]
    for saver, saved in {"one": saved_by_one, **results["saved"]}.items():
        for opener in ("ddp", "fsdp"):
            state = start(PLACEMENTS[opener])
            state.load_state_dict(copy.deepcopy(saved))  # an optimiser updates in place the tensors that it is given
            assert state.step == SAVED_AT
            train(state)
            results["resumed"][saver, opener] = whole(state)
    results["evaluated"] = evaluated_between_steps()
    results["bf16"] = {name: types_in_bf16(PLACEMENTS[name]) for name in ("ddp", "fsdp")}
    results["shares"] = shares(start(PLACEMENTS["fsdp"]))
    return results


def evaluated_between_steps() -> dict[str, Any]:
    seen = start(PLACEMENTS["fsdp"])
    features = features_of(seen), features_of(start(PLACEMENTS["ddp"]))
    for step in range(1, STEPS + 1):
        train(seen, step)
        features_of(seen)
    return {"features": features, "weights": whole(seen)["weights"]}


def types_in_bf16(placement: Placement) -> set[torch.dtype]:
    """Of features, scale, loss, weights, gradients' norm and moments; the towers themselves must be in bfloat16."""
    state = start(placement, precision="bf16")
    inside: set[torch.dtype] = set()
    state.unwrapped.tower_blocks()["image"][0].mlp.register_forward_hook(lambda *call: inside.add(call[2].dtype))
    found: set[torch.dtype] = set()

    def objective(features: Any, batch: Any) -> dict[str, Tensor]:
        loss = InfoNCE()(*features[:3])
        found.update(part.dtype for part in (*features[:3], loss))
        return {"loss": loss}

    metrics = train_step(state, pairs(0), objective)
    assert inside == {torch.bfloat16}
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return found | {tensor.dtype for tensor in (*state.model.parameters(), *moments, metrics["grad_norm"])}


def shares(state: TrainState) -> dict[str, float]:
    """Of weights and of moments, what this rank holds."""
    train(state, 1)
    parameters = list(state.model.parameters())
    moments = [entry["exp_avg"] for entry in state.optimizer.state.values()]
    return {
        name: sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
        / sum(t.numel() for t in tensors)
        for name, tensors in (("weights", parameters), ("moments", moments))
    }


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    state = start(Placement())
    begin = copy.deepcopy(state.unwrapped.clip.state_dict())
    metrics = train(state, SAVED_AT)
    saved = whole(state)
    metrics += train(state)
    norms = [float(step["grad_norm"]) for step in metrics]
    return {"begin": begin, "saved": saved, "end": whole(state), "norms": norms}


@pytest.fixture(scope="module")
def two(one) -> dict[str, Any]:
    return run_ranks(on_two_ranks, 2, copy.deepcopy(one["saved"]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLACEMENTS if "compressed" not in name])
def test_weights_after_five_steps_are_those_of_one_process(one, two, name):
    assert largest_difference(one["begin"], one["end"]["weights"]) > 100 * 1e-5, "the steps were too small to tell"
    assert largest_difference(two["end"][name]["weights"], one["end"]["weights"]) <= 1e-5
    assert two["norms"][name] == pytest.approx(one["norms"], rel=1e-5)


@pytest.mark.slow
def test_compressed_gradients_err_as_bfloat16_does(one, two):
    assert two["norms"]["ddp compressed"] == pytest.approx(one["norms"], rel=1e-2)
    weights, begin = two["end"]["ddp compressed"]["weights"], one["begin"]
    error = math.dist(*(flat(state) for state in (weights, one["end"]["weights"])))
    moved = math.dist(*(flat(state) for state in (begin, one["end"]["weights"])))
    assert 1e-3 < error / moved < 2e-2


def flat(weights: dict[str, Tensor]) -> list[float]:
    return torch.cat([tensor.flatten() for tensor in weights.values()]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("saver", ["one", "ddp", "fsdp"])
@pytest.mark.parametrize("opener", ["one", "ddp", "fsdp"])
def test_a_checkpoint_opens_in_every_other_placement(one, two, saver, opener):
    if opener == "one":
        state = start(Placement())
        state.load_state_dict(copy.deepcopy({"one": one["saved"], **two["saved"]}[saver]))
        train(state)
        end = whole(state)
    else:
        end = two["resumed"][saver, opener]
    assert largest_difference(end["weights"], one["end"]["weights"]) <= 1e-5
    if saver == opener:
        unbroken = {"one": one["end"], **two["end"]}[opener]
        torch.testing.assert_close(end["weights"], unbroken["weights"], rtol=0, atol=0)
        torch.testing.assert_close(end["optimizer"]["state"], unbroken["optimizer"]["state"], rtol=0, atol=0)
        assert end["optimizer"]["param_groups"] == unbroken["optimizer"]["param_groups"]


@pytest.mark.slow
def test_evaluation_of_a_sharded_model(two):
    ours, theirs = two["evaluated"]["features"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(two["evaluated"]["weights"], two["end"]["fsdp"]["weights"], rtol=0, atol=0)


@pytest.mark.slow
def test_sharding_halves_what_a_rank_holds(two):
    assert max(two["shares"].values()) < 0.52


@pytest.mark.slow
def test_only_the_towers_compute_in_bfloat16(two):
    assert two["bf16"] == {"ddp": {torch.float32}, "fsdp": {torch.float32}}


def gradients(model: nn.Module, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    features = model(image, text)
    (features.image_features * features.text_features.roll(1, 0)).sum().mul(features.logit_scale).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("towers", ["native", "timm and Hugging Face"])
def test_checkpointing_replays_every_draw(towers, tmp_path):
    if towers == "native":
        options = {"image": {**TINY_IMAGE, "layers": 2}, "text": {**TINY_TEXT, "layers": 2}}
    else:
        text = {"hf_model_name": str(bert_folder(tmp_path)), "context_length": 12}
        options = {"image": {**TINY_VIT, "timm_drop_path": 0.3}, "text": text}
    torch.manual_seed(0)
    model = build_model(embed_dim=16, **options).train()
    set_patch_dropout(model.clip, 0.5)
    size = model.image_size if isinstance(model.image_size, int) else model.image_size[0]
    image, text = torch.rand(4, 3, size, size), torch.tensor([[2, 5, 6, 3, 4, 10, 0, 0]] * 4)
    plain = gradients(model, image, text)
    model.zero_grad()
    runs: list[int] = []
    next(model.tower_blocks()["text"][0].children()).register_forward_pre_hook(lambda *call: runs.append(1))
    check_towers(Placement(activation_checkpointing=True), model)
    torch.testing.assert_close(gradients(model, image, text), plain, rtol=1e-5, atol=1e-7)
    assert len(runs) == 2, "the block was not run again"


@pytest.mark.slow
def test_compiled_blocks_keep_their_names_and_features():
    torch.manual_seed(0)
    reference = build_model(image=TINY_IMAGE, text=TINY_TEXT, embed_dim=16)
    model = copy.deepcopy(reference)
    place(model, build_optimizer(model, lr=LR), build_accelerator(cpu=True), Placement(compile=True))
    assert model.state_dict().keys() == reference.state_dict().keys()
    batch = pairs(0)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(batch.text), reference.encode_text(batch.text), rtol=1e-5, atol=1e-6
        )
    assert model.clip.transformer.resblocks[0]._compiled_call_impl is not None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_say_every_option(path):
    config = OmegaConf.load(path)
    assert isinstance(instantiate(config), Placement)
    assert set(config) == {"_target_", *Placement.__dataclass_fields__}


@pytest.mark.parametrize(
    ("placement", "precision", "ranks", "message"),
    [
        (Placement(sharding="fsdp"), "fp32", 1, "several processes"),
        (Placement(sharding="fsdp", gradient_compression=True), "fp32", 2, "leave out one"),
        (Placement(sharding="fsdp"), "fp16", 2, "use bf16 or ddp"),
        (Placement(gradient_compression=True), "fp32", 1, "sends no gradients"),
    ],
)
def test_what_cannot_be_is_refused_at_the_door(monkeypatch, placement, precision, ranks, message):
    monkeypatch.setattr(module, "world_size", lambda: ranks)
    with pytest.raises(UserError, match=message):
        check_placement(placement, build_accelerator(cpu=True), precision)


def test_deepspeed_is_refused(monkeypatch):
    accelerator = SimpleNamespace(distributed_type=module.DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match="asks accelerate for DEEPSPEED"):
        check_placement(Placement(), accelerator, "fp32")


@pytest.mark.parametrize(
    ("device_type", "variable", "message"),
    [("cpu", "CXX", "no /nowhere/compiler here"), ("cuda", "CC", "no /nowhere/compiler here")],
)
def test_compile_without_a_compiler(monkeypatch, device_type, variable, message):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv(variable, "/nowhere/compiler")
    with pytest.raises(UserError, match=message):
        module._check_compiler(device_type)


def test_compile_without_triton_or_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"Python\.h"):
        module._check_compiler("cpu")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton"):
        module._check_compiler("cuda")


def test_towers_that_cannot_be_sharded():
    fsdp = Placement(sharding="fsdp")
    model = model_of_two_layers()
    check_towers(fsdp, model)
    first, second = model.tower_blocks()["image"]
    second.ln_1.weight = first.ln_1.weight
    with pytest.raises(UserError, match="one parameter in two blocks"):
        check_towers(fsdp, model)
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    with_statistics = build_model(image=resnet, text=TINY_TEXT, embed_dim=16, batchnorm="train")
    with pytest.raises(UserError, match="statistics of its own"):
        check_towers(fsdp, with_statistics)


def test_a_tower_that_ignores_checkpointing():
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    model = build_model(image=resnet, text=TINY_TEXT, embed_dim=16)
    with pytest.raises(UserError, match="the image tower does not know it"):
        check_towers(Placement(activation_checkpointing=True), model)


def test_what_comes_out_is_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 2)
    accelerator = SimpleNamespace(prepare=lambda *given: given)  # as accelerate 1.15 does on a CPU it was not told of
    model = model_of_two_layers()
    with pytest.raises(RuntimeError, match="asked for ddp on 2 ranks, got a ContrastiveModel"):
        place(model, build_optimizer(model, lr=LR), accelerator, Placement())
