from __future__ import annotations

import hashlib
import json

import pytest

from quiltnet.data.manifest import read_manifest, shard_entry, tars_in, write_manifest
from quiltnet.errors import UserError


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": "x", "splits": {}, "totals": {}}',
     '{"schema_version": 1, "splits": [], "totals": {}}'],
)  # fmt: skip
def test_manifest_of_somebody_else(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(tmp_path)


def test_manifest_of_a_newer_version(tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema_version": 99, "splits": {}, "totals": {}}')
    with pytest.raises(UserError, match="schema_version 99"):
        read_manifest(tmp_path)


def test_manifest_of_an_older_version(tmp_path):
    old = {"schema_version": 1, "splits": {"train": {"samples": 1, "shards": []}}, "totals": {"rows": 3, "samples": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    manifest = read_manifest(tmp_path)
    assert manifest["schema_version"] == 2
    assert manifest["splits"] == old["splits"]
    unknown = {"sources": None, "caption_words": {}, "image_sizes": {}, "findings": {}}
    assert manifest["totals"] == {"rows": 3, "samples": 1, **unknown}


def test_a_manifest_is_whole_or_as_it_was(tmp_path):
    totals = {"sources": 1, "caption_words": {}, "image_sizes": {}, "findings": {}}
    whole = {"schema_version": 2, "source": {"images": ["cafe\N{COMBINING ACUTE ACCENT}", "caf\udce9"]}}
    whole |= {"splits": {}, "totals": totals}
    write_manifest(tmp_path, whole)
    assert read_manifest(tmp_path) == whole
    with pytest.raises(TypeError):
        write_manifest(tmp_path, {**whole, "creator": object()})
    assert read_manifest(tmp_path) == whole


def test_a_folder_that_cannot_be_listed(tmp_path):
    with pytest.raises(UserError, match=r"cannot be listed .*; make it readable"):
        tars_in(tmp_path / "gone")


def test_entry_of_a_tar(tmp_path):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "x-000000.tar"
    path.write_bytes(b"x" * 3_000_000)
    assert shard_entry(path, samples=2, captions=5, folder=tmp_path) == {
        "path": "train/x-000000.tar",
        "samples": 2,
        "captions": 5,
        "bytes": 3_000_000,
        "sha256": hashlib.sha256(b"x" * 3_000_000).hexdigest(),
    }
