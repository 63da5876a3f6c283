"""The gallery of ``quiltnet app``: captions of shards, encoded at its start, or what ``quiltnet embed`` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quiltnet.cli.check import print_line
from quiltnet.cli.embed_sources import ShardImages
from quiltnet.cli.shard_progress import watch_progress
from quiltnet.data.decoding import BrokenSample
from quiltnet.data.shard_files import ShardSpec, resolve_shards
from quiltnet.data.stored_pairs import StoredPairs
from quiltnet.errors import UserError
from quiltnet.model.embedder import Embedder
from quiltnet.release.app import AppGallery
from quiltnet.release.hub import read_source
from quiltnet.release.run_files import CONFIG_NAME, read_run

NO_GALLERY = "none"
CAPTION_LIMIT = 10_000
BATCH = 64
NEEDED = {"ids", "weights_sha256", "preprocess_cfg", "projected", "data", "data_sha256"}


def find_gallery(source: str, asked: str | None, embedder: Embedder) -> AppGallery | None:
    """What ``--gallery`` names; where it is not given, the held-out captions of the run that ``source`` is of.

    Raises:
        UserError: no such gallery, or features of another model.
    """
    if asked == NO_GALLERY:
        return None
    if asked is None:
        return _gallery_of_run(source, embedder)
    if asked.endswith(".safetensors"):
        return read_embeddings(Path(asked), embedder)
    return encode_captions(asked, embedder)


def encode_captions(shards: ShardSpec, embedder: Embedder) -> AppGallery:
    """The first 10,000 distinct captions of local shards. Raises UserError where there are none."""
    captions = _captions_of(StoredPairs(resolve_shards(shards)))
    features = []
    with closing(watch_progress()) as progress:
        progress.stage("encoding the gallery's captions", len(captions))
        for start in range(0, len(captions), BATCH):
            features.append(embedder.encode_text(captions[start : start + BATCH]))
            progress.advance(len(features[-1]))
    print_line(f"gallery: {len(captions):,} captions of {shards}")
    return AppGallery(captions, torch.cat(features), "caption")


def read_embeddings(path: Path, embedder: Embedder) -> AppGallery:
    """Images by their features; what is shown of one is its captions where its shards are still there, else its name.

    Raises:
        UserError: no file of ``quiltnet embed``, or features of another model, or from before the projection.
    """
    features, metadata = _read_features(path)
    described = embedder.model.describe()
    expected = {"weights_sha256": described["weights_sha256"], "preprocess_cfg": described["preprocess_cfg"]}
    for key, value in {**expected, "projected": True}.items():
        text = value if isinstance(value, str) else json.dumps(value)
        if metadata[key] != text:
            raise UserError(
                f"--gallery {path} has other features than this model gives ({key} is {metadata[key]}, not {text}); "
                "write it again by quiltnet embed with this model, without --before-projection"
            )
    names = json.loads(metadata["ids"])
    labels = _captions_by_row(metadata)
    print_line(f"gallery: {len(names):,} images of {path}{', by their captions' if labels else ''}")
    return AppGallery(labels or names, features, "image")


def _gallery_of_run(source: str, embedder: Embedder) -> AppGallery | None:
    run = read_source(source).run
    is_whole = run is not None and (run / CONFIG_NAME).is_file()
    val = ((read_run(run).config.get("data") or {}).get("val") or {}) if is_whole else {}
    if not val.get("shards"):
        print_line("no gallery: the model does not come with held-out shards; --gallery names some")
        return None
    try:
        return encode_captions(val["shards"], embedder)
    except UserError as error:
        print_line(f"no gallery: {error}")
        return None


def _captions_of(pairs: StoredPairs) -> list[str]:
    captions: dict[str, str] = {}  # without regard to case -> as written first
    broken = 0
    for number in range(len(pairs)):
        try:
            for caption in pairs[number].captions:
                captions.setdefault(caption.casefold(), caption)
        except BrokenSample:
            broken += 1
        if len(captions) >= CAPTION_LIMIT:
            print_line(f"gallery: the first {CAPTION_LIMIT:,} captions, of {number + 1:,} of {len(pairs):,} samples")
            break
    if broken:
        print_line(f"gallery: {broken:,} samples cannot be read and are left out; quiltnet check data says why")
    if not captions:
        raise UserError("the gallery's shards hold no caption that can be read; name others with --gallery")
    return list(captions.values())[:CAPTION_LIMIT]


def _read_features(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Features (N, D) and the file's metadata."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            features = opened.get_tensor("features")
    except (OSError, SafetensorError) as error:
        raise UserError(f"--gallery {path} cannot be read ({error}); give a file that quiltnet embed wrote") from error
    missing = NEEDED - metadata.keys()
    if missing:
        raise UserError(f"--gallery {path} was not written by quiltnet embed: it lacks {', '.join(sorted(missing))}")
    return features.float(), metadata


def _captions_by_row(metadata: dict[str, str]) -> Sequence[str] | None:
    """A text for each row, where the images are of shards that are as they were."""
    try:
        pairs = StoredPairs(resolve_shards(metadata["data"]))
        if ShardImages(metadata["data"]).sha256() != metadata["data_sha256"]:
            return None
        return [" / ".join(pairs[row].captions) for row in range(len(pairs))]
    except (UserError, BrokenSample):
        return None
