from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from quiltnet.data.shard_files import ShardFile, fingerprint, resolve_shards
from quiltnet.errors import UserError


@pytest.fixture
def train(make_shards) -> Path:
    return make_shards(10, samples_per_shard=4)


def names(spec) -> list[tuple[str, int | None]]:
    return [(shard.path.name, shard.samples) for shard in resolve_shards(spec)]


WHOLE = [("test-000000.tar", 4), ("test-000001.tar", 4), ("test-000002.tar", 2)]


def test_all_ways_to_name_packed_shards(train, monkeypatch):
    assert names(train) == names(str(train)) == names(train.parent) == names([train]) == WHOLE
    assert names(train / "test-000001.tar") == WHOLE[1:2]
    assert names(f"{train}/test-{{000000..000001}}.tar") == WHOLE[:2]
    assert names([f"{train}/test-{{000002,000000}}.tar", train / "test-000001.tar"]) == [
        WHOLE[2],
        WHOLE[0],
        WHOLE[1],
    ]
    monkeypatch.chdir(train.parent)
    assert names("train") == names("./train/") == names("train/test-{000000..000002}.tar") == WHOLE
    monkeypatch.chdir(train)
    assert names(".") == names("test-{000000..000002}.tar") == WHOLE


def test_a_folder_of_foreign_tars(train, tmp_path):
    (tmp_path / "foreign").mkdir()
    for number in (1, 0):
        shutil.copy(train / f"test-00000{number}.tar", tmp_path / "foreign" / f"{number}.tar")
    (tmp_path / "foreign" / "notes.txt").write_text("no shard")
    assert resolve_shards(tmp_path / "foreign") == [ShardFile(tmp_path / "foreign" / f"{n}.tar") for n in (0, 1)]


def test_a_name_that_holds_braces_is_a_name(train, tmp_path):
    path = tmp_path / "odd{0..1}.tar"
    shutil.copy(train / "test-000000.tar", path)
    assert resolve_shards(str(path)) == [ShardFile(path)]


def test_a_set_of_several_splits_must_be_narrowed(train, tmp_path):
    text = (train.parent / "manifest.json").read_text()
    entry = '"splits": {\n  "val": {"samples": 1, "captions": 1, "shards": [{"path": "val/x.tar"}]},'
    (train.parent / "manifest.json").write_text(text.replace('"splits": {', entry))
    with pytest.raises(UserError, match=r"several splits; name one of .*/set/val, .*/set/train"):
        resolve_shards(train.parent)


@pytest.mark.parametrize("spec", [None, []])
def test_nothing_is_named(spec):
    with pytest.raises(UserError, match="no shards are named"):
        resolve_shards(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{root}/nowhere", r"nowhere: there is no such shard"),
        ("{root}/a-{{0..2}}.tar", r"a-0\.tar: there is no such shard"),
        ("{root}/empty", r"no shards matched: .*empty holds neither tars nor a manifest"),
        ("{root}/a-{{000000..000101.tar", r"braces do not pair up.*Hydra's own quotes"),
        ("{root}/a-{{000101}}.tar", r"neither a range .* nor a list .*Hydra's own quotes"),
        ("s3://bucket/a.tar", r"local disks only; copy them"),
        ("https://x.org/a-{{0..1}}.tar", r"local disks only"),
        ("pipe:cat a.tar", r"local disks only"),
    ],
)
def test_doors(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        resolve_shards(spec.format(root=tmp_path))


def test_a_listed_shard_that_is_gone_is_named(train):
    os.remove(train / "test-000001.tar")
    with pytest.raises(UserError, match=r"test-000001\.tar: there is no such shard"):
        resolve_shards(train)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([{"path": "../other/x.tar", "samples": 1}], r"names \.\./other/x\.tar, which is outside its folder"),
        ([{"path": "/etc/x.tar", "samples": 1}], "outside its folder"),
        ([{"samples": 1}], "does not list the shards of train"),
        (None, "does not list the shards of train"),
    ],
)
def test_a_manifest_of_somebody_else(train, shards, message):
    manifest = json.loads((train.parent / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"] = shards
    (train.parent / "manifest.json").write_text(json.dumps(manifest))
    for spec in (train, train.parent, train / "test-000000.tar"):
        with pytest.raises(UserError, match=message):
            resolve_shards(spec)


def test_fingerprint_follows_contents(train, make_shards, tmp_path):
    assert fingerprint(resolve_shards(train)) == fingerprint(
        resolve_shards(make_shards(10, samples_per_shard=4, name="b"))
    )
    assert fingerprint(resolve_shards(train)) != fingerprint(
        resolve_shards(make_shards(11, samples_per_shard=4, name="c"))
    )
    shutil.copytree(train, tmp_path / "bare")
    bare = resolve_shards(tmp_path / "bare")
    before = fingerprint(bare)
    with open(bare[0].path, "ab") as file:
        file.write(b"more")
    assert fingerprint(bare) != before
