"""The rows of an image and its bytes -> the members of a sample."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from quiltnet.data.image_files import Images
from quiltnet.data.pairs import PairRow, caption_id, image_id, plain_path, sample_key
from quiltnet.image_opening import open_image

# The extension of a member says what the bytes are, whatever the file was called.
EXTENSION_OF_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"II[*+]\x00|MM\x00[*+]"), "tif"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"BM"), "bmp"),
    (re.compile(rb"\x93NUMPY"), "npy"),  # pixels, as `quiltnet prepare --raw` keeps them
)


class Rejection(Exception):
    """args: reason, and what else rejected.jsonl should say."""


@dataclass(frozen=True)
class Sample:
    """members: bytes by extension; captions: those that differ from each other; size: (width, height) in pixels."""

    key: str
    members: dict[str, bytes]
    captions: list[str]
    size: tuple[int, int]


def build_sample(
    rows: Sequence[PairRow], images: Images, check_image: Callable[[bytes], str | None], *, row_is_sample: bool
) -> Sample:
    """One sample of rows that have the same image and a caption each.

    Raises:
        Rejection: the image is missing or cannot be used.
    """
    path = plain_path(rows[0].image_path)
    extension, data = _load(path, images, check_image)
    distinct: dict[str, PairRow] = {}
    for row in rows:
        distinct.setdefault(caption_id(row.caption), row)
    record = _describe(path, distinct)
    key = sample_key(path) + (f"_{rows[0].number}" if row_is_sample else "")
    members = {extension: data, "json": json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")}
    return Sample(key, members, record["captions"], _size(extension, data))


def _load(path: str, images: Images, check_image: Callable[[bytes], str | None]) -> tuple[str, bytes]:
    """(extension, bytes) of an image that decodes."""
    try:
        data = images.read(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Rejection("missing_image") from error
    except OSError as error:
        raise Rejection("unreadable_image", str(error)) from error
    extension = next((name for magic, name in EXTENSION_OF_MAGIC if magic.match(data)), None)
    defect = check_image(data) or (extension is None and "a format that shards do not hold")
    if defect:
        raise Rejection("unreadable_image", defect)
    return extension, data


def _size(extension: str, data: bytes) -> tuple[int, int]:
    if extension == "npy":
        height, width, _ = np.load(io.BytesIO(data), allow_pickle=False).shape
        return width, height
    with open_image(io.BytesIO(data)) as image:  # its header alone
        return image.size


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
