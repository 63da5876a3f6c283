"""One command for a CUDA machine: are the kernels right, what does the loss cost, how fast is a step, who waits?

.venv/bin/python benchmarks/gpu.py [--out gpu.json]   # exit code 1 where a kernel is wrong, 2 without CUDA
.venv/bin/python benchmarks/gpu.py --dry-run          # everything tiny, on the CPU: whether this script runs

Writes one JSON and prints its tables. The loss is measured alone, forward and backward in float32 (d=512), beside
open_clip's ClipLoss, the same under its trainer's bfloat16 autocast, and Inf-CL's kernel where `inf_cl` is installed,
in random turns; memory is the peak above the features themselves. Out of memory is a row. Steps are of `train_step` in
bfloat16 on uint8 images that lie on the device; their FLOPs are counted by torch, and MFU is of the dense peak of the
data sheet (quiltnet/training/flops.py). The wait for data is the time the training loop spends asking the loader, for
512-pixel JPEGs of drawn tiles: more than the device idles, since it runs behind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from gpu_loss import Row, check_parity, empty_memory, measure_losses, spread, synchronize

from quiltnet.cli.shard import Format, shard
from quiltnet.data.prefetching import on_device
from quiltnet.data.reading import build_loader
from quiltnet.data.synthetic import draw_pairs
from quiltnet.data.transforms import TrainTransform
from quiltnet.data.worker_pool import available_cores
from quiltnet.model.assembly import build_model
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training.engine import TrainState, start_training, train_step
from quiltnet.training.flops import flops_per_pair, peak_flops, peak_memory_gib
from quiltnet.training.losses import InfoNCE
from quiltnet.training.objective import Objective
from quiltnet.training.optim import build_optimizer
from quiltnet.training.placement import Placement
from quiltnet.training.precision import build_accelerator


class Plan(NamedTuple):
    """How large everything is."""

    device: torch.device = torch.device("cuda")
    parity_rows: tuple[int, ...] = (1, 257, 4096)
    loss_batches: tuple[int, ...] = tuple(1024 * thousands for thousands in (8, 16, 32, 64, 128, 256))
    rounds: int = 5
    models: tuple[str, ...] = ("ViT-B-32", "ViT-B-16")
    batch_size: int = 1024  # halved until a step fits in memory
    steps: int = 10  # a round
    samples: int = 2048  # in the drawn shards
    stored_size: int = 512  # of their tiles
    workers: int = available_cores()


TINY = Plan(torch.device("cpu"), (1, 37), (32, 64), 1, ("tiny",), 8, 2, 20, 48, 0)


# --- the rate of a step --------------------------------------------------------------------------------------------


def measure_steps(plan: Plan) -> list[Row]:
    return [
        largest_that_fits(plan, partial(measure_step, plan, name, compiled))
        for name in plan.models
        for compiled in (False, True)
    ]


def largest_that_fits(plan: Plan, measure: Callable[[int], Row]) -> Row:
    batch_size = plan.batch_size
    while True:
        empty_memory(plan.device)
        try:
            return measure(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2


def measure_step(plan: Plan, name: str, compiled: bool, batch_size: int) -> Row:
    torch.compiler.reset()
    model = named_model(name)
    batch = drawn_batch(model, batch_size, plan.device)
    flops = flops_per_pair(model, batch.image[:2].cpu(), batch.text[:2].cpu())
    state = train_state(plan, model, batch_size, compiled)
    objective, seconds = Objective(InfoNCE()), []
    for number in range(1 + plan.rounds):
        begun = time.perf_counter()
        for _ in range(plan.steps):  # without waiting for the device in between, as in training
            train_step(state, batch, objective)
        synchronize(plan.device)
        if number:
            seconds.append((time.perf_counter() - begun) / plan.steps)
    row = {"model": name, "compiled": compiled, "batch_size": batch_size, "tokens": batch.text.shape[1]}
    row |= spread(seconds)
    rate = batch_size / row["median_ms"] * 1e3
    peak = peak_flops(device_name(plan.device), "bf16")
    row |= {"samples_per_s": rate, "gflops_per_pair": flops / 1e9}
    return {**row, "mfu": peak and rate * flops / peak, "peak_gib": peak_memory_gib(plan.device)}


def named_model(name: str) -> ContrastiveModel:
    if name != "tiny":
        return build_model(name)
    given = yaml.safe_load((Path(__file__).parents[1] / "conf/model/tiny.yaml").read_text(encoding="utf-8"))
    return build_model(**{key: value for key, value in given.items() if key != "_target_"})


def train_state(plan: Plan, model: ContrastiveModel, batch_size: int, compiled: bool) -> TrainState:
    state = start_training(
        model,
        build_optimizer(model, lr=1e-5),
        lambda *_: 1.0,
        global_batch_size=batch_size,
        accelerator=build_accelerator("bf16", cpu=plan.device.type == "cpu"),
        placement=Placement(compile=compiled),
    )
    state.model.train()
    return state


def drawn_batch(model: ContrastiveModel, batch_size: int, device: torch.device) -> SimpleNamespace:
    captions = [pair.captions[0] for pair in draw_pairs(32, 48)]
    text, _ = model.batch_tokenizer()([captions[number % len(captions)] for number in range(batch_size)])
    shape = (batch_size, 3, model.image_size, model.image_size)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(batch_size, device=device)
    parts = {"image": image.to(device), "text": text.to(device), "second_image": None}
    return SimpleNamespace(**parts, image_id=ids, caption_id=ids)


# --- who waits for data --------------------------------------------------------------------------------------------


def measure_data_wait(plan: Plan, beside: Row) -> list[Row]:
    """``beside``: the row of a step whose model and batch size are taken."""
    batch_size = beside["batch_size"]
    empty_memory(plan.device)
    model = named_model(beside["model"])
    state = train_state(plan, model, batch_size, compiled=False)
    objective = Objective(InfoNCE())
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn"
        shard(out=drawn, format=Format.synthetic, samples=plan.samples, size=plan.stored_size)
        reading = {"global_batch_size": batch_size, "seed": 0, "workers": plan.workers}
        loader = build_loader(drawn / "train", TrainTransform(model.image_size), model.batch_tokenizer(), **reading)
        batches = on_device(iter(loader), plan.device)
        with closing(loader):
            waited = begun = 0.0
            for number in range(plan.steps * (1 + plan.rounds)):
                if number == plan.steps:
                    synchronize(plan.device)
                    waited, begun = 0.0, time.perf_counter()
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                train_step(state, batch, objective)
            synchronize(plan.device)
            elapsed = time.perf_counter() - begun
    rate = plan.rounds * plan.steps * batch_size / elapsed
    row = {"model": beside["model"], "batch_size": batch_size, "workers": plan.workers, "wait_share": waited / elapsed}
    return [{**row, "samples_per_s": rate, "of_the_rate_without_loader": rate / beside["samples_per_s"]}]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def describe(device: torch.device) -> Row:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    packages = ("torch", "triton", "accelerate", "open_clip_torch", "timm")
    return {
        "device": device_name(device),
        "capability": torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cores": available_cores(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages if name != "triton" or importlib.util.find_spec(name)},
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip() or None,
    }


def print_rows(title: str, rows: list[Row]) -> None:
    print(f"\n{title}", flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([as_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{part:.1e}" for part in value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry-run", action="store_true", help="everything tiny, on the CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --dry-run runs everything tiny on the CPU", file=sys.stderr)
        return 2
    plan = TINY if args.dry_run else Plan()
    results: dict[str, Any] = {"machine": describe(plan.device), "dry_run": args.dry_run}
    parts = {
        "parity": (
            "errors of the loss and of its gradients by images, texts, scale",
            lambda: check_parity(plan.device, plan.parity_rows),
        ),
        "loss": ("the loss, forward and backward", lambda: measure_losses(plan.device, plan.loss_batches, plan.rounds)),
        "step": ("a training step in bfloat16", lambda: measure_steps(plan)),
        "data": ("training from shards", lambda: measure_data_wait(plan, results["step"][0])),
    }
    print(json.dumps(results["machine"]), flush=True)
    # A dry run goes the ways of a compiled step, but compiles nothing.
    with torch.compiler.set_stance("force_eager" if args.dry_run else "default"):
        for name, (title, measure) in parts.items():
            results[name] = measure()
            args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")  # whatever comes after
            print_rows(title, results[name])
    print(f"\nwritten to {args.out}")
    return 0 if all(row["passed"] for row in results["parity"]) else 1


if __name__ == "__main__":
    sys.exit(main())
