"""What saving adds to a CPU step: written at once against written in the background, in alternation.

.venv/bin/python benchmarks/checkpoint.py [--architecture ViT-B-32] [--batch-size 32] [--rounds 5] [--after 2]

A round makes `--after` steps without a save, with a save that is waited for, and with one in the background, in random
turns; each save is on the disk before the next turn begins. The pause is how long the callback holds the run up, in
wall seconds; the steps after a background save are slower, too, by what its thread takes of the cores to hash and to
write. The state is the architecture's, random, with AdamW's moments.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from quiltnet.model.assembly import build_model
from quiltnet.training.checkpoint import check_checkpoint, load_checkpoint, newest_valid
from quiltnet.training.engine import TrainState, start_training, train_step
from quiltnet.training.losses import InfoNCE
from quiltnet.training.objective import Objective
from quiltnet.training.optim import build_optimizer
from quiltnet.training.precision import build_accelerator
from quiltnet.training.retention import Retention
from quiltnet.training.saving import SaveCheckpoint

MODES = ("no save", "at once", "background")


def build_state(args: argparse.Namespace) -> tuple[TrainState, SimpleNamespace]:
    torch.manual_seed(0)
    model = build_model(args.architecture)
    state = start_training(
        model,
        build_optimizer(model, lr=1e-5),
        lambda *_: 1.0,
        global_batch_size=args.batch_size,
        accelerator=build_accelerator("fp32", cpu=True),
    )
    state.model.train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(args.batch_size)
    batch = SimpleNamespace(
        image=torch.randint(0, 256, (args.batch_size, 3, 224, 224), dtype=torch.uint8, generator=generator),
        text=model.tokenize(["a tile of fatty tissue with scattered lymphocytes"] * args.batch_size),
        second_image=None,
        image_id=ids,
        caption_id=ids,
        key=[],
    )
    return state, batch


def measure(args: argparse.Namespace, root: Path) -> dict[str, dict[str, list[float]]]:
    """Wall seconds by mode: the pause, the steps after it, and until the checkpoint is whole."""
    state, batch = build_state(args)
    objective = Objective(InfoNCE())
    callbacks = {
        mode: SaveCheckpoint(root / mode, 1, Retention(newest=1), background=mode == "background") for mode in MODES[1:]
    }

    def step() -> float:
        begun = time.perf_counter()
        train_step(state, batch, objective)
        return time.perf_counter() - begun

    step()  # allocates gradients and moments
    for callback in callbacks.values():  # allocate their buffers
        callback.save_now(state)
    found: dict[str, dict[str, list[float]]] = {mode: {"pause": [], "steps": [], "whole": []} for mode in MODES}
    for _ in range(args.rounds):
        for mode in random.sample(MODES, len(MODES)):
            begun = time.perf_counter()
            if mode in callbacks:
                callbacks[mode].step_end(state, batch, {})
            found[mode]["pause"].append(time.perf_counter() - begun)
            found[mode]["steps"].append(sum(step() for _ in range(args.after)))
            if mode in callbacks:
                callbacks[mode].settle(wait=True)
            found[mode]["whole"].append(time.perf_counter() - begun)
    return found


def span(values: list[float]) -> str:
    return f"{min(values):.3f} / {statistics.median(values):.3f} / {max(values):.3f}"


def report(args: argparse.Namespace, found: dict[str, dict[str, list[float]]], root: Path) -> None:
    plain = [seconds / args.after for seconds in found["no save"]["steps"]]
    print(
        f"{args.architecture}, AdamW, batch {args.batch_size}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print(f"| a step | {span(plain)} s |")
    for mode in MODES[1:]:
        pauses = found[mode]["pause"]
        share = statistics.median(pauses) / statistics.median(plain)
        slower = [
            (with_save - without) / args.after / statistics.median(plain)
            for with_save, without in zip(found[mode]["steps"], found["no save"]["steps"], strict=True)
        ]
        print(
            f"| {mode} | pause {span(pauses)} s | {100 * share:.1f} % of a step | "
            f"the {args.after} steps after it slower by {100 * statistics.median(slower):.1f} % |"
        )
    newest, _ = newest_valid(root / "background")
    size = sum(path.stat().st_size for path in newest.iterdir())
    print(f"| a checkpoint | {size / 1e9:.2f} GB |")
    for name, look in (
        ("sizes", lambda: check_checkpoint(newest, contents=())),
        ("sizes and checksum of the weights", lambda: check_checkpoint(newest, contents=("model.safetensors",))),
        ("all checksums", lambda: check_checkpoint(newest)),
        ("load, checksums included", lambda: load_checkpoint(newest)),
    ):
        begun, cpu = time.perf_counter(), time.process_time()
        look()
        print(f"| {name} | {time.perf_counter() - begun:.3f} s | {time.process_time() - cpu:.3f} CPU s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--after", type=int, default=2, help="steps after each save")
    parser.add_argument("--folder", help="on the disk that is to be measured")
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report(args, measure(args, Path(folder)), Path(folder))


if __name__ == "__main__":
    main()
