"""The package as users get it: what importing costs, what a wheel holds, that an installed copy trains."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

import quiltnet
from tests.conftest import ROOT

HEAVY = {"torch", "open_clip", "transformers", "hydra"}
DISTRIBUTIONS = {
    "PIL": "Pillow",
    "hydra": "hydra-core",
    "open_clip": "open_clip_torch",
    "triton": "torch",  # which brings it where there is one, for Linux; its room is imported only there
    "yaml": "PyYAML",
}
# What others import for us: fsspec reads http(s) with aiohttp, pandas xlsx with openpyxl.
THROUGH_OTHERS = {"aiohttp", "openpyxl"}
# Imported where a user asks for it; an extra installs it.
OPTIONAL = {"datasets", "gradio", "onnxruntime", "optuna", "psutil", "sqlalchemy", "starlette", "submitit"}


def run(cwd: Path, *command: str | Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "call",
    ["import quiltnet", "from quiltnet.cli.app import main; sys.argv[1:] = ['--help']; main()"],
    ids=["import quiltnet", "quiltnet --help"],
)
def test_nothing_heavy_is_imported_before_it_is_used(call):
    code = f"import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules)); {call}"
    loaded = set(run(ROOT, sys.executable, "-c", code).split("LOADED")[1].split())
    assert "quiltnet" in loaded
    assert loaded & HEAVY == set()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a build reads: building leaves nothing in the checkout and finds nothing stale there."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("quiltnet", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(folder, sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", source)
    (path,) = folder.glob("quiltnet-*.whl")
    return path


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, source, wheel, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with QuiltNet installed; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp(request.param)
    run(folder, sys.executable, "-m", "venv", "--without-pip", "venv")
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", "venv/bin/python", "install"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(folder, *pip, *options, *([wheel] if request.param == "wheel" else ["--editable", source]))
    return folder / "venv/bin"


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"quiltnet-{quiltnet.__version__}-")
    assert {f"quiltnet/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "quiltnet").rglob("*.py")} <= names
    info = f"quiltnet-{quiltnet.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"quiltnet", info}
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
def test_requirements_are_what_the_code_imports(wheel):
    metadata = zipfile.ZipFile(wheel).read(f"quiltnet-{quiltnet.__version__}.dist-info/METADATA").decode()
    declared = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata, re.MULTILINE)  # without the extras
    imported = set().union(*(imported_modules(path) for path in (ROOT / "quiltnet").rglob("*.py")))
    needed = {DISTRIBUTIONS.get(module, module) for module in imported - sys.stdlib_module_names - {"quiltnet"}}
    assert canonical(needed - OPTIONAL) | THROUGH_OTHERS == canonical(declared)
    in_extras = re.findall(r"^Requires-Dist: ([\w.-]+).*extra ==", metadata, re.MULTILINE)
    assert needed & canonical(in_extras) >= OPTIONAL


def imported_modules(path: Path) -> set[str]:
    """Top-level names of all that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def canonical(names: Iterable[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


@pytest.mark.slow
def test_installed_copy_trains_outside_the_checkout(installed, tmp_path):
    where = run(tmp_path, installed / "python", "-c", "import quiltnet; print(quiltnet.__file__)")
    assert not where.startswith(str(ROOT))
    quiltnet_command = installed / "quiltnet"
    assert "shard" in run(tmp_path, quiltnet_command, "--help")
    shard = ["shard", "--format", "synthetic", "--samples", "32", "--size", "48", "--out", "data"]
    run(tmp_path, quiltnet_command, *shard)
    train = ["train", "model=tiny", "debug=fast", "data.train.shards=data/train", "run_name=x"]
    run(tmp_path, quiltnet_command, *train)
    assert (tmp_path / "outputs/x/checkpoints/samples-000000000016/model.safetensors").is_file()
