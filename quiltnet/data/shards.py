"""Writing image-text shards: rows of a table -> tars of samples, a manifest, and a list of what was left out.

One sample per image and split: ``{key}.jpg`` (or png, ...: the bytes of the file, never encoded again) and
``{key}.json`` with all captions of the image. A shard set is a folder::

    manifest.json    counts, sizes, checksums; see read_manifest
    rejected.jsonl   one line for each row that is not in the shards, with the reason
    train/quilt1m-000000.tar ...    val/quilt1m-000000.tar ...
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any

from webdataset.writer import TarWriter

from quiltnet import __version__
from quiltnet.data.ledger import Ledger
from quiltnet.data.pairs import ImageRows, PairRow, caption_id, image_id, sample_key, short_hash
from quiltnet.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

# The extension of a member says what the bytes are, whatever the file was called.
EXTENSION_OF_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"II[*+]\x00|MM\x00[*+]"), "tif"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"BM"), "bmp"),
)


def folder_reader(images: str | Path) -> Callable[[str], bytes]:
    """``read_image`` for ``write_shards``: the bytes of a file below the folder ``images``."""
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that the image paths of the table start from")
    return lambda path: (folder / path).read_bytes()


def write_shards(
    samples: Sequence[ImageRows],
    out: str | Path,
    *,
    name: str,
    source: dict[str, Any],
    read_image: Callable[[str], bytes],
    check_image: Callable[[bytes], str | None],
    samples_per_shard: int = 1000,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pack ``samples`` into a shard set; the same input gives the same bytes.

    Samples of a split stand in the order of a seeded hash: those of one source are spread over all shards.
    Everything is built in ``out.partial`` and renamed when it is whole, so that a run that is killed leaves
    nothing that looks finished. A row may be rejected, counted and listed, as missing_image,
    unreadable_image, null_caption or unsafe_path.

    Args:
        name: first part of the file names of shards.
        source: what the pairs came from, for the manifest.
        read_image: image path -> bytes; an OSError rejects the image. Called once per sample.
        check_image: why bytes are no usable image, or None.
        overwrite: replace a shard set that is already at ``out``.

    Returns:
        The manifest, as ``read_manifest`` gives it.

    Raises:
        UserError: for a target in use, a split that cannot name a folder, or if not one sample is left.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_target(out, overwrite=overwrite)
    _check_request(samples, samples_per_shard)
    with _built_aside(out) as folder:
        with open(folder / "rejected.jsonl", "w", encoding="utf-8") as file:
            packer = _Packer(read_image, check_image, Ledger(file))
            splits = {
                split: _write_split(map(packer.pack, chosen), folder / split, name, samples_per_shard)
                for split, chosen in _ordered_splits(samples, seed)
            }
        totals = packer.ledger.totals()
        if not totals["samples"]:
            raise UserError(f"no pair is left to pack, rejected are {totals['rejected']}; check table and images")
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "creator": f"quiltnet {__version__}",
            "source": source,
            "seed": seed,
            "samples_per_shard": samples_per_shard,
            "totals": totals,
            "splits": splits,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return manifest


def check_target(out: str | Path, *, overwrite: bool) -> None:
    """Raises UserError if a shard set must not be written to ``out``: only another one is ever replaced."""
    out = Path(out)
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; give another folder, or --overwrite to replace a shard set")
    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise UserError(f"{out} is not a shard set, and is not overwritten; give another folder")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a shard set::

        schema_version, creator, source, seed, samples_per_shard
        totals   rows (= captions + duplicate_captions + all rejected), samples, images, captions,
                 duplicate_captions, rejected {reason: rows}, in_several_splits {images, sources}
        splits   {split: {samples, captions, shards}}
        shards   [{path (from this folder), samples, captions, bytes, sha256}]

    Where ``in_several_splits`` is not 0, what is measured on one split was partly trained on in another.

    Raises:
        UserError: there is none, or a newer quiltnet wrote it.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        manifest["splits"], manifest["totals"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a manifest that `quiltnet shard` wrote; pack the pairs again, or move it away"
        ) from error
    if version > SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}, this quiltnet reads {SCHEMA_VERSION}; update quiltnet")
    return manifest


class _Rejected(Exception):
    """args: reason, and what else rejected.jsonl should say."""


@dataclass
class _Packed:
    """One sample as webdataset's writer takes it."""

    entry: dict[str, Any]  # __key__ and members
    captions: int


