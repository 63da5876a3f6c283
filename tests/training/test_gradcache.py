"""GradCache against the undivided step, and against autograd through the very draws of dropout that it made."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch.nn.functional import softplus

from quiltnet.distributed import rank, world_size
from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.patch_dropout import set_patch_dropout
from quiltnet.training.gradcache import cached_backward, check_micro_batch_size, warn_of_batch_statistics
from quiltnet.training.losses import InfoNCE, info_nce
from quiltnet.training.placement import Placement, place
from tests.model.towers import TINY_IMAGE, TINY_TEXT, TINY_VIT, bert_folder
from tests.ranks import run_ranks

MICRO_BATCH_SIZES = [1, 3, 4]  # of 12 pairs of a rank
Gradients = dict[str, Tensor]


def batch(image_size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """12 pairs for each of two ranks; a rank takes its half, one process alone both."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (24, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 10, (24, 12), generator=generator)
    text[:, -1] = 10  # the end token, at which the native text tower pools
    rows = slice(12 * rank(), 12 * rank() + 12) if world_size() > 1 else slice(None)
    return image[rows], text[rows]


def quiet_model(**options: Any) -> nn.Module:
    """Without dropout; few words, so that the optimiser has little to do."""
    torch.manual_seed(0)
    model = build_model(text=TINY_TEXT, embed_dim=16, **{"image": TINY_IMAGE, **options})
    model.clip.token_embedding = nn.Embedding(11, TINY_TEXT["width"])
    return model.double().train()


def noisy_model(folder: Path) -> nn.Module:
    """Dropout of 0.1 (BERT's own), patch dropout of 0.5, and stochastic depth."""
    image = {**TINY_VIT, "timm_drop_path": 0.3}
    text = {"hf_model_name": str(bert_folder(folder)), "context_length": 12}
    torch.manual_seed(0)
    model = build_model(image=image, text=text, embed_dim=16).double()
    set_patch_dropout(model.clip, 0.5)
    return model.train()


class Scaling:
    """Stands in for accelerate; with fp16 it scales the loss before that goes backward."""

    device = torch.device("cpu")

    def __init__(self, loss_scale: float = 1.0) -> None:
        self.loss_scale = loss_scale

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale).backward()


def contrast(features: Any) -> dict[str, Tensor]:
    return {"loss": InfoNCE()(features.image_features, features.text_features, features.logit_scale)}


def backward(model: nn.Module, accelerator: Any, inputs: Any, objective: Callable, micro_batch_size: int | None) -> Any:
    """One step's gradient: of the undivided batch, or in micro-batches."""
    if micro_batch_size is not None:
        return cached_backward(model, accelerator, inputs, objective, micro_batch_size)
    features = model(*inputs)
    values = objective(features)
    accelerator.backward(values["loss"])
    return values, features


def gradients(model: nn.Module) -> Gradients:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


def error(got: Gradients, expected: Gradients) -> float:
    """The largest deviation, in units of the largest number of its tensor."""
    assert got.keys() == expected.keys()
    got, expected = ({name: value.detach() for name, value in values.items()} for values in (got, expected))
    scales = {name: value.abs().max().clamp(min=1e-12) for name, value in expected.items()}
    return max(float((got[name] - value).abs().max() / scales[name]) for name, value in expected.items())


