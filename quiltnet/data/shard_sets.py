"""All tars of a shard set by split, for what works through whole sets: checking and preparing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from quiltnet.data.manifest import MANIFEST_NAME, read_manifest, tars_in
from quiltnet.errors import UserError


@dataclass(frozen=True)
class SetShard:
    """A tar, and the entry that a manifest has of it. Neither needs to be there without the other."""

    path: Path
    entry: dict[str, Any] | None = None


@dataclass(frozen=True)
class ShardSet:
    """Attributes:
    root: the folder that the set, or the one split of it, was named by.
    manifest: of the set, where it has one.
    splits: tars by split, in the order of the manifest, then by name.
    """

    root: Path
    manifest: dict[str, Any] | None
    splits: dict[str, list[SetShard]] = field(default_factory=dict)

    @property
    def shards(self) -> list[SetShard]:
        return [shard for shards in self.splits.values() for shard in shards]


def find_shard_set(place: str | Path) -> ShardSet:
    """The tars at ``place``, whether or not they are what a manifest promises.

    Args:
        place: a shard set; one split of it; any folder of tars, or of folders of tars, which are its splits; a tar.

    Raises:
        UserError: no tar is there, or the manifest cannot be read.
    """
    root = Path(os.path.abspath(Path(place).expanduser()))
    if not root.exists():
        raise UserError(f"{place}: there is no such folder; give a folder of shards")
    if root.is_file():
        return ShardSet(root, None, {root.stem: [SetShard(root)]})
    if (root / MANIFEST_NAME).is_file():
        manifest = read_manifest(root)
        if not manifest["splits"]:
            raise UserError(f"{place} has no shards: its manifest lists no split; pack the pairs again")
        return ShardSet(root, manifest, {name: _listed(root, name, manifest) for name in manifest["splits"]})
    if (root.parent / MANIFEST_NAME).is_file():
        manifest = read_manifest(root.parent)
        if root.name in manifest["splits"]:
            return ShardSet(root, manifest, {root.name: _listed(root.parent, root.name, manifest)})
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    found = [(folder.name, tars) for folder in folders if (tars := tars_in(folder))]
    splits = {name: [SetShard(tar) for tar in tars] for name, tars in found}
    if not splits:
        raise UserError(f"no shards matched: {place} holds neither tars nor a manifest; give another folder")
    if len(splits) < len(found):
        raise UserError(
            f"{place} holds tars, and so does the folder {root.name} in it: two splits of one name; rename one of them"
        )
    return ShardSet(root, None, splits)


def _listed(folder: Path, split: str, manifest: dict[str, Any]) -> list[SetShard]:
    """The tars of a split that the manifest lists, and behind them those that it does not."""
    if split in ("", ".", "..") or "/" in split:
        raise UserError(f"{folder / MANIFEST_NAME} has a split {split!r}, which names no folder; pack the pairs again")
    try:
        entries = {folder / _inside(entry["path"], folder): entry for entry in manifest["splits"][split]["shards"]}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST_NAME} does not list the shards of {split}; pack the pairs again"
        ) from error
    found = [path for path in tars_in(folder / split) if path not in entries] if (folder / split).is_dir() else []
    return [SetShard(path, entry) for path, entry in entries.items()] + [SetShard(path) for path in found]


def _inside(path: str, folder: Path) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise UserError(f"{folder / MANIFEST_NAME} names {path}, which is outside its folder; pack the pairs again")
    return path
