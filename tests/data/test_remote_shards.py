from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from quiltnet.data.remote_shards import RemoteShard, is_remote, place_of, resolve_remote
from quiltnet.errors import UserError
from tests.data.http_server import QUICK, Fault, Server, serving

ENTRIES = {
    "train": [
        {"path": "train/a-000.tar", "samples": 5, "captions": 9, "bytes": 1000, "sha256": "ab"},
        {"path": "train/a-001.tar", "samples": 3, "captions": 3, "bytes": 900, "sha256": "cd"},
    ],
    "val": [{"path": "val/a-000.tar", "samples": 2, "captions": 2, "bytes": 800, "sha256": "ef"}],
}


def manifest_of(entries: dict[str, list[dict[str, Any]]], version: int = 2) -> bytes:
    splits = {name: {"samples": 0, "captions": 0, "shards": shards} for name, shards in entries.items()}
    return json.dumps({"schema_version": version, "totals": {}, "splits": splits}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def resolve(spec: object, **options: Any) -> list[RemoteShard]:
    return resolve_remote(spec, patience=QUICK, **options)


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("https://host/quilt/train", True),
        ("s3://bucket/x-{000..101}.tar", True),
        ("hf://datasets/org/name", True),
        ("pipe:cat a.tar", True),
        (["quilt/train", "gs://bucket/a.tar"], True),
        ("quilt/train", False),
        (Path("quilt/train"), False),
        (["quilt/train", Path("b.tar")], False),
        (None, False),
    ],
)
def test_is_remote(spec, answer):
    assert is_remote(spec) is answer


def test_a_split_of_a_shard_set(server):
    server.files["quilt/manifest.json"] = manifest_of(ENTRIES)
    expected = [
        RemoteShard(server.url("quilt/train/a-000.tar"), 5, "ab", 1000),
        RemoteShard(server.url("quilt/train/a-001.tar"), 3, "cd", 900),
    ]
    assert resolve(server.url("quilt/train")) == expected
    assert resolve(server.url("quilt/train/")) == expected
    # however else they are named, the manifest is found
    assert resolve(server.url("quilt/train/a-{000..001}.tar")) == expected
    assert resolve([server.url("quilt/train/a-001.tar"), server.url("quilt/val")]) == [
        expected[1],
        RemoteShard(server.url("quilt/val/a-000.tar"), 2, "ef", 800),
    ]
    with pytest.raises(UserError, match=r"several splits; name one of http://.*/quilt/train, http://.*/quilt/val"):
        resolve(server.url("quilt"))


def test_a_shard_set_with_one_split(server):
    server.files["quilt/manifest.json"] = manifest_of({"train": ENTRIES["train"], "val": []})
    assert [shard.samples for shard in resolve(server.url("quilt"))] == [5, 3]


def test_a_query_goes_with_every_url(server):
    server.files["quilt/manifest.json"] = manifest_of(ENTRIES)
    assert [shard.url for shard in resolve(server.url("quilt/train?token=x"))] == [
        server.url("quilt/train/a-000.tar?token=x"),
        server.url("quilt/train/a-001.tar?token=x"),
    ]


def test_counts_of_open_clip(server):
    server.files["set/sizes.json"] = b'{"000.tar": 7, "001.tar": 0, "002.tar": "9", "003.tar": -1, "004.tar": true}'
    server.files["set/005.tar"] = b"a tar"
    shards = resolve(server.url("set/{000..005}.tar"))
    assert [shard.samples for shard in shards] == [7, 0, None, None, None, None]
    assert resolve(server.url("set"))[0] == RemoteShard(server.url("set/000.tar"), 7)


def test_nothing_is_known(server):
    server.files.update({"set/0.tar": b"", "set/1.tar": b"", "a.tar": b""})
    server.files["set/sizes.json"] = b"<html>no such page</html>"
    server.files["manifest.json"] = b'{"name": "a web application"}'
    assert resolve(server.url("set/{0..1}.tar")) == [RemoteShard(server.url(f"set/{n}.tar")) for n in range(2)]
    assert resolve(server.url("a.tar")) == [RemoteShard(server.url("a.tar"))]
    with pytest.raises(UserError, match=r"neither a manifest\.json nor a list of tars"):
        resolve(server.url("set"))


