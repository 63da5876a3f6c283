"""A set that has everything that is found in shards, and what is to become of each of its samples."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.data.made_sets import encoded, tissue

LINK = None  # in place of a member's bytes: it is a symbolic link

# What a sample of ours has, but for captions that are a number.
ALMOST_OURS = {
    "captions": 5, "caption_ids": [], "image_id": "0" * 16, "source_id": "s", "image_path": "p.jpg", "metadata": {},
    "caption_metadata": {},
}  # fmt: skip


@dataclass(frozen=True)
class Thrown:
    """A sample that was thrown into the set: its caption where it can be used, else the reason why it cannot."""

    key: str
    caption: str = ""
    reason: str = ""
    members: dict[str, bytes | None] = field(default_factory=dict)


def usable(key: str, caption: str, **members: bytes | str) -> Thrown:
    """Its caption is its txt where nothing else is said."""
    return Thrown(key, caption=caption, members=_with_text(members, caption))


def broken(key: str, reason: str, **members: bytes | str | None) -> Thrown:
    return Thrown(key, reason=reason, members=_with_text(members, f"Of {key}."))


def _with_text(members: dict[str, bytes | str | None], text: str) -> dict[str, bytes | None]:
    told = members if {"txt", "json"} & {name.lower() for name in members} else {**members, "txt": text}
    return {name: data.encode() if isinstance(data, str) else data for name, data in told.items()}


def jpeg(seed: int) -> bytes:
    return encoded(tissue(seed))


def giant_jpeg() -> bytes:
    """20,000 x 20,000 pixels, by its header."""
    data = bytearray(jpeg(0))
    frame = data.index(b"\xff\xc0\x00\x11\x08")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(data)


def giant_png() -> bytes:
    data = bytearray(encoded(tissue(0), "PNG"))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def samples_of_all_kinds() -> list[Thrown]:
    transparent = tissue(21).convert("RGBA")
    transparent.putalpha(90)
    return [
        *(usable(f"good-{n}", f"Tissue {n}.", jpg=jpeg(n)) for n in range(12)),
        usable("junk", "Junk behind the image.", jpg=jpeg(20) + b"junk" * 200),
        usable("alpha", "See-through.", png=encoded(transparent, "PNG")),
        usable("cmyk", "For a printer.", jpg=encoded(tissue(22).convert("CMYK"))),
        usable("dot", "One pixel.", jpg=encoded(tissue(23, 1, 1))),
        usable("dot-png", "One pixel, losslessly.", png=encoded(tissue(24, 1, 1), "PNG")),
        usable("long", "word " * 19_999 + "word", jpg=jpeg(25)),
        usable("endless", "x" * 100_000, jpg=jpeg(26)),
        usable("emoji", "\U0001f52c\U0001f9ec\U0001f52c", jpg=jpeg(27)),
        usable("latin", "caf\ufffd", jpg=jpeg(28), txt=b"caf\xe9"),
        usable("marked", "Behind a byte order mark.", jpg=jpeg(29), txt=b"\xef\xbb\xbfBehind a byte order mark."),
        usable("halved", "Half of \ud83d", jpg=jpeg(30), json='{"caption": "Half of \\ud83d"}'),
        usable("numbered", "From the txt.", jpg=jpeg(31), json='{"caption": 7}', txt="From the txt."),
        usable("almost-ours", "In the txt, too.", jpg=jpeg(32), json=json.dumps(ALMOST_OURS), txt="In the txt, too."),
        usable("SHOUTED", "Endings in capitals.", JPG=jpeg(33), TXT="Endings in capitals."),
        broken("cut", "broken_image", jpg=jpeg(40)[: len(jpeg(40)) // 2]),
        broken("giant", "too_many_pixels", jpg=giant_jpeg()),
        broken("giant-png", "too_many_pixels", png=giant_png()),
        broken("html", "not_an_image", jpg="<html>404</html>"),
        broken("zero", "empty_image", jpg=b""),
        broken("two", "several_images", jpg=jpeg(41), png=encoded(tissue(41), "PNG")),
        broken("no-json", "unreadable_json", jpg=jpeg(42), json="{caption: x}", txt="x"),
        broken("no-object", "unreadable_json", jpg=jpeg(43), json='["x"]'),
        broken("latin-json", "unreadable_json", jpg=jpeg(44), json=b'{"caption": "caf\xe9"}'),
        broken("zero-json", "unreadable_json", jpg=jpeg(45), json=b""),
        broken("null", "no_caption", jpg=jpeg(46), json='{"caption": null}'),
        broken("empty", "no_caption", jpg=jpeg(47), txt=b""),
        broken("blank", "no_caption", jpg=jpeg(48), json='{"captions": [" \\n"]}'),
        broken("number", "no_caption", jpg=jpeg(49), json='{"captions": 7}'),
        broken("only-mark", "no_caption", jpg=jpeg(50), txt=b"\xef\xbb\xbf"),
        broken("texts", "no_image"),
    ]  # fmt: skip


def samples_of_all_names() -> list[Thrown]:
    """Names are labels, and some samples share one."""
    return [
        usable("/etc/quilt/absolute", "An absolute name.", jpg=jpeg(60)),
        usable("../../outside", "A name that leads out.", jpg=jpeg(61)),
        usable("gewebe-\u00e4-\U0001f52c", "A name in Unicode.", jpg=jpeg(62)),
        usable("k" * 300, "A long name.", jpg=jpeg(63)),
        broken("link", "no_image", jpg=LINK),
        usable("twice", "The first of two.", jpg=jpeg(64)),
        usable("twice~2", "As packing would call the second of two.", jpg=jpeg(65)),
        usable("between", "Between the two.", jpg=jpeg(66)),
        usable("twice", "The second of two.", jpg=jpeg(67)),
        usable("again", "Right in front of its namesake.", jpg=jpeg(68)),
        usable("again", "Right behind its namesake.", jpg=jpeg(69)),
        usable("/clash", "One name but for a slash.", jpg=jpeg(70), json='{"caption": "One name but for a slash."}'),
        usable("clash", "Its text lies in front.", txt="Its text lies in front.", jpg=jpeg(71)),
    ]  # fmt: skip


def cut_samples(name: str, seed: int, *, third: str) -> list[Thrown]:
    """What is left of a tar of four that is cut in the third sample or behind it. third: its reason, or ``whole``."""
    whole = [usable(f"{name}-{n}", f"Sample {n} of {name}.", jpg=jpeg(seed + n)) for n in range(3)]
    return whole if third == "whole" else [*whole[:2], broken(f"{name}-2", third, jpg=jpeg(seed + 2))]


TARS = {
    "a.tar": samples_of_all_kinds(),
    "b.tar": samples_of_all_names(),
    "c.tar": cut_samples("in-image", 80, third="truncated_tar"),
    "d.tar": cut_samples("between-members", 84, third="truncated_tar"),
    "e.tar": cut_samples("between-samples", 88, third="whole"),
}
CUT = ("c.tar", "d.tar", "e.tar")  # each had a fourth sample, of which nothing is left
PACKED = [usable(f"packed-{n}", f"Packed tissue {n}.", jpg=jpeg(92 + n)) for n in range(3)]

ALL = [thrown for samples in TARS.values() for thrown in samples]
USABLE = [thrown for thrown in ALL if not thrown.reason]
REASONS = Counter(thrown.reason for thrown in ALL if thrown.reason)


def write_tar(path: Path, samples: list[Thrown]) -> Path:
    with tarfile.open(path, "w") as tar:
        for thrown in samples:
            for extension, data in thrown.members.items():
                member = tarfile.TarInfo(f"{thrown.key}.{extension}")
                if data is LINK:
                    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                else:
                    member.size = len(data)
                tar.addfile(member, io.BytesIO(data or b""))
    return path


def write_cut_tar(path: Path, samples: list[Thrown]) -> None:
    """With a fourth sample, and then cut: in the third one's image, in front of its txt, or behind it."""
    write_tar(path, [*samples, usable("fourth", "Lost.", jpg=jpeg(0))])
    with tarfile.open(path) as tar:
        infos = {info.name: info for info in tar}
    third = samples[2].key
    end = {
        "c.tar": infos[f"{third}.jpg"].offset_data + 300,
        "d.tar": infos[f"{third}.txt"].offset,
        "e.tar": infos["fourth.jpg"].offset,
    }[path.name]
    path.write_bytes(path.read_bytes()[:end])


def write_chaos(folder: Path) -> Path:
    """The five tars."""
    for name, samples in TARS.items():
        (write_cut_tar if name in CUT else write_tar)(folder / name, samples)
    return folder


def broken_among(samples: list[Thrown]) -> list[tuple[str, str]]:
    return [(thrown.key, thrown.reason) for thrown in samples if thrown.reason]