def train(model: nn.Module, accelerator: Any, micro_batch_size: int | None, steps: int = 10) -> Gradients:
    """The parameters after some steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    for step in range(steps):
        backward(model, accelerator, batch(seed=step), contrast, micro_batch_size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name.removeprefix("module."): value.detach() for name, value in model.named_parameters()}


# -- the undivided step, in one process ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undivided() -> Gradients:
    return train(quiet_model(), Scaling(), None)


@pytest.mark.parametrize("micro_batch_size", [*MICRO_BATCH_SIZES, 7])  # 7 does not divide: a shorter one comes last
def test_ten_steps_are_those_of_the_undivided_batch(undivided, micro_batch_size):
    assert error(train(quiet_model(), Scaling(), micro_batch_size), undivided) < 1e-6
    assert error(dict(quiet_model().named_parameters()), undivided) > 1e-3  # training moved them


def test_batchnorm_is_exact_where_it_is_frozen():
    image = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 32}
    for batchnorm, steps in (("frozen", 10), ("train", 1)):
        whole, cached = (
            train(quiet_model(image=image, batchnorm=batchnorm), Scaling(), size, steps) for size in (None, 6)
        )
        assert (error(cached, whole) < 1e-6) == (batchnorm == "frozen")


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 5e-2)])
def test_gradients_in_the_precisions_of_training(precision, tolerance):
    found = []
    AcceleratorState._reset_state()  # it keeps the precision it was first asked for
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    for micro_batch_size in (None, 4):
        model = accelerator.prepare(quiet_model().float())
        backward(model, accelerator, batch(), contrast, micro_batch_size)
        found.append(gradients(model))
    AcceleratorState._reset_state()
    assert error(*found) < tolerance


def everything(features: Any) -> dict[str, Tensor]:
    """Uses all that a model may give: a bias, a second view."""
    image, text, scale, bias, second = features
    views = info_nce(image, second, scale)
    return {
        "loss": softplus(-scale * image @ text.T - bias).mean() + info_nce(image, text, scale) + views,
        "views": views,
    }


@pytest.mark.parametrize("loss_scale", [1, 1024])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_scalars_get_their_gradient_once(loss_scale, micro_batch_size):
    def model() -> nn.Module:
        model = quiet_model()
        model.clip.logit_bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        return model

    image, text = batch()
    inputs = (image, text, image.flip(-1))
    whole, cached = model(), model()
    expected_values, expected_features = backward(whole, Scaling(1), inputs, everything, None)
    values, features = backward(cached, Scaling(loss_scale), inputs, everything, micro_batch_size)
    expected = gradients(whole)
    got = {name: gradient / loss_scale for name, gradient in gradients(cached).items()}
    assert {"clip.logit_scale", "clip.logit_bias"} <= got.keys()
    assert error(got, expected) < 1e-6
    assert values.keys() == {"loss", "views"}
    for result, reference in ((values, expected_values), (features._asdict(), expected_features._asdict())):
        assert not any(value.requires_grad for value in result.values())
        torch.testing.assert_close(result, {name: value.detach() for name, value in reference.items()})


def test_what_is_frozen_or_unused_has_no_gradient():
    def objective(features: Any) -> dict[str, Tensor]:
        return {"loss": info_nce(features.image_features, features.text_features, torch.tensor(10.0))}

    found = []
    for micro_batch_size in (None, 3):
        model = quiet_model()
        model.clip.visual.requires_grad_(False)
        _, features = backward(model, Scaling(), batch(), objective, micro_batch_size)
        assert features.logit_bias is None and features.second_image_features is None
        found.append(gradients(model))
    assert error(found[1], found[0]) < 1e-6
    assert not any(name.startswith("clip.visual") or name == "clip.logit_scale" for name in found[1])


# -- the draws of dropout --------------------------------------------------------------------------------------------


def through_the_draws(model: nn.Module, inputs: Any, objective: Callable, micro_batch_size: int) -> Gradients:
    """The definition: all micro-batches encoded one after another, their graphs kept, one loss, one backward."""
    outputs = [model(*chunk) for chunk in zip(*(part.split(micro_batch_size) for part in inputs), strict=True)]
    image_features, text_features = (torch.cat([output[part] for output in outputs]) for part in (0, 1))
    features = outputs[0]._replace(image_features=image_features, text_features=text_features)
    objective(features)["loss"].backward()
    if world_size() > 1:  # what DDP does
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()
    return gradients(model)


def drawing(features: Any) -> dict[str, Tensor]:
    """A loss that draws as well, as one that leaves out captions does."""
    kept = (torch.rand(len(features.text_features), 1) > 0.3) + 0.1
    return {"loss": InfoNCE()(features.image_features, features.text_features * kept, features.logit_scale)}


def error_through_draws(folder: Path, prepare: Callable[[nn.Module], nn.Module], accelerator: Any) -> dict[str, float]:
    """Of two steps in a row, the second from the random state that the first left behind."""
    inputs = batch(160)
    reference, model = noisy_model(folder), prepare(noisy_model(folder))
    errors = {}
    torch.manual_seed(rank())
    states = [torch.get_rng_state()] * 2
    for step in range(2):
        torch.set_rng_state(states[0])
        expected = through_the_draws(reference, inputs, drawing, 4)
        states[0] = torch.get_rng_state()
        torch.set_rng_state(states[1])
        cached_backward(model, accelerator, inputs, drawing, 4)
        states[1] = torch.get_rng_state()
        errors[f"step {step}"] = error(gradients(model), expected)
        errors[f"random state after step {step}"] = float((states[0] != states[1]).sum())
        for module in (reference, model):
            module.zero_grad(set_to_none=True)
    return errors


def test_gradient_is_that_through_the_draws_of_the_first_pass(tmp_path):
    errors = error_through_draws(tmp_path, lambda model: model, Scaling())
    assert max(errors.values()) < 1e-6, errors


def test_both_passes_draw_the_same(tmp_path):
    model, drawn = noisy_model(tmp_path), []

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        # A compiled module is another one without gradients.
        drawn.append((type(module), torch.is_grad_enabled(), output.detach().clone()))

    kinds = (nn.Dropout, PatchDropout, DropPath)
    drawing_modules = [m for m in model.modules() if isinstance(m, kinds)]
    assert {type(module) for module in drawing_modules} == set(kinds)
    for module in drawing_modules:
        module.register_forward_hook(record)
    inputs = batch(160)
    cached_backward(model, Scaling(), inputs, contrast, 4)
    first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert len(first) > 0
    for (*circumstances, before), (*circumstances_again, after) in zip(first, second, strict=True):
        assert circumstances == circumstances_again
        torch.testing.assert_close(before, after, rtol=0, atol=0)


# -- memory ----------------------------------------------------------------------------------------------------------


class _Saved:
    """A tensor that a graph keeps; counted while the graph lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_of_saved_bytes(micro_batch_size: int | None) -> int:
    alive, peak = 0, 0

    def keep(tensor: Tensor) -> _Saved:
        nonlocal alive, peak
        size = tensor.nbytes
        alive += size
        peak = max(peak, alive)
        saved = _Saved(tensor.detach())  # not its graph: a result that is saved would keep itself alive
        weakref.finalize(saved, forget, size)
        return saved

    def forget(size: int) -> None:
        nonlocal alive
        alive -= size

    model = quiet_model()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        return tensor if tensor.data_ptr() in parameters else keep(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: getattr(saved, "tensor", saved)):
        backward(model, Scaling(), batch(), contrast, micro_batch_size)
    assert alive == 0
    return peak


