"""Twenty seconds in which a machine shows that it trains rightly, and how fast.

Wings are imported where they are used: the processes of the first test import this module, and need little of it.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from quiltnet.data.worker_pool import available_cores, leave_with_parent
from quiltnet.training.losses import InfoNCE, info_nce

IMAGE_SIZE, STORED_SIZE = 224, 512

_TIMEOUT_S = 60.0  # for the processes of the first test
_SIZES = (5, 3)  # pairs of its ranks
_MEASURED_S = 2.0  # that a rate is measured for
_LOADER_BATCH, _WORKERS_AT_MOST = 32, 32
_DRAWN, _STORED = 12, 192  # tiles, and samples that show one of them each


@dataclass(frozen=True)
class Outcome:
    """What came of one test. figures: what it measured, by name and unit."""

    name: str
    passed: bool
    detail: str
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


class _Failed(Exception):
    """args: what is wrong."""


def self_tests() -> dict[str, Callable[[], tuple[str, dict[str, float]]]]:
    """By name; each gives a sentence and what it measured, and raises where something is wrong."""
    return {
        "gather gradient": check_gather_gradient,
        "loss kernel": check_kernel,
        "loader": measure_loader,
        "step": measure_step,
    }


def run_self_test(name: str) -> Outcome:
    begun = time.perf_counter()
    try:
        detail, figures = self_tests()[name]()
    except Exception as error:  # whatever a machine does wrong is what is looked for
        words = str(error) if isinstance(error, _Failed) else f"{type(error).__name__}: {_last_line(error)}"
        return Outcome(name, False, words, time.perf_counter() - begun)
    return Outcome(name, True, detail, time.perf_counter() - begun, figures)


def check_gather_gradient() -> tuple[str, dict[str, float]]:
    """The gradient of two processes is that of one: through the gather, with ranks of uneven size."""
    on_cuda = torch.cuda.device_count() >= 2 and dist.is_nccl_available()
    backend = "nccl" if on_cuda else "gloo"
    with tempfile.TemporaryDirectory(prefix="quiltnet-") as folder:
        context = mp.spawn(_one_rank, args=(folder, backend), nprocs=len(_SIZES), join=False)
        _wait_for(context)
        gradients = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(len(_SIZES))]
    weight, image, text = _problem(torch.device("cpu"))
    info_nce(F.normalize(image @ weight), F.normalize(text @ weight), torch.tensor(14.3)).backward()
    error = max(_relative_error(gradient, weight.grad) for gradient in gradients)
    _demand(error <= 1e-9, f"two processes ({backend}) and one differ by {error:.0e} of the gradient")
    return f"two processes ({backend}) have the gradient of one, to {error:.0e}", {}


def check_kernel() -> tuple[str, dict[str, float]]:
    """The streamed loss and its gradients are those of the definition, on the device that would train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = []
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        generator = torch.Generator().manual_seed(0)
        image, text = (
            F.normalize(torch.randn(1100, 64, generator=generator, dtype=torch.float64)).to(device, dtype)
            for _ in range(2)
        )
        exact = _value_and_gradients(info_nce, image.double(), text.double())
        ours = _value_and_gradients(InfoNCE(), image, text)
        error = max(_relative_error(a.double(), b) for a, b in zip(ours, exact, strict=True))
        name = str(dtype).removeprefix("torch.")
        _demand(
            error <= bound, f"in {name} on {device} the streamed loss is off by {error:.0e}; {bound:.0e} is allowed"
        )
        words.append(f"{name} {error:.0e}")
    return f"streamed and dense loss agree on {device.type}: {', '.join(words)}", {}


