"""The Triton kernels: in Triton's interpreter on the CPU, as machine code, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quiltnet.training import kernels
from quiltnet.training.kernels import streamed_info_nce
from quiltnet.training.losses import info_nce
from quiltnet.training.targets import pair_targets
from tests.conftest import ROOT
from tests.training.test_kernels import OPTIONS, ids, in_float64, scalar, unit_features, value_and_gradients

triton = pytest.importorskip("triton")
from quiltnet.training import triton_kernels  # noqa: E402

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
EVERYTHING = ("mask, all", "positive, all")  # in an order: processes must collect the same tests


def features(rows: int, width: int, dtype: torch.dtype, scale: float = 14.25) -> list[torch.Tensor]:
    return [unit_features(rows, width, 0, dtype), unit_features(rows, width, 1, dtype), scalar(scale, torch.float32)]


def dropped(rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(4)) < 0.6


def cases() -> dict[str, tuple[list[torch.Tensor], dict[str, Any]]]:
    """Name -> features and scale, and options. 29 rows in chunks of 20 and blocks of 16: none divides another."""
    found: dict[str, tuple[list[torch.Tensor], dict[str, Any]]] = {}
    for name, options in OPTIONS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for kept in (None, dropped(29)) if dtype == torch.float32 or name in EVERYTHING else (None,):
                case = f"{name}, {dtype}" + ("" if kept is None else ", captions dropped")
                found[case] = (features(29, 19, dtype), {**options, **ids(29), "kept": kept, "chunk_size": 20})
    for dtype in TOLERANCES:
        found[f"wide, at the clamp, {dtype}"] = (features(33, 70, dtype, 100.0), {"chunk_size": 33})
        found[f"one pair, {dtype}"] = (features(1, 19, dtype, 100.0), {})
    numbers = torch.arange(18)
    for name in EVERYTHING:
        for images, captions in ((1, 1), (1, 18), (3, 4)):
            same = {"image_id": numbers % images, "caption_id": numbers % captions, "chunk_size": 17}
            found[f"{name}, {images} images, {captions} captions"] = (
                features(18, 19, torch.float32),
                OPTIONS[name] | same,
            )
        for kept in ([False] * 18, [False] * 17 + [True]):
            found[f"{name}, {sum(kept)} captions take part"] = (
                features(18, 19, torch.float32),
                OPTIONS[name] | ids(18) | {"kept": torch.tensor(kept)},
            )
    zeros = features(18, 19, torch.float32, 100.0)
    zeros[0][2:4], zeros[1][3:6] = 0, 0
    found["zero vectors"] = (zeros, {"chunk_size": 17})
    # Not contiguous, as a slice of a wider table is.
    strided = features(18, 38, torch.float32)
    found["strided"] = ([part[:, ::2] if part.ndim else part for part in strided], {"chunk_size": 17})
    return found


def not_finite() -> dict[str, tuple[list[torch.Tensor], dict[str, Any]]]:
    found = {}
    for bad in (torch.nan, torch.inf):
        for tower in (0, 1):
            for name in ("plain", *EVERYTHING):
                inputs = features(18, 19, torch.float32)
                inputs[tower][16, 3] = bad
                found[f"{name}, {bad} in tower {tower}"] = (inputs, OPTIONS[name] | ids(18) | {"chunk_size": 17})
    return found


def compare(inputs: list[torch.Tensor], options: dict[str, Any], device: str = "cpu") -> list[tuple[float, float]]:
    """Greatest error and greatest value, of the loss and each gradient; the definition is in float64."""
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    inputs = [part.to(device) for part in inputs]
    ours = value_and_gradients(streamed_info_nce, *inputs, **options)
    expected = in_float64(info_nce, *inputs, **{name: options[name] for name in options if name != "chunk_size"})
    return [((a.double() - b).abs().max().item(), b.abs().max().item()) for a, b in zip(ours, expected, strict=True)]


def assert_within(errors: list[tuple[float, float]], tolerance: float) -> None:
    for number, (error, greatest) in enumerate(errors):
        assert error <= tolerance * greatest + 1e-7, f"{number}: {error:.1e} of {greatest:.1e}"  # 0 where all is masked


def interpret(out: Path) -> None:
    """What a process with TRITON_INTERPRET=1 does: triton reads it when it is imported."""
    for dtype in triton_kernels.BLOCKS:
        triton_kernels.BLOCKS[dtype] = triton_kernels.Blocks(16, 16, 32, num_warps=4, num_stages=2)
    triton_kernels._PROGRAMS = 2  # more than one block of columns a program
    kernels._operations = lambda *_: kernels.Operations(
        triton_kernels.forward_chunk, triton_kernels.gradient_chunk, 0, 1
    )
    errors = {name: compare(*case) for name, case in cases().items()}
    losses = {name: streamed_info_nce(*inputs, **options).item() for name, (inputs, options) in not_finite().items()}
    out.write_text(json.dumps({"errors": errors, "losses": losses}), encoding="utf-8")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("interpreted") / "results.json"
    command = [sys.executable, "-m", "tests.training.test_triton_kernels", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", cases())
def test_interpreted_kernel_equals_the_definition(interpreted, case):
    assert_within(interpreted["errors"][case], TOLERANCES[cases()[case][0][0].dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_one_pair_has_no_loss_at_all(interpreted, dtype):
    assert [error for error, _ in interpreted["errors"][f"one pair, {dtype}"]] == [0, 0, 0, 0]


@pytest.mark.parametrize("case", not_finite())
def test_a_feature_that_is_not_finite_gives_a_loss_that_is_not(interpreted, case):
    loss = interpreted["losses"][case]
    assert loss != loss


class AbsentGpu:
    """Stands in for Triton's driver, so that kernels are compiled for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize(
    ("capability", "dtype", "options"),
    [(90, torch.float32, OPTIONS["plain"]), (80, torch.bfloat16, OPTIONS["mask, all"])],
    ids=["Hopper", "Ampere"],
)
def test_launches_become_machine_code(capability, dtype, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []
    for kernel in (triton_kernels._forward, triton_kernels._gradient):

        def compile_only(*args: Any, run: Any = kernel.run, **keywords: Any) -> None:
            compiled.append(run(*args, **{**keywords, "warmup": True, "WIDEN": False}))

        monkeypatch.setattr(kernel, "run", compile_only)
    x, y, scale = features(29, 512, dtype)
    targets = pair_targets(29, x.device, kept=dropped(29) if options else None, **options, **ids(29))
    columns = [torch.zeros(29) for _ in range(3)]
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu(capability))
    triton_kernels.forward_chunk(x[3:23], y, scale, 3, targets, kernels.ColumnStatistics(*columns))
    triton_kernels.gradient_chunk(x[3:23], y, scale, 3, torch.zeros(20), columns[0], targets, [torch.zeros(20, 29)])
    assert len(compiled) == 2
    for kernel in compiled:
        assert kernel.asm["cubin"] and not kernel.metadata.enable_fp_fusion
        assert kernel.metadata.shared <= 99 * 1024  # what a block has on every supported GPU


def test_the_cpu_is_left_to_torch():
    assert not triton_kernels.supports(*features(4, 8, torch.float32)[:2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_small_batches_on_a_gpu():
    for inputs, options in cases().values():
        assert triton_kernels.supports(inputs[0].cuda(), inputs[1].cuda())
        assert_within(compare(inputs, options, device="cuda"), TOLERANCES[inputs[0].dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_whole_blocks_on_a_gpu():
    for dtype, tolerance in TOLERANCES.items():
        for options in OPTIONS.values():
            for rows, width in ((257, 512), (1000, 500)):
                same = {**ids(rows), "kept": dropped(rows), "chunk_size": 300}
                assert_within(compare(features(rows, width, dtype), options | same, device="cuda"), tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_feature_that_is_not_finite_gives_a_loss_that_is_not():
    for inputs, options in not_finite().values():
        same = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        assert streamed_info_nce(*(part.cuda() for part in inputs), **same).isnan()


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert all(row["passed"] for row in found["parity"])
    assert {row["variant"] for row in found["loss"]} >= {"ours", "open_clip"}
    assert [row["compiled"] for row in found["step"]] == [False, True]
    assert 0 <= found["data"][0]["wait_share"] < 1


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
