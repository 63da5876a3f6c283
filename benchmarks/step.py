"""One training step on the CPU beside open_clip_train 3.3.0's own, the same model, batch and captions, in alternation.

.venv/bin/python benchmarks/step.py [--precision fp32|bf16] [--rounds 6] [--batch-size 32] [--architecture ViT-B-32]
.venv/bin/python benchmarks/step.py --memory      # peak memory of each, in processes of their own

The peer's step is `open_clip_train.train.train_one_epoch` over a loader of one batch, with the optimiser and schedule
that `open_clip_train.main` makes. It is built twice: how far its two copies lie apart is how far any two numbers of
this run may. Ours is `train_step` on uint8 images, with captions as the training loader gives them (trimmed to the
longest of the batch) and padded to 77 tokens. Both clip gradients at 1. Times are CPU seconds of one thread a sample.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import Tensor

from quiltnet.data.synthetic import draw_pairs
from quiltnet.model.assembly import build_model
from quiltnet.training.engine import start_training, train_step
from quiltnet.training.losses import InfoNCE
from quiltnet.training.objective import Objective
from quiltnet.training.optim import build_optimizer
from quiltnet.training.precision import build_accelerator
from quiltnet.training.schedules import WarmupCosine

LR, BETAS, EPS, WEIGHT_DECAY, STEPS = 1e-5, (0.9, 0.98), 1e-6, 0.2, 10_000
REAL_CAPTIONS = Path(__file__).parents[2] / "shared/data/quilt_like/quilt_1M_lookup.csv"
VARIANTS = ("open_clip", "open_clip again", "ours, padded", "ours, trimmed")


def read_captions(count: int) -> list[str]:
    """Real captions where they lie beside the checkout, else drawn ones."""
    if REAL_CAPTIONS.is_file():
        with REAL_CAPTIONS.open(newline="", encoding="utf-8") as file:
            rows = [row["caption"] for row in csv.DictReader(file) if not row["image_path"].startswith("lc25000")]
    else:
        rows = [pair.captions[0] for pair in draw_pairs(count, 48)]
    return random.Random(0).sample(rows, count)


def peer_step(args: argparse.Namespace, image: Tensor, captions: list[str]) -> Callable[[], None]:
    torch.manual_seed(0)
    precision = {"fp32": "fp32", "bf16": "amp_bf16"}[args.precision]
    model = open_clip.create_model(args.architecture, output_dict=True)
    named = list(model.named_parameters())

    def is_exempt(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))

    groups = [
        {"params": [parameter for name, parameter in named if is_exempt(name, parameter)], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in named if not is_exempt(name, parameter)]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    batch = ((image / 255 - mean) / std, open_clip.get_tokenizer(args.architecture)(captions))

    class Loader(list):
        num_batches, num_samples = 1, args.batch_size

    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader([batch]))}
    options = SimpleNamespace(
        device="cpu", precision=precision, distill=False, accum_freq=1, skip_scheduler=False, horovod=False,
        grad_clip_norm=1.0, rank=0, local_rank=0, world_size=1, batch_size=args.batch_size, log_every_n_steps=100,
        wandb=False, log_local=False,
    )  # fmt: skip
    loss = open_clip.ClipLoss()
    schedule = cosine_lr(optimizer, LR, 10, STEPS)
    return lambda: train_one_epoch(model, data, loss, 0, optimizer, None, schedule, None, options)


def our_steps(args: argparse.Namespace, image: Tensor, captions: list[str]) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model = build_model(args.architecture)
    schedule = WarmupCosine(total_samples=STEPS * args.batch_size, warmup_samples=10 * args.batch_size)
    optimizer = build_optimizer(model, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    accelerator = build_accelerator(args.precision, cpu=True)
    state = start_training(model, optimizer, schedule, global_batch_size=args.batch_size, accelerator=accelerator)
    state.model.train()
    objective, ids = Objective(InfoNCE()), torch.arange(args.batch_size)

    def step_with(text: Tensor) -> Callable[[], None]:
        batch = SimpleNamespace(image=image, text=text, second_image=None, image_id=ids, caption_id=ids, key=[])
        return lambda: train_step(state, batch, objective) and None

    trimmed, _ = model.batch_tokenizer()(captions)
    padded = model.tokenize(captions)
    counts = [model.tokenize.count_tokens(caption) for caption in captions]
    print(
        f"{args.batch_size} captions of {statistics.mean(counts):.1f} tokens on average, at most "
        f"{max(counts)}; text of {trimmed.shape[1]} instead of {padded.shape[1]}",
        file=sys.stderr,
    )
    return {"ours, padded": step_with(padded), "ours, trimmed": step_with(trimmed)}


def build(args: argparse.Namespace, variants: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (args.batch_size, 3, 224, 224), dtype=torch.uint8, generator=generator)
    captions = read_captions(args.batch_size)
    steps: dict[str, Callable[[], None]] = {}
    for variant in variants:
        if variant.startswith("open_clip"):
            steps[variant] = peer_step(args, image, captions)
        elif variant not in steps:
            steps.update(our_steps(args, image, captions))
    return {variant: steps[variant] for variant in variants}


def measure_times(args: argparse.Namespace) -> None:
    steps = build(args, VARIANTS)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for step in steps.values():
        step()  # allocates gradients and moments
    for _ in range(args.rounds):
        for variant in random.sample(VARIANTS, len(VARIANTS)):
            begun = time.process_time()
            steps[variant]()
            seconds[variant].append((time.process_time() - begun) / args.batch_size)
    base = statistics.median(seconds["open_clip"])
    for variant, values in seconds.items():
        rounds = zip(seconds["open_clip"], values, strict=True)
        ratios = sorted(theirs / ours for theirs, ours in rounds)
        print(
            f"{variant:16} CPU s a sample {min(values):.3f} / {statistics.median(values):.3f} / {max(values):.3f}   "
            f"x{base / statistics.median(values):.3f} of open_clip (in the same round "
            f"{ratios[0]:.3f} / {statistics.median(ratios):.3f} / {ratios[-1]:.3f})",
            flush=True,
        )


def measure_memory(args: argparse.Namespace) -> None:
    for variant in ("open_clip", "ours, padded", "ours, trimmed"):
        command = [sys.executable, __file__, "--only", variant, "--precision", args.precision]
        command += ["--batch-size", str(args.batch_size), "--architecture", args.architecture]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"{variant:16} peak of the process {json.loads(told)['peak_gib']:.2f} GiB", flush=True)


def measure_one(args: argparse.Namespace) -> None:
    step = build(args, (args.only,))[args.only]
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak_gib": peak_kib / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    logging.disable()
    if args.only:
        measure_one(args)
    elif args.memory:
        measure_memory(args)
    else:
        measure_times(args)


if __name__ == "__main__":
    main()
