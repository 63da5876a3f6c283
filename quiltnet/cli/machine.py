"""What a machine offers to a run: libraries, devices, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import quiltnet
from quiltnet.data.device_decoding import device_decoder_reason
from quiltnet.data.worker_pool import available_cores

PACKAGES = (
    "torch", "torchvision", "triton", "open_clip_torch", "timm", "transformers", "accelerate", "webdataset",
    "simplejpeg",
)  # fmt: skip
SHARED_MEMORY = Path("/dev/shm")

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_COMPILERS = ("c++", "g++", "clang++")


def describe_machine() -> dict[str, Any]:
    """All of it, as JSON holds it; None where something is missing, or nothing tells."""
    return {"versions": _versions(), "devices": _devices(), "limits": _limits(), "tools": _tools()}


def _versions() -> dict[str, str | None]:
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() and dist.is_nccl_available() else None
    cudnn = torch.backends.cudnn.version()
    return {
        "quiltnet": quiltnet.__version__,
        "python": platform.python_version(),
        **{name: _version_of(name) for name in PACKAGES},
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "cuDNN": None if cudnn is None else str(cudnn),
        "NCCL": None if nccl is None else ".".join(map(str, nccl)),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": facts.name,
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "capability": f"{facts.major}.{facts.minor}",
                "bf16": facts.major >= 8 or torch.version.hip is not None,
            }
        )
    return found


def _limits() -> dict[str, Any]:
    descriptors, at_most = resource.getrlimit(resource.RLIMIT_NOFILE)
    cores, memory = cgroup_limits()
    shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return {
        "cores": available_cores(),
        "cores_of_container": cores,
        "memory_gib": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "memory_of_container_gib": _gib(memory),
        "shared_memory_gib": _gib(shared.total if shared else None),
        "shared_memory_free_gib": _gib(shared.free if shared else None),
        "file_descriptors": descriptors,
        "file_descriptors_at_most": at_most,
    }


def _tools() -> dict[str, Any]:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    return {
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "NCCL": dist.is_available() and dist.is_nccl_available(),
        "compiler": compiler,
        "jpeg_on_device": device_decoder_reason() or "yes",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE"),
    }


def cgroup_limits(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> tuple[float | None, int | None]:
    """Cores and bytes that the container, or the job, may use; None where there is no such limit.

    Both versions of cgroups; the tightest of the groups that this process is in counts.
    """
    cores, memory = [], []
    for folder in _cgroup_folders(root, own):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quota, period = quota or _read(folder / "cpu.cfs_quota_us"), period or _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # "max" and -1 are no limit
            cores.append(int(quota) / int(period))
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdigit() and int(limit) < 1 << 60:  # version 1 writes a huge number where there is none
            memory.append(int(limit))
    return min(cores, default=None), min(memory, default=None)


def _cgroup_folders(root: Path, own: Path) -> Iterator[Path]:
    """Of this process's groups and the groups around them."""
    for line in _read(own).splitlines():
        _, controllers, group = line.split(":", 2)
        top = root / controllers
        folder = top / group.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place == top or top in place.parents)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # not there, or not for us: nothing is known
        return ""


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)
