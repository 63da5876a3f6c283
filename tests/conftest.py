"""What all tests share: no network, one thread, and the real data where it is at hand."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# Before anything imports the libraries that read these; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"  # tests start several processes on few cores
CACHE = tempfile.TemporaryDirectory(prefix="quiltnet-tests-")  # nothing of a test stays in the user's
os.environ["QUILTNET_CACHE"] = CACHE.name

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first: a long one that began last would keep one process at work, and no other."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real histology tiles and tables (not in the repository); the test is skipped where they are absent."""
    folder = (ROOT / os.environ.get("QUILTNET_SHARED", "../shared") / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; QUILTNET_SHARED names its parent")
    return folder


@pytest.fixture(scope="session")
def drawn_shards(tmp_path_factory) -> Path:
    """A small shard set of drawn tiles: 54 train samples in five tars of uneven size, 6 val samples."""
    from quiltnet.cli.shard import Format, shard

    out = tmp_path_factory.mktemp("drawn") / "set"
    shard(out=out, format=Format.synthetic, samples=60, size=48, samples_per_shard=13)
    return out


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
