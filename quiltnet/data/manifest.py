"""The manifest of a shard set: what is in which tar, how much of it, and what was left out.

Schema 2 added statistics of captions and image sizes, the number of sources, and what filters dropped. A manifest of
schema 1 is read as one of schema 2 that does not know them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quiltnet.errors import UserError
from quiltnet.whole_files import write_whole

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
REJECTED_LIST = "rejected.jsonl"
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a shard set::

        schema_version, creator, source, seed, samples_per_shard, layout
        totals   rows (= captions + duplicate_captions + all rejected), samples, images, captions, sources,
                 duplicate_captions, rejected {reason: rows; what a filter dropped is filtered_...},
                 in_several_splits {images, sources}, caption_words {min, p5, p25, p50, p75, p95, max},
                 image_sizes {width {quantiles}, height {quantiles}, below_64: images with a shorter side},
                 findings {what the source met and worked around: times}
        splits   {split: {samples, captions, shards [{path (from this folder), samples, captions, bytes, sha256}]}}
        prepared what `quiltnet prepare` made of another set, and from which; only there

    Where ``in_several_splits`` is not 0, what is measured on one split was partly trained on in another. What an
    older quiltnet did not count is None (``sources``) or empty (``caption_words``, ``image_sizes``, ``findings``).

    Raises:
        UserError: there is none, or a newer quiltnet wrote it.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = int(manifest["schema_version"])
        manifest["splits"].items(), manifest["totals"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a manifest that `quiltnet shard` wrote; pack the pairs again, or move it away"
        ) from error
    if version > SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}, this quiltnet reads {SCHEMA_VERSION}; update quiltnet")
    manifest["totals"] = {"sources": None, "caption_words": {}, "image_sizes": {}, "findings": {}, **manifest["totals"]}
    return {**manifest, "schema_version": SCHEMA_VERSION}


def tars_in(folder: Path) -> list[Path]:
    """By name; compressed ones too, since a reader that cannot have them should say so."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(TAR_ENDINGS))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); make it readable, or name another") from error


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Whole or absent: the file gets its name when every byte of it is on the disk."""
    write_whole(Path(folder) / MANIFEST_NAME, json.dumps(manifest, indent=1, ensure_ascii=False))


def shard_entry(path: Path, *, samples: int, captions: int, folder: Path) -> dict[str, Any]:
    """What the manifest in ``folder`` says of the finished tar at ``path``, which is read once for its checksum."""
    return {
        "path": path.relative_to(folder).as_posix(),
        "samples": samples,
        "captions": captions,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes, read a MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
