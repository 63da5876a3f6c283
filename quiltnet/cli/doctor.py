"""``quiltnet doctor``: what this machine is, whether it trains rightly, and what both mean for a run.

Machine and tests are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quiltnet.cli.check import print_line
from quiltnet.cli.tables import print_table

if TYPE_CHECKING:
    from quiltnet.cli.self_test import Outcome

# ViT-B-32 at 224 pixels, whole captions: what flops_per_pair counts, and bytes of a tile as the loader hands it over.
FLOPS_OF_B32 = 44.1e9
TILE_BYTES = 3 * 224 * 224

# conf/train.yaml and the loader's defaults, by which the needs of a run are told.
_BATCH_SIZE, _BATCHES_A_WORKER = 256, 3
_DESCRIPTORS, _USUAL_WORKERS = 4096, 8
_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads them


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the self-test.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices and limits, test the machine for some twenty seconds, and say what it means for a run.

    Exit code 1 where a test failed.
    """
    from quiltnet.cli.machine import describe_machine

    machine = describe_machine()
    if not as_json:
        _print_machine(machine)
    outcomes = [] if quick else list(_tested(as_json))
    advice = [*advise_on_machine(machine), *advise_on_rates(machine, _figures(outcomes))]
    if as_json:
        tests = [asdict(outcome) for outcome in outcomes]
        print(json.dumps({"machine": machine, "self_test": tests, "advice": advice}, indent=2))
    else:
        print_line("\n".join(["", *(f"- {sentence}" for sentence in advice)]))
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    if failed:
        Console(stderr=True, soft_wrap=True).print(f"self-test failed: {', '.join(failed)}", style="bold red")
        raise typer.Exit(1)


def advise_on_machine(machine: Mapping[str, Any]) -> Iterator[str]:
    """What the facts mean for a run, a sentence each."""
    devices, limits, tools = machine["devices"], machine["limits"], machine["tools"]
    if not devices:
        yield "there is no CUDA device: a run trains on the CPU, which suits small towers and trials (model=tiny)"
    elif all(device["bf16"] for device in devices):
        yield "precision=bf16 is the precision to train in on this device"
    else:
        yield "not every device computes in bfloat16: train with precision=fp16"
    if len(devices) > 1:
        yield (
            f"{len(devices)} devices: start a run with torchrun --nproc-per-node {len(devices)} train.py …; how they "
            "are linked is not looked at (nvidia-smi topo -m tells)"
        )
        if not tools["NCCL"]:
            yield "this torch has no NCCL, so several GPUs cannot train together: install a CUDA build of torch"
    if not tools["gloo"]:
        yield "this torch has no gloo, so several processes cannot train together on the CPU"
    yield from _advise_on_limits(limits)
    if tools["compiler"] is None:
        yield "no C++ compiler was found: placement.compile=true needs one (apt install g++)"
    if str(tools["HF_HUB_OFFLINE"]).upper() in _TRUE:
        yield f"HF_HUB_OFFLINE={tools['HF_HUB_OFFLINE']}: weights and tokenisers must be on this disk already"


def _advise_on_limits(limits: Mapping[str, Any]) -> Iterator[str]:
    of_worker = _BATCHES_A_WORKER * _BATCH_SIZE * TILE_BYTES / 2**30
    free = limits["shared_memory_free_gib"]
    if free is not None and free < _USUAL_WORKERS * of_worker:
        yield (
            f"/dev/shm has {free} GiB free, and a loader process keeps up to {of_worker:.2f} GiB there (three batches "
            f"of {_BATCH_SIZE} tiles of 224 pixels): start the container with --shm-size=8g, or take fewer "
            "data.train.workers"
        )
    descriptors = limits["file_descriptors"]
    if descriptors < _DESCRIPTORS:
        more = min(65536, limits["file_descriptors_at_most"])
        yield (
            f"file descriptors: {descriptors} a process, and each batch that waits for the trainer is some open files; "
            f"say `ulimit -n {more}` in the shell that starts a run with many workers"
        )
    cores = limits["cores_of_container"]
    if cores is not None and cores < limits["cores"]:
        yield f"the container may use {cores:g} of the {limits['cores']} cores it sees: that is what workers share"
    memory = limits["memory_of_container_gib"]
    if memory is not None and memory < limits["memory_gib"]:
        yield f"the container may use {memory} of {limits['memory_gib']} GiB: what takes more is killed, often silently"


def advise_on_rates(machine: Mapping[str, Any], figures: Mapping[str, float]) -> Iterator[str]:
    """How many loader processes keep a device busy, by what was measured."""
    if not {"images_per_s_a_core", "tflops_per_s"} <= set(figures):
        return
    needed = figures["tflops_per_s"] * 1e12 / FLOPS_OF_B32
    a_core = figures["images_per_s_a_core"]
    workers = math.ceil(needed / a_core)
    devices = max(len(machine["devices"]), 1)
    limits = machine["limits"]
    cores = min(limits["cores"], limits["cores_of_container"] or math.inf)
    name = machine["devices"][0]["name"] if machine["devices"] else "this CPU"
    yield (
        f"the loader gives {a_core:.0f} images/s a core; a ViT-B-32 on {name} takes about {needed:.3g} pairs/s at the "
        f"rate measured here: data.train.workers={workers}"
    )
    if machine["devices"] and workers * devices > cores:
        yield (
            f"{devices} device(s) would want {workers * devices} cores for the loader, and there are {cores:g}: resize "
            "the images once with `quiltnet prepare`, or let the device decode (data.decode=cuda)"
        )


def _tested(quietly: bool) -> Iterator[Outcome]:
    from quiltnet.cli.self_test import run_self_test, self_tests

    table = Table("self-test", "", "what was found", "seconds")
    for name in self_tests():
        with Console(stderr=True).status(f"self-test: {name}"):
            outcome = run_self_test(name)
        verdict, style = ("ok", None) if outcome.passed else ("failed", "bold red")
        table.add_row(name, verdict, escape(outcome.detail), f"{outcome.seconds:.1f}", style=style)
        yield outcome
    if not quietly:
        print_table(table)


def _figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {name: value for outcome in outcomes for name, value in outcome.figures.items()}


def _print_machine(machine: Mapping[str, Any]) -> None:
    table = Table(show_header=False)
    for number, device in enumerate(machine["devices"]):
        bf16 = "bfloat16" if device["bf16"] else "no bfloat16"
        facts = f"{device['name']}, {device['memory_gib']} GiB, capability {device['capability']}, {bf16}"
        table.add_row(f"cuda:{number}", escape(facts))
    if not machine["devices"]:
        table.add_row("devices", "CPU alone")
    for part in ("versions", "limits", "tools"):
        table.add_section()
        for name, value in machine[part].items():
            table.add_row(name.replace("_", " ") if part == "limits" else name, escape(_in_words(value)))
    print_table(table)


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
