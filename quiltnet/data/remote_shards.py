"""What a user calls "the shards", where these are not on this machine -> their URLs, and what is promised of them."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import braceexpand

from quiltnet.data.manifest import MANIFEST_NAME, TAR_ENDINGS, read_manifest
from quiltnet.data.remote_files import RemoteFile, Unreachable, read_whole
from quiltnet.data.remote_sources import Patience, is_command, open_filesystem, open_source, without_secrets
from quiltnet.errors import UserError

SIZES_NAME = "sizes.json"  # open_clip's: {"00000.tar": number of samples}, beside the tars

BRACES = (
    "write 'https://host/quilt-{000000..000101}.tar', and on a Hydra command line with Hydra's own quotes as well: "
    "\"data.train.shards='https://host/quilt-{000000..000101}.tar'\""
)


@dataclass(frozen=True)
class RemoteShard:
    """A tar that is not on this machine, and what a manifest promises of it. url: also ``pipe:command``."""

    url: str
    samples: int | None = None
    sha256: str | None = None
    bytes: int | None = None


def is_remote(spec: object) -> bool:
    """Whether ``spec``, or a member of it, names something that is not a path of this machine."""
    if isinstance(spec, (str, Path)):
        return "://" in str(spec) or is_command(str(spec))
    return isinstance(spec, Sequence) and any(is_remote(piece) for piece in spec)


def resolve_remote(
    spec: str | Sequence[str], *, allow_pipe: bool = False, patience: Patience | None = None
) -> list[RemoteShard]:
    """The tars that ``spec`` names, in its order.

    Numbers of samples come from the manifest of ``quiltnet shard``, else from open_clip's ``sizes.json`` beside the
    tars, else they are not known.

    Args:
        spec: one of the following, or a list of them. ``https://host/quilt/train``: a split of a shard set;
            ``https://host/quilt``: a shard set that has a single split; a folder of tars, where a store can list it;
            ``https://host/a.tar``; ``https://host/a-{000..101}.tar``; ``pipe:command``. Likewise ``s3://``, ``gs://``,
            ``hf://datasets/org/name/…``, ``file://`` and other protocols of fsspec.
        allow_pipe: the user said that commands may run.

    Raises:
        UserError: nothing is there, or it cannot be asked.
    """
    pieces = [spec] if isinstance(spec, str) else [str(piece) for piece in spec]
    for piece in pieces:
        if not is_remote(piece):
            raise UserError(
                f"{piece}: local and remote shards are in one list; name this one file://{Path(piece).absolute()}"
            )
    folders = _Folders(patience or Patience())
    try:
        shards = [shard for piece in pieces for shard in _resolve(piece, folders, allow_pipe=allow_pipe)]
    except Unreachable as error:
        raise UserError(f"{error}; check the URL and the network, and try again") from error
    if not shards:
        raise UserError("no shards are named; give a folder of shards, a tar, or a list of them")
    return shards


def place_of(url: str) -> str:
    """``folder/shard.tar``, as a local copy of the shard would have it: what ids of foreign images are made from."""
    if is_command(url):
        return url
    parts = urlsplit(url)
    return "/".join(f"{parts.netloc}{parts.path}".split("/")[-2:])


class _Folders:
    """What the folders of shards say of them; each is asked once."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._read: dict[str, dict[str, Any] | None] = {}

    def manifest(self, folder: str) -> dict[str, Any] | None:
        """Of a shard set; None where there is none, or it is another program's."""
        data = self._json(_below(folder, MANIFEST_NAME))
        if data is None or not {"schema_version", "splits"} <= data.keys():
            return None
        with TemporaryDirectory() as copy:
            Path(copy, MANIFEST_NAME).write_text(json.dumps(data), encoding="utf-8")
            try:
                return read_manifest(copy)
            except UserError as error:
                raise UserError(str(error).replace(copy, without_secrets(folder))) from error

    def counts(self, folder: str) -> dict[str, int]:
        """What sizes.json says, by name of the tar."""
        sizes = self._json(_below(folder, SIZES_NAME)) or {}
        return {name: size for name, size in sizes.items() if type(size) is int and size >= 0}

    def _json(self, url: str) -> dict[str, Any] | None:
        if url not in self._read:
            data = read_whole(url, self.patience)
            try:
                content = json.loads(data) if data else None
            except ValueError:  # a page that says there is no such file
                content = None
            self._read[url] = content if isinstance(content, dict) else None
        return self._read[url]


def _resolve(piece: str, folders: _Folders, *, allow_pipe: bool) -> Iterator[RemoteShard]:
    urls = _expand(piece)
    open_source(urls[0], folders.patience, allow_pipe=allow_pipe).close()  # may it be read, and can it?
    if is_command(piece):
        yield from map(RemoteShard, urls)
    elif len(urls) > 1 or _path(piece).endswith(TAR_ENDINGS):
        shards = [_promised(folders, url) for url in urls]
        for shard in {shards[0], shards[-1]}:  # where patterns are wrong
            _check_exists(shard, folders.patience)
        yield from shards
    else:
        yield from _in_folder(piece, folders)


