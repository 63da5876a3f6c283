"""What no line of the package may do, whoever writes it: an audit that runs again with every change (SECURITY.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "quiltnet"

# They run what stands in a file, or in a text.
IMPORTS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "runpy", "shelve", "xml"}
CALLS = {
    "__import__", "eval", "exec", "importlib.import_module", "os.popen", "os.system", "subprocess.call",
    "subprocess.check_call", "subprocess.check_output", "subprocess.getoutput", "yaml.full_load", "yaml.load",
    "yaml.unsafe_load"
}  # fmt: skip
METHODS = {"extract", "extractall"}  # of archives: they are read in place

# What is done with care in these files, and in no other.
PLACES = {
    "Image.open": {"data/examining.py", "evaluation/corruptions.py", "image_opening.py"},
    "h5py.File": {"evaluation/h5_images.py"},
    "instantiate": {"cli/app_server.py", "cli/evaluators.py", "cli/objective.py", "cli/parts.py", "cli/train.py"},
    "subprocess.Popen": {"cli/search_trial.py"},
    "subprocess.run": {"cli/run_directory.py"},
    "torch.jit.load": {"model/torchscript.py"},
}
NEVER = {"allow_pickle": "True", "shell": "True", "trust_remote_code": "True", "weights_only": "False"}


def faults(name: str, code: str) -> Iterator[str]:
    """What is forbidden in a file of that name."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in IMPORTS)
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            # webdataset's decoders unpickle; its one function that is used reads the output of a command.
            others = [
                found for found in imported if found.startswith("webdataset.") and found != "webdataset.gopen.gopen"
            ]
            yield from others + [found for found in imported if found.split(".")[0] in IMPORTS or found in CALLS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield from (f"{key}={value}" for key, value in arguments.items() if NEVER.get(key) == value)
            is_method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
            is_loose = called == "torch.load" and arguments.get("weights_only") != "True"
            if called in CALLS or is_method or is_loose or name not in PLACES.get(called, {name}):
                yield called


def test_the_package_does_nothing_of_it():
    found = {
        name: fault
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in [path.relative_to(PACKAGE).as_posix()]
        for fault in faults(name, path.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import xml.etree", "eval(text)", "yaml.load(file)",
        "torch.load(file)", "torch.load(file, weights_only=False)", "np.load(file, allow_pickle=True)",
        "subprocess.run(command)", "f(shell=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "tar.extractall(folder)", "from webdataset import WebDataset", "from os import system", "Image.open(path)",
        "h5py.File(path)", "instantiate(cfg)", "torch.jit.load(path)",
    ],
)  # fmt: skip
def test_the_audit_sees_it(code):
    assert list(faults("data/any.py", code))


def test_every_place_is_one_where_it_is_done():
    """So that the list does not outlive its reasons."""
    for call, names in PLACES.items():
        assert [name for name in names if f"{call}(" not in (PACKAGE / name).read_text(encoding="utf-8")] == []