def test_a_pattern_that_goes_too_far(server):
    server.files.update({f"set/{n}.tar": b"" for n in range(10)})
    assert len(resolve(server.url("set/{0..9}.tar"))) == 10
    for pattern in ("set/{0..10}.tar", "set/{00..09}.tar", "st/0.tar"):
        with pytest.raises(UserError, match="there is no such shard"):
            resolve(server.url(pattern))


def test_folders_of_stores_are_listed(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/rs/set/{name}": b"" for name in ("b.tar", "a.tar", "c.tar.gz", "a.tar.index", "notes.txt")})
    memory.pipe("/rs/set/sizes.json", b'{"b.tar": 4}')
    assert [(shard.url.rpartition("/")[2], shard.samples) for shard in resolve("memory://rs/set")] == [
        ("a.tar", None),
        ("b.tar", 4),
        ("c.tar.gz", None),
    ]
    (tmp_path / "a.tar").touch()
    assert resolve(f"file://{tmp_path}") == [RemoteShard(f"file://{tmp_path}/a.tar")]
    with pytest.raises(UserError, match=r"cannot be listed .*name the tars themselves"):
        resolve("memory://rs/nothing")


def test_an_older_manifest_and_a_newer_one(server):
    server.files["quilt/manifest.json"] = manifest_of({"train": [{"path": "train/a.tar", "samples": 5}]}, version=1)
    assert resolve(server.url("quilt/train")) == [RemoteShard(server.url("quilt/train/a.tar"), 5)]
    server.files["quilt/manifest.json"] = manifest_of(ENTRIES, version=99)
    with pytest.raises(UserError, match=r"http://.*/quilt/manifest\.json has schema_version 99"):
        resolve(server.url("quilt/train"))


@pytest.mark.parametrize(
    "path", ["../secret.tar", "/etc/a.tar", "train/../../a.tar", "pipe:rm", "s3://other/a.tar", "a.tar?x", "", None, 3]
)
def test_a_manifest_does_not_lead_elsewhere(server, path):
    server.files["quilt/manifest.json"] = manifest_of({"train": [{"path": path, "samples": 5}]})
    with pytest.raises(UserError, match="not below it"):
        resolve(server.url("quilt/train"))


def test_commands(tmp_path):
    spec = f"pipe:touch {tmp_path}/ran; cat a-{{0..1}}.tar"
    with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
        resolve(spec)
    assert resolve(spec, allow_pipe=True) == [
        RemoteShard(f"pipe:touch {tmp_path}/ran; cat a-{n}.tar") for n in range(2)
    ]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "no shards are named"),
        (["https://host/a.tar", "quilt/train"], "quilt/train: local and remote shards are in one list"),
        ("https://me:word@host/a-{000..101.tar", "https://host/a-.*braces do not pair up"),
        ("https://host/a-{000}.tar", "braces hold neither a range"),
        ("nonsense://host/a.tar", "nonsense:// cannot be read"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(spec)
    assert "word" not in str(caught.value)


def test_a_server_that_is_busy_or_gone(server):
    server.files["quilt/manifest.json"] = manifest_of(ENTRIES)
    server.faults["quilt/manifest.json"] = [Fault("refuse", times=2)]
    assert len(resolve(server.url("quilt/train"))) == 2
    server.faults["quilt/manifest.json"] = [Fault("refuse", times=99)]
    with pytest.raises(UserError, match=r"503.*check the URL and the network"):
        resolve(server.url("quilt/train"))


def test_place_is_that_of_a_local_copy():
    assert place_of("https://me:word@host/quilt/train/a.tar?sig=x") == "train/a.tar"
    assert place_of("s3://bucket/a.tar") == "bucket/a.tar"