@dataclass
class _Packer:
    """Turns the rows of an image into the members of a sample."""

    read_image: Callable[[str], bytes]
    check_image: Callable[[bytes], str | None]
    ledger: Ledger

    def pack(self, sample: ImageRows) -> _Packed | None:
        """None where all rows were rejected."""
        rows = [row for row in sample.rows if _has_text(row)]
        self.ledger.reject([row for row in sample.rows if not _has_text(row)], "null_caption")
        if not rows:
            return None
        try:
            extension, data = self._load(sample.image_path)
        except _Rejected as rejection:
            self.ledger.reject(rows, *rejection.args)
            return None
        distinct: dict[str, PairRow] = {}
        for row in rows:
            distinct.setdefault(caption_id(row.caption), row)
        self.ledger.accept(sample, list(distinct.values()), duplicates=len(rows) - len(distinct))
        record = _describe(sample.image_path, distinct)
        members = {extension: data, "json": json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")}
        return _Packed({"__key__": sample_key(sample.image_path), **members}, captions=len(distinct))

    def _load(self, path: str | None) -> tuple[str, bytes]:
        """(extension, bytes) of an image that decodes."""
        if path is None:
            raise _Rejected("missing_image", "the table names none")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path:
            raise _Rejected("unsafe_path", "must lie below the folder of images")
        try:
            data = self.read_image(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise _Rejected("missing_image") from error
        except OSError as error:
            raise _Rejected("unreadable_image", str(error)) from error
        extension = next((name for magic, name in EXTENSION_OF_MAGIC if magic.match(data)), None)
        defect = self.check_image(data) or (extension is None and "a format that shards do not hold")
        if defect:
            raise _Rejected("unreadable_image", defect)
        return extension, data


def _has_text(row: PairRow) -> bool:
    return isinstance(row.caption, str) and bool(row.caption.strip())


def _describe(path: str, rows: dict[str, PairRow]) -> dict[str, Any]:
    """The sample's json. rows: by caption id; what differs between them is kept a caption."""
    chosen = list(rows.values())
    names = chain.from_iterable(row.metadata for row in chosen)
    values = {name: [row.metadata.get(name) for row in chosen] for name in dict.fromkeys(names)}
    return {
        "captions": [row.caption.strip() for row in chosen],
        "caption_ids": list(rows),
        "image_id": image_id(path),
        "source_id": chosen[0].source_id,
        "image_path": path,
        "metadata": {name: of_rows[0] for name, of_rows in values.items() if _all_equal(of_rows)},
        "caption_metadata": {name: of_rows for name, of_rows in values.items() if not _all_equal(of_rows)},
    }


def _all_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _ordered_splits(samples: Sequence[ImageRows], seed: int) -> Iterator[tuple[str, list[ImageRows]]]:
    def order(sample: ImageRows) -> tuple[str, str]:
        return sample.split, short_hash(f"{seed} {sample.image_path}")

    for split, chosen in groupby(sorted(samples, key=order), key=lambda sample: sample.split):
        yield split, list(chosen)


def _write_split(packed: Iterable[_Packed | None], folder: Path, name: str, samples_per_shard: int) -> dict[str, Any]:
    """Shards of one split; the folder appears with the first. Returns the split's entry in the manifest."""
    shards = []
    numbered = enumerate(sample for sample in packed if sample is not None)
    for number, chunk in groupby(numbered, key=lambda item: item[0] // samples_per_shard):
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{number:06d}.tar"
        shards.append({"path": f"{folder.name}/{path.name}", **_write_tar((sample for _, sample in chunk), path)})
    return {
        "samples": sum(shard["samples"] for shard in shards),
        "captions": sum(shard["captions"] for shard in shards),
        "shards": shards,
    }


def _write_tar(packed: Iterable[_Packed], path: Path) -> dict[str, Any]:
    samples = captions = 0
    # A fixed time and owner: the checksum is one of the contents.
    with (
        open(path, "wb") as file,
        TarWriter(file, encoder=False, mtime=0, user="quiltnet", group="quiltnet") as tar,
    ):
        for sample in packed:
            tar.write(sample.entry)
            samples += 1
            captions += sample.captions
    return {"samples": samples, "captions": captions, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_request(samples: Sequence[ImageRows], samples_per_shard: int) -> None:
    if not samples:
        raise UserError("the table has no row to pack; check the table, and the subset and split asked for")
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard={samples_per_shard}; a shard holds at least 1")
    for split in {sample.split for sample in samples}:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", split, re.ASCII):
            raise UserError(f"split {split!r} cannot name a folder; use letters, digits, _ and - in the split column")


@contextmanager
def _built_aside(out: Path) -> Iterator[Path]:
    """A folder to build in. It takes the name ``out`` when the block ends well, and goes when it does not."""
    partial, replaced = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.replaced")
    try:
        for leftover in (partial, replaced):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give a folder that can") from error
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
