"""Shard sets written member by member, with tarfile alone: what is in them is what the test says."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from quiltnet.data.manifest import shard_entry, write_manifest

Members = Mapping[str, "bytes | str"]


def tissue(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Blobs of two colours; as different between seeds as tiles are."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((7, 7)).astype(np.float32)
    mask = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))[..., None]
    one, other = rng.integers(0, 120, 3), rng.integers(140, 256, 3)
    return Image.fromarray((one + (other - one) * mask.clip(0, 1)).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Members | list[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def pair(key: str, image: bytes, *captions: str, extension: str = "jpg", **record: object) -> dict[str, bytes | str]:
    """Members of one sample, as ``quiltnet shard`` writes them."""
    return {f"{key}.{extension}": image, f"{key}.json": json.dumps({"captions": list(captions), **record})}


def write_set(folder: Path, splits: Mapping[str, list[Members]]) -> Path:
    """A shard set with a manifest, a tar for each dict of members."""
    entries = {}
    for split, tars in splits.items():
        shards = []
        for number, members in enumerate(tars):
            path = write_tar(folder / split / f"made-{number:06d}.tar", members)
            keys = {name.rpartition("/")[2].partition(".")[0] for name in members}
            records = [json.loads(data) for name, data in members.items() if name.endswith(".json")]
            captions = sum(len(record["captions"]) for record in records)
            shards.append(shard_entry(path, samples=len(keys), captions=captions, folder=folder))
        totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "captions")}
        entries[split] = {**totals, "shards": shards}
    totals = {name: sum(entry[name] for entry in entries.values()) for name in ("samples", "captions")}
    described = {"schema_version": 2, "creator": "a test", "source": {"made": True}, "seed": 3, "samples_per_shard": 9}
    write_manifest(folder, {**described, "totals": totals, "splits": entries})
    return folder