def measure_loader() -> tuple[str, dict[str, float]]:
    """Training's own road from a tar to a batch, on drawn JPEGs that the system holds in memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="quiltnet-") as folder:
            size = _write_shard(Path(folder) / "drawn.tar")
            one = _loader_rate(folder, workers=0)
            workers = min(available_cores(), _WORKERS_AT_MOST)
            several = _loader_rate(folder, workers=workers) if workers > 1 else one
    finally:
        torch.set_num_threads(threads)
    figures = {"images_per_s_a_core": one, "images_per_s": several, "workers": float(workers)}
    of = f"JPEGs of {STORED_SIZE} pixels and {size / 1000:.0f} kB"
    return f"{one:.0f} images/s on one core, {several:.0f} with {workers} workers ({of})", figures


def measure_step() -> tuple[str, dict[str, float]]:
    """Training steps: ViT-B-32 on a GPU, a small pair of towers on a CPU."""
    from quiltnet.model.assembly import build_model
    from quiltnet.training.engine import start_training, train_step
    from quiltnet.training.flops import flops_per_pair, peak_flops
    from quiltnet.training.objective import Objective
    from quiltnet.training.optim import build_optimizer
    from quiltnet.training.precision import build_accelerator
    from quiltnet.training.schedules import WarmupConstant

    on_cuda = torch.cuda.is_available()
    precision = "bf16" if on_cuda and torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    accelerator = build_accelerator(precision)
    torch.manual_seed(0)
    model = build_model("ViT-B-32") if on_cuda else build_model(image=_SMALL_IMAGE, text=_SMALL_TEXT, embed_dim=256)
    model.to(accelerator.device)
    batch = _pairs(256 if on_cuda else 16, accelerator.device)
    flops = flops_per_pair(model, batch.image[:2], batch.text[:2])
    state = start_training(
        model,
        build_optimizer(model, lr=1e-5),
        WarmupConstant(total_samples=1 << 30, warmup_samples=0),
        global_batch_size=len(batch.text),
        accelerator=accelerator,
    )
    state.model.train()
    objective = Objective(InfoNCE())
    rate = len(batch.text) * _rate(lambda: train_step(state, batch, objective), warm_up=5 if on_cuda else 1)
    name = torch.cuda.get_device_name() if on_cuda else "the CPU"
    figures = {"pairs_per_s": rate, "flops_per_pair": flops, "tflops_per_s": rate * flops / 1e12}
    peak = peak_flops(name, precision)
    if peak is not None:
        figures["mfu"] = rate * flops / peak
    words = f"{'ViT-B-32' if on_cuda else 'two small towers'} on {name} in {precision}: {rate:.1f} pairs/s"
    used = f" ({figures['mfu']:.0%} of the peak)" if peak is not None else ""
    return f"{words}, {figures['tflops_per_s']:.3g} TFLOP/s{used}", figures


_SMALL_IMAGE = {"image_size": IMAGE_SIZE, "patch_size": 32, "width": 256, "head_width": 64, "layers": 4}
_SMALL_TEXT = {"context_length": 77, "width": 256, "heads": 4, "layers": 4}


def _one_rank(rank: int, folder: str, backend: str) -> None:
    leave_with_parent()
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=len(_SIZES))
    weight, image, text = _problem(device)
    own = slice(sum(_SIZES[:rank]), sum(_SIZES[: rank + 1]))
    features = F.normalize(image[own] @ weight), F.normalize(text[own] @ weight)
    InfoNCE()(*features, torch.tensor(14.3, device=device), sizes=_SIZES).backward()
    dist.all_reduce(weight.grad)
    torch.save(weight.grad.cpu() / len(_SIZES), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _problem(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A tower (16, 16) that both sides share, and the inputs of all pairs."""
    generator = torch.Generator().manual_seed(0)
    weight, *pairs = (
        torch.randn(rows, 16, generator=generator, dtype=torch.float64).to(device) for rows in (16, *[sum(_SIZES)] * 2)
    )
    return weight.requires_grad_(), *pairs


def _wait_for(context: Any) -> None:
    """Until all processes have ended; those that have not in time, or when the user interrupts, are killed."""
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while not context.join(timeout=0.2):
            _demand(time.monotonic() < deadline, f"two processes did not come together within {_TIMEOUT_S:.0f} s")
    finally:
        for process in context.processes:
            process.kill()


def _value_and_gradients(loss: Callable[..., Tensor], image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    inputs = (image.requires_grad_(), text.requires_grad_(), image.new_tensor(14.3).requires_grad_())
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


def _relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).abs().max() / exact.abs().max())


def _write_shard(tar: Path) -> float:
    """An indexed shard of samples; mean bytes of an image."""
    from PIL import Image

    from quiltnet.data.synthetic import draw_pairs
    from quiltnet.data.tar_index import write_index

    tiles = []
    for pair in draw_pairs(_DRAWN, STORED_SIZE):
        buffer = io.BytesIO()
        Image.fromarray(pair.image).save(buffer, "JPEG", quality=90)
        tiles.append((buffer.getvalue(), pair.captions[0].encode()))
    with tarfile.open(tar, "w") as file:
        for number in range(_STORED):
            for extension, data in zip(("jpg", "txt"), tiles[number % _DRAWN], strict=True):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    write_index(tar)
    return sum(len(image) for image, _ in tiles) / len(tiles)


def _loader_rate(folder: str, workers: int) -> float:
    """Images a second, once every worker has given a batch."""
    from quiltnet.data.reading import build_loader
    from quiltnet.data.transforms import TrainTransform
    from quiltnet.model.tokenizer import BatchTokenizer, bpe_tokenizer

    loader = build_loader(
        folder,
        TrainTransform(IMAGE_SIZE),
        BatchTokenizer(bpe_tokenizer(77), trim=True),
        global_batch_size=_LOADER_BATCH,
        seed=0,
        workers=workers,
        rank=0,
        world_size=1,
    )
    try:
        batches = iter(loader)
        return _LOADER_BATCH * _rate(lambda: next(batches), warm_up=3 * workers + 1)
    finally:
        loader.close()


def _pairs(batch_size: int, device: torch.device) -> Any:
    ids = torch.arange(batch_size)
    image = torch.randint(0, 256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    text = torch.randint(1, 40_000, (batch_size, 77))
    return SimpleNamespace(
        image=image.to(device),
        text=text.to(device),
        second_image=None,
        image_id=ids,
        caption_id=ids,
        key=[],
        rejected=[],
    )


def _rate(work: Callable[[], Any], warm_up: int) -> float:
    """Calls a second."""
    for _ in range(warm_up):
        work()
    begun, done = _now(), 0
    while done < 2 or time.perf_counter() - begun < _MEASURED_S:
        work()
        done += 1
    return done / (_now() - begun)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _demand(is_met: bool, otherwise: str) -> None:
    if not is_met:
        raise _Failed(otherwise)


def _last_line(error: Exception) -> str:
    """A process that failed hands its whole traceback over; its last line is the reason."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
