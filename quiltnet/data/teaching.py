"""A shard set again, with a frozen teacher's features beside each sample, and what the manifest says of the teacher."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quiltnet.data.decoding import BrokenSample, decode_pil
from quiltnet.data.manifest import MANIFEST_NAME, REJECTED_LIST, read_manifest, sha256_of, shard_entry, write_manifest
from quiltnet.data.remote_files import Unreachable, read_whole
from quiltnet.data.remote_shards import is_remote
from quiltnet.data.remote_sources import Patience, is_command
from quiltnet.data.shard_files import ShardSpec, resolve_shards
from quiltnet.data.shard_sets import SetShard, ShardSet, find_shard_set
from quiltnet.data.stored_pairs import StoredPair, pair_from_members
from quiltnet.data.tar_index import TarIndex, open_index, write_index
from quiltnet.data.teacher_features import TEACHER_EXTENSION, pack_features
from quiltnet.data.workplace import WORK, built_aside, check_target
from quiltnet.errors import UserError
from quiltnet.whole_files import write_whole

Progress = Callable[[int, int, int], None]  # shards done, all shards, samples


class Teacher(Protocol):
    """A ``ContrastiveModel`` is one, in eval mode and on its device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]: ...

    def tokenize(self, captions: list[str]) -> Tensor: ...

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D') unit length."""
        ...

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, L) -> (B, D') unit length."""
        ...


class WeightedShards(Protocol):
    shards: Any
    weight: float | None


@dataclass(frozen=True)
class Work:
    """Attributes:
    folder: of the set in the making.
    readers: threads that decode.
    """

    teacher: Teacher
    folder: Path
    batch_size: int
    readers: ThreadPoolExecutor

    def record(self, shard: SetShard) -> Path:
        """What is known of a finished tar, for a run that goes on after a stop."""
        return self.folder / WORK / "finished" / f"{shard.entry['path']}.json"

    def target(self, shard: SetShard) -> Path:
        return self.folder / shard.entry["path"]


@dataclass
class _Lesson:
    """A sample on its way; pixels: (3, H, W), None where it cannot be used."""

    key: str
    members: dict[str, bytes]
    pair: StoredPair | None = None
    pixels: Tensor | None = field(default=None, repr=False)


def teach_shards(
    source: str | Path,
    out: str | Path,
    teacher: Teacher,
    facts: Mapping[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the set at ``source`` to ``out``, every member byte for byte, with the teacher's features added.

    An image is seen as the teacher's evaluation transform shows it. A sample whose image does not decode is copied
    without features. A run that was stopped is continued by the same call, from the tars that it had finished.

    Args:
        source: a shard set with its manifest.
        out: a folder that does not exist.
        facts: JSON by which the teacher is known: ``name``, ``embed_dim``, ``logit_scale``, ``sha256``.
        workers: threads that decode images.
        progress: called with (shards done, all shards, samples written).
        say: is told in a sentence when what another run has left is thrown away.

    Returns:
        The manifest of the new set: that of the old one with new checksums, and ``teacher``, which holds ``facts`` and
        the number of samples ``without`` features.

    Raises:
        UserError: no shard set, a tar that is not what the manifest says, or a target in use.
    """
    found, out = _find_set(source), Path(os.path.abspath(Path(out).expanduser()))
    if found.root in (out, *out.parents) or out in found.root.parents:
        raise UserError(f"{out} is, holds or lies in the source {found.root}; give a folder elsewhere")
    check_target(out, overwrite=False)
    request = {"from": sha256_of(found.root / MANIFEST_NAME), "teacher": dict(facts)}
    shards = [shard for shard in found.shards if shard.entry is not None]
    seen, without = 0, 0
    with built_aside(out, request, say) as folder, ThreadPoolExecutor(workers) as readers:
        for pattern in ("*/.*.unfinished", "*/.*.index.*"):  # of a run that was killed
            for leftover in folder.glob(pattern):
                leftover.unlink()
        work = Work(teacher, folder, batch_size, readers)
        records = {}
        for done, shard in enumerate(shards, start=1):
            record = _finished(shard, work) or _teach_shard(shard, work)
            records[shard.entry["path"]] = record["entry"]
            seen, without = seen + record["entry"]["samples"], without + record["without"]
            if progress is not None:
                progress(done, len(shards), seen)
        manifest = {**found.manifest, "splits": _splits(found.manifest, records)}
        manifest["teacher"] = {**facts, "without": without}
        if (found.root / REJECTED_LIST).is_file():
            shutil.copyfile(found.root / REJECTED_LIST, folder / REJECTED_LIST)
        write_manifest(folder, manifest)
    return manifest


def stored_teacher(shards: ShardSpec | Mapping[str, WeightedShards]) -> dict[str, Any] | None:
    """What the manifests of shards say of the teacher whose features these hold; None where one of them says nothing.

    Args:
        shards: as ``build_loader`` takes them.

    Raises:
        UserError: the sources were taught by different teachers.
    """
    specs = [source.shards for source in shards.values()] if isinstance(shards, Mapping) else [shards]
    teachers = [manifest.get("teacher") for spec in specs for manifest in _manifests(spec)]
    if not teachers or None in teachers:
        return None
    if len({teacher["sha256"] for teacher in teachers}) > 1:
        names = " and ".join(sorted({str(teacher["name"]) for teacher in teachers}))
        raise UserError(f"the sources hold features of several teachers, {names}; write them anew by one of them")
    return teachers[0]


def _find_set(source: str | Path) -> ShardSet:
    found = find_shard_set(source)
    if found.manifest is None or not (found.root / MANIFEST_NAME).is_file():
        raise UserError(
            f"{source} is not a whole shard set with its manifest; give the folder that `quiltnet shard` made "
            "(it takes other tars by --format webdataset)"
        )
    return found


def _finished(shard: SetShard, work: Work) -> dict[str, Any] | None:
    try:
        record = json.loads(work.record(shard).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    target = work.target(shard)
    return record if target.is_file() and target.stat().st_size == record["entry"]["bytes"] else None


def _teach_shard(shard: SetShard, work: Work) -> dict[str, Any]:
    """Write, index and record one tar."""
    entry, target, record = shard.entry, work.target(shard), work.record(shard)
    if not shard.path.is_file():
        raise UserError(f"{shard.path} is missing, and the manifest lists it; bring it back, or pack the set again")
    index = open_index(shard.path)
    if index.is_truncated or len(index) != entry["samples"]:
        raise UserError(
            f"{shard.path} holds {len(index)} whole samples, and its manifest says {entry['samples']}; "
            "bring back the tar, or pack the set again"
        )
    for folder in (target.parent, record.parent):
        folder.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    without = 0
    with open(unfinished, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for key, members in _taught(index, work):
                without += TEACHER_EXTENSION not in members
                _write_sample(tar, key, members)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, target)
    write_index(target)
    counts = {"samples": len(index), "captions": entry["captions"]}
    done = {"entry": shard_entry(target, folder=work.folder, **counts), "without": without}
    write_whole(record, json.dumps(done))
    return done


def _taught(index: TarIndex, work: Work) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of each sample, in order."""
    for first in range(0, len(index), work.batch_size):
        numbers = range(first, min(first + work.batch_size, len(index)))
        lessons = list(work.readers.map(lambda number: _read(index, number, work.teacher), numbers))
        whole = [lesson for lesson in lessons if lesson.pixels is not None]
        if whole:
            _add_features(whole, work)
        yield from ((lesson.key, lesson.members) for lesson in lessons)


def _read(index: TarIndex, number: int, teacher: Teacher) -> _Lesson:
    try:
        members = index.read(number, [name for name in index.members(number) if name != TEACHER_EXTENSION])
    except (EOFError, OSError) as error:
        raise UserError(
            f"{index.path} can no longer be read ({error}); bring it back, and the same command continues"
        ) from error
    lesson = _Lesson(index.key(number), members)
    try:
        lesson.pair = pair_from_members(lesson.key, members, "")
        lesson.pixels = teacher.transform(decode_pil(lesson.pair.image))
    except BrokenSample:
        return lesson  # is not trained on either
    return lesson


@torch.inference_mode()
def _add_features(lessons: Sequence[_Lesson], work: Work) -> None:
    teacher = work.teacher
    images = teacher.encode_image(torch.stack([lesson.pixels for lesson in lessons]).to(teacher.device))
    captions = [caption for lesson in lessons for caption in lesson.pair.captions]
    parts = teacher.tokenize(captions).split(work.batch_size)
    texts = torch.cat([teacher.encode_text(part.to(teacher.device)) for part in parts])
    counts = [len(lesson.pair.captions) for lesson in lessons]
    for lesson, image, of_captions in zip(lessons, _numpy(images), texts.split(counts), strict=True):
        lesson.members[TEACHER_EXTENSION] = pack_features(image, _numpy(of_captions))


def _numpy(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


def _write_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Never with a name that leads out of the folder where someone may unpack it."""
    safe = "/".join(part for part in key.split("/") if part not in ("", ".."))
    for extension, data in members.items():
        member = tarfile.TarInfo(f"{safe}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    tar.members.clear()  # tarfile would keep a kilobyte for each


def _splits(manifest: Mapping[str, Any], records: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {**split, "shards": [records[entry["path"]] for entry in split["shards"]]}
        for name, split in manifest["splits"].items()
    }


def _manifests(spec: Any) -> Iterator[dict[str, Any]]:
    """Of every shard set that a source takes shards from; an empty one for shards that have none."""
    pieces = [spec] if isinstance(spec, (str, Path)) else list(spec or ())
    for piece in pieces:
        if is_remote(piece):
            yield _remote_manifest(str(piece))
        else:
            for folder in {shard.path.parent.parent for shard in resolve_shards(piece)}:
                yield read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else {}


def _remote_manifest(piece: str) -> dict[str, Any]:
    """A set, a split of it, or a tar in that: its manifest is there, or one or two folders above."""
    if is_command(piece):
        return {}
    parts = urlsplit(piece)
    path = parts.path.rstrip("/")
    for _ in range(3):
        try:
            data = read_whole(parts._replace(path=f"{path}/{MANIFEST_NAME}").geturl(), Patience())
            manifest = json.loads(data or b"{}")
        except (ValueError, Unreachable):  # a page that says there is no such file
            manifest = {}
        if isinstance(manifest, dict) and "splits" in manifest:
            return manifest
        path = path.rpartition("/")[0]
    return {}
