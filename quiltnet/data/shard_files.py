"""What a user calls "the shards" -> the files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand

from quiltnet.data.manifest import MANIFEST_NAME, read_manifest, tars_in
from quiltnet.errors import UserError

HYDRA_QUOTES = (
    "write 'quilt-{000000..000101}.tar', and on a Hydra command line with Hydra's own quotes as well: "
    "\"data.train.shards='quilt-{000000..000101}.tar'\""
)


ShardSpec = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class ShardFile:
    """A local tar, and what a manifest promises of it."""

    path: Path
    samples: int | None = None
    sha256: str | None = None


def resolve_shards(spec: ShardSpec) -> list[ShardFile]:
    """The tars that ``spec`` names, in its order.

    Args:
        spec: one of the following, or a list of them. ``quilt/train``: a split of a shard set, or any folder
            of tars; ``quilt``: a shard set that has a single split; ``quilt-000000.tar``: one tar;
            ``quilt-{000000..000101}.tar``: a brace pattern.

    Raises:
        UserError: nothing is there, or it is not on this machine.
    """
    pieces = [spec] if isinstance(spec, (str, Path)) else list(spec or ())
    paths = [path for piece in pieces for path in _paths(str(piece))]
    if not paths:
        raise UserError("no shards are named; give a folder of shards, a tar, or a list of them")
    promised: dict[Path, ShardFile] = {}
    for folder in {path.parent.parent for path in paths}:
        if (folder / MANIFEST_NAME).is_file():
            splits = read_manifest(folder)["splits"]
            promised.update((shard.path, shard) for name in splits for shard in _listed(folder, name, splits))
    return [promised.get(path, ShardFile(path)) for path in paths]


def fingerprint(shards: Iterable[ShardFile]) -> str:
    """A sha256 of names and contents: the checksums of the manifest, or else the sizes of the files."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.sha256 or shard.path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _paths(piece: str) -> Iterator[Path]:
    if "://" in piece or piece.startswith("pipe:"):
        raise UserError(f"{piece}: shards are read from local disks only; copy them here and give their folder")
    path = Path(os.path.abspath(Path(piece).expanduser()))
    if path.is_dir():
        yield from _paths_in(path)
    elif path.exists():
        yield path
    elif "{" in piece or "}" in piece:
        yield from map(_existing, _expand(piece))
    else:
        _existing(piece)


def _existing(piece: str) -> Path:
    path = Path(os.path.abspath(Path(piece).expanduser()))
    if not path.is_file():
        raise UserError(f"{piece}: there is no such shard; give a folder of shards, a tar, or a brace pattern of tars")
    return path


def _expand(pattern: str) -> list[str]:
    try:
        names = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError as error:
        raise UserError(f"{pattern}: braces do not pair up; {HYDRA_QUOTES}") from error
    if names == [pattern]:
        raise UserError(f"{pattern}: braces hold neither a range {{000..101}} nor a list {{a,b}}; {HYDRA_QUOTES}")
    return names


def _paths_in(folder: Path) -> list[Path]:
    if (folder / MANIFEST_NAME).is_file():
        splits = read_manifest(folder)["splits"]
        packed = {name: shards for name in splits if (shards := _listed(folder, name, splits))}
        if len(packed) > 1:
            choices = ", ".join(str(folder / name) for name in packed)
            raise UserError(f"{folder} holds several splits; name one of {choices}, or a list of them")
        return [_existing(str(shard.path)) for shards in packed.values() for shard in shards]
    if (folder.parent / MANIFEST_NAME).is_file():
        splits = read_manifest(folder.parent)["splits"]
        if folder.name in splits:
            return [_existing(str(shard.path)) for shard in _listed(folder.parent, folder.name, splits)]
    paths = tars_in(folder)
    if not paths:
        raise UserError(f"no shards matched: {folder} holds neither tars nor a manifest; give another folder")
    return paths


def _listed(folder: Path, name: str, splits: Mapping[str, Any]) -> list[ShardFile]:
    """The tars of a split, as the manifest in ``folder`` has them; it may be somebody else's."""
    try:
        entries = [(entry["path"], entry.get("samples"), entry.get("sha256")) for entry in splits[name]["shards"]]
        outside = [path for path, _, _ in entries if path.startswith("/") or ".." in path.split("/")]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST_NAME} does not list the shards of {name}; pack the pairs again") from error
    if outside:
        raise UserError(
            f"{folder / MANIFEST_NAME} names {outside[0]}, which is outside its folder; pack the pairs again"
        )
    return [ShardFile(folder / path, samples, sha256) for path, samples, sha256 in entries]
