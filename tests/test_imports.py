"""The architecture as a test: who may import whom, and which library stays in which room (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "quiltnet"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

MODEL = {"contrastive", "tokenizer", "weights"}
EVALUATION = {"features", "metrics", "probe", "prompts", "datasets", "retrieval"}

# Room -> what it may import of quiltnet. `errors` is open to all; a wing's __init__ imports nothing.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "distributed": set(),
    "model.contrastive": {"model.tokenizer"},
    "model.tokenizer": set(),
    "model.weights": set(),
    "model.embedder": {"model.contrastive"},
    "model.folder": {"model.contrastive"},
    "model.architecture": {"model.contrastive", "model.folder", "model.weights"},
    "model.assembly": {f"model.{room}" for room in MODEL} | {"model.architecture", "model.folder"},
    "data.captions": set(),
    "data.decoding": set(),
    "data.ledger": {"data.pairs"},
    "data.pairs": set(),
    "data.synthetic": {"data.synthetic_tissue", "data.synthetic_captions"},
    "data.synthetic_tissue": {"data.synthetic_canvas"},
    "data.synthetic_captions": {"data.synthetic_tissue"},
    "data.synthetic_canvas": set(),
    "data.tar_index": set(),
    "data.transforms": {"data.decoding"},
    "data.shards": {"__version__", "data.ledger", "data.pairs"},
    "data.quilt1m": {"data.pairs", "data.tables"},
    "data.tables": {"data.pairs"},
    "data.shard_files": {"data.shards"},
    "data.stored_pairs": {"data.decoding", "data.pairs", "data.shard_files", "data.tar_index"},
    "data.reading": {
        "data.captions", "data.decoding", "data.pairs", "data.shard_files", "data.stored_pairs", "distributed"
    },
    "training.optim": set(),
    "training.checkpoint": set(),
    "training.loggers": set(),
    "training.losses": {"distributed"},
    "training.engine": {"distributed"},
    "training.callbacks": {"distributed", "training.checkpoint", "training.engine", "training.loggers"},
    "evaluation.metrics": set(),
    "evaluation.probe": set(),
    "evaluation.prompts": set(),
    "evaluation.datasets": set(),
    "evaluation.features": {"distributed"},
    "evaluation.retrieval": {f"evaluation.{room}" for room in EVALUATION},
    "evaluation.zeroshot": {f"evaluation.{room}" for room in EVALUATION},
    "evaluation.linear_probe": {f"evaluation.{room}" for room in EVALUATION},
    "evaluation.val_pairs": {f"evaluation.{room}" for room in EVALUATION},
    "release.hub": {
        "model.assembly", "model.contrastive", "model.embedder", "model.folder", "model.weights", "training.checkpoint"
    },
    "__init__": {"release.hub"},
}  # fmt: skip

# Third parties that stay in one place, whatever the room's other freedoms.
CONFINED = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "wandb": {"training.loggers"},
    "typer": {"cli"},
    "webdataset": {"data"},
    "sklearn": {"evaluation"},
}


def room_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Rooms of quiltnet, and top-level names of everything else, that a file imports anywhere."""
    rooms, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top != "quiltnet":
                others.add(top)
            elif rest and rest[0] != "errors":
                is_room = len(rest) > 1 and (PACKAGE / rest[0]).is_dir()
                rooms.add(".".join(rest[:2]) if is_room else rest[0])
    return rooms, others


@pytest.mark.parametrize("path", MODULES, ids=room_of)
def test_imports_go_down_only(path):
    room = room_of(path)
    rooms, others = imports(path)
    if not room.startswith("cli"):  # the door imports everything; nothing imports it
        is_wing = path.name == "__init__.py" and path.parent != PACKAGE
        assert rooms <= (set() if is_wing else ALLOWED[room])
    for library, homes in CONFINED.items():
        if library in others:
            assert any(room == home or room.startswith(f"{home}.") for home in homes), library


def test_every_rule_has_its_room():
    assert set(ALLOWED) <= {room_of(path) for path in MODULES}