def _expand(piece: str) -> list[str]:
    try:
        urls = list(braceexpand.braceexpand(piece))
    except braceexpand.UnbalancedBracesError as error:
        raise UserError(f"{without_secrets(piece)}: braces do not pair up; {BRACES}") from error
    if urls == [piece] and "{" in piece and not is_command(piece):
        raise UserError(
            f"{without_secrets(piece)}: braces hold neither a range {{000..101}} nor a list {{a,b}}; {BRACES}"
        )
    return urls


def _promised(folders: _Folders, url: str) -> RemoteShard:
    """A tar that was named itself."""
    folder, above = _above(url), _above(_above(url))
    manifest = folders.manifest(above) if above != folder else None
    for split in (manifest or {"splits": {}})["splits"].values():
        for shard in _entries(above, split):
            if _path(shard.url) == _path(url):
                return shard
    return RemoteShard(url, folders.counts(folder).get(posixpath.basename(_path(url))))


def _check_exists(shard: RemoteShard, patience: Patience) -> None:
    """Raises UserError for a shard that nobody promised, and that is not there."""
    if shard.samples is not None:
        return
    try:
        with RemoteFile(shard.url, patience) as file:
            file.read(1)
    except Unreachable as error:
        if error.reason != "missing_shard":
            raise
        raise UserError(
            f"{without_secrets(shard.url)}: there is no such shard; give a folder of shards, a tar, or a brace pattern"
        ) from error


def _in_folder(folder: str, folders: _Folders) -> list[RemoteShard]:
    manifest = folders.manifest(folder)
    if manifest is not None:
        packed = {name: split for name, split in manifest["splits"].items() if split["shards"]}
        if len(packed) > 1:
            choices = ", ".join(without_secrets(_below(folder, name)) for name in packed)
            raise UserError(f"{without_secrets(folder)} holds several splits; name one of {choices}, or a list of them")
        return [shard for split in packed.values() for shard in _entries(folder, split)]
    above = _above(folder)
    manifest = folders.manifest(above) if above != folder else None
    split = (manifest or {"splits": {}})["splits"].get(posixpath.basename(_path(folder).rstrip("/")))
    if split is not None:
        return _entries(above, split)
    counts = folders.counts(folder)
    urls = _list(folder, folders.patience) or sorted(_below(folder, name) for name in counts if _is_safe(name))
    if not urls:
        raise UserError(
            f"{without_secrets(folder)}: there is neither a {MANIFEST_NAME} nor a list of tars; name the tars: {BRACES}"
        )
    return [RemoteShard(url, counts.get(posixpath.basename(_path(url)))) for url in urls]


def _entries(folder: str, split: dict[str, Any]) -> list[RemoteShard]:
    """The shards of a split of the manifest in ``folder``."""
    for entry in split["shards"]:
        if not _is_safe(entry.get("path")):
            raise UserError(
                f"{without_secrets(folder)}: its {MANIFEST_NAME} names {entry.get('path')!r}, which is not below it; "
                "do not use this shard set, or pack it again"
            )
    return [
        RemoteShard(_below(folder, entry["path"]), _count(entry), entry.get("sha256"), entry.get("bytes"))
        for entry in split["shards"]
    ]


def _count(entry: dict[str, Any]) -> int | None:
    samples = entry.get("samples")
    return samples if type(samples) is int and samples >= 0 else None


def _is_safe(path: Any) -> bool:
    """Whether a path that somebody's file states stays below the folder of that file."""
    return (
        isinstance(path, str)
        and bool(path)
        and not path.startswith("/")
        and not {"..", ""} & set(path.split("/"))
        and not any(letter in path for letter in ":?#\\{}")
    )


def _list(folder: str, patience: Patience) -> list[str]:
    """The tars in a folder, where its store can tell. A web server's page of links is not asked."""
    fs, path = open_filesystem(folder, patience)
    if "https" in fs.protocol:
        return []
    try:
        names = fs.ls(path, detail=False)
    except Exception as error:  # each store's client raises types of its own
        raise UserError(
            f"{without_secrets(folder)} cannot be listed ({without_secrets(str(error))}); "
            "check the URL and the credentials, or name the tars themselves"
        ) from error
    return sorted(fs.unstrip_protocol(name) for name in names if name.endswith(TAR_ENDINGS))


def _path(url: str) -> str:
    return urlsplit(url).path


def _below(folder: str, name: str) -> str:
    """A query (a token for all files of a store, say) goes with every URL made from the folder's."""
    parts = urlsplit(folder)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def _above(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(path=posixpath.dirname(parts.path.rstrip("/")).rstrip("/")).geturl()