def test_one_micro_batch_has_a_graph_at_a_time():
    whole = peak_of_saved_bytes(None)
    for micro_batch_size in (1, 3, 6):
        assert peak_of_saved_bytes(micro_batch_size) < 1.2 * whole * micro_batch_size / 24


# -- two ranks -------------------------------------------------------------------------------------------------------


def _reductions(model: nn.Module, accelerator: Accelerator) -> float:
    """How often DDP reduced its one bucket of gradients in a step of four micro-batches."""
    count = 0

    def hook(_, bucket):  # DDP refuses annotations that are strings
        nonlocal count
        count += 1
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, hook)
    cached_backward(model, accelerator, batch(), contrast, 3)
    return count


def _on_two_ranks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for unused, sizes, steps in ((False, MICRO_BATCH_SIZES, 10), (True, [3], 3)):
        # As build_accelerator has it; looking for unused parameters is what deterministic=true does.
        buckets = DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[buckets])
        whole = train(accelerator.prepare(quiet_model()), accelerator, None, steps)
        for size in sizes:
            trained = train(accelerator.prepare(quiet_model()), accelerator, size, steps)
            found[f"ddp, {size}, find_unused_parameters={unused}"] = error(trained, whole)
        found.setdefault("weights", trained)
    for size in (None, 4):
        model = quiet_model()
        model, _ = place(model, torch.optim.AdamW(model.parameters()), accelerator, Placement("fsdp"))
        trained = train(model, accelerator, size, steps)
        trained = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in trained.items()}
        found[f"fsdp, {size}"] = error(trained, whole)
    found |= error_through_draws(folder, accelerator.prepare, accelerator)
    found["reductions"] = _reductions(accelerator.prepare(quiet_model()), accelerator)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("text tower")
    bert_folder(folder)
    return run_ranks(_on_two_ranks, 2, folder)


@pytest.mark.slow
def test_two_ranks_train_as_undivided_batches_do(two_ranks, undivided):
    for found in two_ranks:
        errors = {name: value for name, value in found.items() if isinstance(value, float)}
        assert len(errors) == 10
        assert max(errors.values()) < 1e-6, errors
        assert error(found["weights"], undivided) < 1e-4  # which saw both ranks' pairs; features are float32


@pytest.mark.slow
def test_gradients_are_reduced_once_a_step(two_ranks):
    assert [found["reductions"] for found in two_ranks] == [1, 1]


# -- at the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batch_size", "ranks", "advice"),
    [
        (5, 1, "use 4 or 6"),
        (5, 2, "use 4 or 6"),
        (0, 1, "use 1"),
        (-3, 1, "use 1"),
        (30, 2, "use 12"),
        (25, 1, "use 24"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(micro_batch_size, ranks, advice):
    pairs = 24 // ranks
    with pytest.raises(
        UserError, match=rf"micro_batch_size={micro_batch_size} must divide the {pairs} pairs.*{advice}$"
    ):
        check_micro_batch_size(micro_batch_size, 24, ranks)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 12])
def test_a_size_that_divides_is_taken(micro_batch_size):
    check_micro_batch_size(micro_batch_size, 24, 2)


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_trained_batchnorm_is_told_of(batchnorm, caplog):
    image = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 32}
    model = quiet_model(image=image, batchnorm=batchnorm)
    warn_of_batch_statistics(model, 8)
    assert ("batchnorm=frozen keeps it exact" in caplog.text) == (batchnorm == "train")


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_on_a_gpu_are_replayed(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    accelerator = Scaling()
    accelerator.device = device
    torch.manual_seed(0)
    errors = error_through_draws(tmp_path, lambda model: model.to(device), accelerator)
    assert max(errors.values()) < 1e-6, errors
