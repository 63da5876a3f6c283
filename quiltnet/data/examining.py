"""What there is to know of each stored sample, as rows of numbers: a million samples are 200 MB of them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from quiltnet.data.decoding import NPY_MAGIC, BrokenSample, decode_image, read_orientation
from quiltnet.data.manifest import sha256_of
from quiltnet.data.near_duplicates import GRID, POSITIONS, look_of
from quiltnet.data.pairs import caption_id, short_hash
from quiltnet.data.stored_pairs import IMAGE_EXTENSIONS, WANTED_EXTENSIONS, StoredPair, pair_from_members
from quiltnet.data.tar_index import TarIndex, ensure_index
from quiltnet.image_opening import FORMATS

# Of each caption, whether the model's tokeniser cuts it.
Truncated = Callable[[list[str]], Sequence[bool]]

PNG_MAGIC = b"\x89PNG"
_PNG_DEPTH = 24  # where a PNG's header says how many bits a value has
_CAPTIONS_AT_ONCE = 512

IMAGE_FLAGS = ("grey", "palette", "alpha", "cmyk", "over_8_bit", "exif_turned")
CAPTION_FLAGS = ("caption_missing", "caption_empty", "caption_not_text", "caption_garbled", "caption_wordless")

# pixels: hash of the decoded image, equal where all pixels are. look: perceptual hash; turned: in its other positions;
# grid: of grey levels, which confirms it. contrast: of the grey thumbnail. height, width: of the stored image, 0 where
# even its header is not readable. reason: why the sample cannot be used, or empty; decoded says whether its image can.
SAMPLE = np.dtype(
    [
        *((name, "u8") for name in ("file", "pixels", "look")),
        ("turned", "u8", (len(POSITIONS),)),
        ("grid", "u1", (GRID, GRID)),
        *(("height", "i4"), ("width", "i4"), ("contrast", "f4"), ("reason", "S24")),
        *((name, "?") for name in ("decoded", "repeated_key", *IMAGE_FLAGS, *CAPTION_FLAGS)),
    ]
)

# sample: number of the sample that has it, counted as in the array of samples beside it.
CAPTION = np.dtype([("id", "u8"), ("sample", "i8"), ("truncated", "?")])


@dataclass(frozen=True)
class Portion:
    """What is examined in one go: a tar with the manifest's entry of it, or some image files.

    Attributes:
        group: name of the split, or of the evaluation set.
        checksum: whether the tar is read whole for its checksum.
    """

    group: str
    tar: Path | None = None
    entry: dict[str, Any] | None = None
    files: tuple[Path, ...] = ()
    checksum: bool = False


class StoredImage(NamedTuple):
    """key: of the sample, or the path of a file. image_path: what the sample's json calls its image."""

    key: str
    data: bytes
    image_path: str | None


@dataclass(frozen=True)
class Examined:
    """Attributes:
    samples: (N,) SAMPLE.
    captions: (M,) CAPTION.
    defects: (name, detail) of the tar itself.
    """

    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, SAMPLE))
    captions: np.ndarray = field(default_factory=lambda: np.zeros(0, CAPTION))
    defects: list[tuple[str, str]] = field(default_factory=list)


def examine(portion: Portion, truncated: Truncated | None = None) -> Examined:
    """Decode and describe all samples of a portion; whatever is wrong with them is in the answer."""
    if portion.tar is None:
        samples = np.zeros(len(portion.files), SAMPLE)
        for row, path in zip(samples, portion.files, strict=True):
            _examine_file(row, path)
        return Examined(samples)
    try:
        index = TarIndex(portion.tar, ensure_index(portion.tar))
    except FileNotFoundError:
        return Examined(defects=[("missing_shards", "the manifest lists it, and it is not there")])
    except (tarfile.TarError, OSError) as error:
        return Examined(defects=[("unreadable_shards", str(error))])
    samples, texts = np.zeros(len(index), SAMPLE), _Captions(truncated)
    for number, row in enumerate(samples):
        for text in _examine_sample(row, index, number):
            texts.add(number, text)
    keys = np.array([short_hash(index.key(number)) for number in range(len(index))])
    _, inverse, times = np.unique(keys, return_inverse=True, return_counts=True)
    samples["repeated_key"] = times[inverse] > 1
    return Examined(samples, texts.finish(), list(_defects(portion, index)))


def read_stored(portion: Portion, number: int) -> StoredImage:
    """A sample that ``examine`` saw, to be named and shown."""
    if portion.tar is None:
        path = portion.files[number]
        try:
            return StoredImage(str(path), path.read_bytes(), None)
        except OSError:
            return StoredImage(str(path), b"", None)
    index = TarIndex(portion.tar, ensure_index(portion.tar))
    try:
        members = index.read(number, WANTED_EXTENSIONS)
    except (EOFError, OSError):
        return StoredImage(index.key(number), b"", None)
    data = next((data for extension, data in members.items() if extension in IMAGE_EXTENSIONS), b"")
    path = _parse_record(members).get("image_path")
    return StoredImage(index.key(number), data, path if isinstance(path, str) else None)


