"""What a check has found, for people and for programs: report.json and the contact sheet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quiltnet.data.checking import Check, Facts, Finding
from quiltnet.data.contact_sheet import Band, Panel, draw_contact_sheet
from quiltnet.data.decoding import BrokenSample, decode_image
from quiltnet.data.near_duplicates import bits_set
from quiltnet.errors import UserError
from quiltnet.whole_files import write_whole

REPORT_VERSION = 1
REPORT_NAME = "report.json"
SHEET_NAME = "contact_sheet.png"

# What is on the sheet: a repeated caption, or a cut one, is nothing to look at.
_NOT_SHOWN = {"duplicate_captions", "truncated_captions"}
_PER_BAND = 16  # images; half as many pairs
_PREVIEW = 320  # pixels; what is drawn is smaller


def write_report(check: Check, folder: Path, *, examples: int = 100) -> dict[str, Any]:
    """``report.json`` and ``contact_sheet.png`` in ``folder``, which is made.

    Args:
        examples: how many of what a finding counts are named, spread evenly over them.

    Returns:
        The report.

    Raises:
        UserError: the folder cannot be written.
    """
    report = describe(check, examples=examples)
    sheet = draw_contact_sheet(list(_bands(check)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f".{SHEET_NAME}", "PNG")
        os.replace(folder / f".{SHEET_NAME}", folder / SHEET_NAME)
        write_whole(folder / REPORT_NAME, json.dumps(report, indent=1, ensure_ascii=False))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give a folder with --out") from error
    return report


def describe(check: Check, *, examples: int) -> dict[str, Any]:
    """The report as JSON values."""
    facts = check.facts
    return {
        "report_version": REPORT_VERSION,
        "passed": check.passed,
        "sets": {name: int((facts.group == number).sum()) for number, name in enumerate(facts.groups)},
        "splits": facts.groups[: facts.splits],
        "captions": int(facts.is_own[facts.captions["sample"]].sum()),
        "limits": asdict(check.limits),
        "bounds": asdict(check.bounds),
        "findings": {finding.name: _describe_finding(facts, finding, examples) for finding in check.findings},
    }


def _describe_finding(facts: Facts, finding: Finding, examples: int) -> dict[str, Any]:
    return {
        "count": finding.count,
        "of": finding.of,
        "unit": finding.unit,
        "share": round(finding.share, 6),
        "limit": finding.limit,
        "limit_is_share": finding.is_share,
        "above_limit": finding.is_above,
        "details": finding.details,
        "examples": [
            *({"shard": tar, "detail": detail} for tar, detail in finding.notes[:examples]),
            *(_describe_example(facts, numbers) for numbers in spread(finding.numbers, examples)),
        ],
    }


def _describe_example(facts: Facts, numbers: np.ndarray) -> dict[str, Any]:
    number, *others = np.atleast_1d(numbers).tolist()
    example = _describe_sample(facts, number)
    for other in others:
        example["copy_of"] = _describe_sample(facts, other)
        example["bits"], example["turned"] = _likeness(facts, number, other)
    return example


def _describe_sample(facts: Facts, number: int) -> dict[str, Any]:
    portion, local = facts.locate(number)
    key, _, image_path = facts.read(number)
    place = {"set": portion.group} if portion.tar is None else {"set": portion.group, "shard": portion.tar.name}
    row = facts.samples[number]
    facts_of_row = {"number": local, "width": int(row["width"]), "height": int(row["height"])}
    reason = {"reason": facts.reason(number)} if facts.reason(number) else {}
    named = {"image_path": image_path} if image_path is not None else {}
    return {"key": key, **named, **place, **facts_of_row, **reason}


def spread(numbers: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly spread: the first ones would all be of one shard."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, most).astype(np.int64)]


def _likeness(facts: Facts, one: int, other: int) -> tuple[int, bool]:
    """Bits between two images, and whether one of them had to be turned for it."""
    samples = facts.samples
    upright = int(bits_set(samples["look"][[one]] ^ samples["look"][[other]])[0])
    turned = int(bits_set(samples["turned"][one] ^ samples["look"][other]).min())
    return min(upright, turned), turned < upright


def _bands(check: Check) -> Iterator[Band]:
    for finding in check.findings:
        if finding.name in _NOT_SHOWN or not len(finding.numbers):
            continue
        is_pairs = finding.numbers.ndim == 2
        shown = spread(finding.numbers, _PER_BAND // 2 if is_pairs else _PER_BAND)
        subtitle = ", ".join((f"{finding.count:,} of {finding.of:,} {finding.unit}", *_counted(finding.details)))
        cells = [[_panel(check.facts, int(number)) for number in np.atleast_1d(numbers)] for numbers in shown]
        if is_pairs:
            labels = [_pair_label(check.facts, *map(int, numbers)) for numbers in shown]
            cells = [
                [Panel(one.image, f"{one.label}\n{label}"), other]
                for (one, other), label in zip(cells, labels, strict=True)
            ]
        yield Band(finding.name.replace("_", " "), subtitle, cells, is_alarming=finding.is_above)


def _counted(details: dict[str, int]) -> list[str]:
    return [f"{count:,} {name.replace('_', ' ')}" for name, count in details.items() if count]


def _pair_label(facts: Facts, one: int, other: int) -> str:
    if facts.samples["pixels"][one] == facts.samples["pixels"][other]:
        return "same pixels as"
    bits, is_turned = _likeness(facts, one, other)
    return f"{'turned, ' if is_turned else ''}{bits} bits from"


def _panel(facts: Facts, number: int) -> Panel:
    key, data, _ = facts.read(number)
    height, width = int(facts.samples["height"][number]), int(facts.samples["width"][number])
    size = f"{width}x{height}" if width else "no size"
    reason = facts.reason(number)
    try:
        image = Image.fromarray(decode_image(data))
        image.thumbnail((_PREVIEW, _PREVIEW))
    except BrokenSample as error:
        return Panel(None, f"{key}\n{size}", reason or error.reason)
    return Panel(image, f"{key}\n{size}{f', {reason}' if reason else ''}")