def _defects(portion: Portion, index: TarIndex) -> Iterator[tuple[str, str]]:
    """What distinguishes the tar from what its manifest says."""
    if index.is_truncated:
        yield "unreadable_shards", "breaks off before its end"
    entry = portion.entry
    if entry is None:
        return
    if len(index) != entry["samples"]:
        yield "miscounted_shards", f"holds {len(index)} samples, the manifest says {entry['samples']}"
    size = portion.tar.stat().st_size
    if size != entry["bytes"]:
        yield "changed_shards", f"has {size} bytes, the manifest says {entry['bytes']}"
    elif portion.checksum and sha256_of(portion.tar) != entry["sha256"]:
        yield "changed_shards", "has another checksum than the manifest says"


def _examine_sample(row: np.ndarray, index: TarIndex, number: int) -> list[str]:
    """Fill ``row``; the captions that can be used."""
    try:
        members = index.read(number, WANTED_EXTENSIONS)
    except (EOFError, OSError) as error:
        row["reason"] = "truncated_tar" if isinstance(error, EOFError) else "unreadable_shard"
        return []
    pair: StoredPair | None = None
    try:
        pair = pair_from_members(index.key(number), members, "")
    except BrokenSample as error:
        row["reason"] = "truncated_tar" if index.may_be_cut(number) else error.reason
    if row["reason"] not in (b"unreadable_json", b"truncated_tar"):
        for flag in _caption_defects(members):
            row[flag] = True
    image = next((data for extension, data in members.items() if extension in IMAGE_EXTENSIONS), None)
    if image is not None:
        _examine_image(row, image)
    return pair.captions if pair is not None else []


def _examine_file(row: np.ndarray, path: Path) -> None:
    try:
        _examine_image(row, path.read_bytes())
    except OSError:
        row["reason"] = "unreadable_file"


def _examine_image(row: np.ndarray, data: bytes) -> None:
    row["file"] = _hash64(data)
    _examine_header(row, data)
    try:
        pixels = decode_image(data)
    except BrokenSample as error:
        row["reason"] = row["reason"] or error.reason
        return
    row["decoded"] = True
    row["height"], row["width"] = pixels.shape[:2]
    row["pixels"] = _hash64(np.ascontiguousarray(pixels), str(pixels.shape).encode())
    row["look"], row["turned"], row["grid"], row["contrast"] = look_of(Image.fromarray(pixels))


def _examine_header(row: np.ndarray, data: bytes) -> None:
    """Size, colour and orientation, as far as Pillow can tell them without the pixels."""
    if data.startswith(NPY_MAGIC):
        return
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # of any size: the pixels stay where they are
        row["width"], row["height"] = image.size
        mode, has_colour_key = image.mode, "transparency" in image.info
    except Exception:  # damaged headers raise a dozen types; decoding gives the verdict
        return
    row["exif_turned"] = read_orientation(data) != 1
    row["grey"] = mode.removesuffix("A") in ("1", "L", "I", "F") or mode.startswith("I;")
    row["palette"] = mode in ("P", "PA")
    row["alpha"] = mode in ("RGBA", "RGBa", "LA", "La", "PA") or has_colour_key
    row["cmyk"] = mode == "CMYK"
    row["over_8_bit"] = mode[0] in "IF" or (data.startswith(PNG_MAGIC) and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10")


def _parse_record(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The sample's json, or nothing where it is none."""
    try:
        record = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _caption_defects(members: Mapping[str, bytes]) -> set[str]:
    """What is wrong with any text that the sample has, used or not."""
    record = _parse_record(members)
    stated = record.get("captions", record.get("caption"))
    texts = list(stated) if isinstance(stated, list) else [stated]
    texts = [text for text in texts if text is not None]
    if "txt" in members and not texts:
        texts = [members["txt"].decode("utf-8-sig", "replace")]
    return set(map(_caption_defect, texts)) - {""} if texts else {"caption_missing"}


def _caption_defect(text: Any) -> str:
    if not isinstance(text, str):
        return "caption_not_text"
    if not text.strip():
        return "caption_empty"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "caption_garbled"
    return "" if any(map(str.isalpha, text)) else "caption_wordless"


class _Captions:
    """Collects CAPTION rows, asking the tokeniser about many captions at once."""

    def __init__(self, truncated: Truncated | None) -> None:
        self._truncated = truncated
        self._pending: list[tuple[int, str]] = []
        self._rows: list[np.ndarray] = []

    def add(self, sample: int, text: str) -> None:
        self._pending.append((sample, text))
        if len(self._pending) >= _CAPTIONS_AT_ONCE:
            self._flush()

    def finish(self) -> np.ndarray:
        self._flush()
        return np.concatenate(self._rows)

    def _flush(self) -> None:
        rows = np.zeros(len(self._pending), CAPTION)
        texts = [text for _, text in self._pending]
        rows["sample"] = [sample for sample, _ in self._pending]
        rows["id"] = [int(caption_id(text), 16) for text in texts]
        if texts and self._truncated is not None:
            rows["truncated"] = list(self._truncated(texts))
        self._rows.append(rows)
        self._pending = []


def _hash64(data: Any, more: bytes = b"") -> int:
    digest = hashlib.blake2b(data, digest_size=8)
    digest.update(more)
    return int.from_bytes(digest.digest(), "big")
