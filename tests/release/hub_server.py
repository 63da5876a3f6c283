"""A small hub on loopback that speaks the protocol of Hugging Face's: enough for the real client to push and load.

Repositories live in memory. It can be told to answer with an error, or to cut the connection while a file arrives.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

import yaml

from tests.release.hub_connection import Connection, Fault, Refused, Request

TOKENS = {"hf_writes": "write", "hf_reads": "read"}  # of the user "org"
LARGE_ENDINGS = (".safetensors", ".onnx", ".bin")


@dataclass(frozen=True)
class Stored:
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.git_oid


@dataclass
class Repository:
    private: bool
    heads: dict[str, str] = field(default_factory=dict)  # ref -> commit
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)  # titles

    def commit(self, ref: str, files: dict[str, Stored]) -> str:
        listing = json.dumps([len(self.commits), ref, sorted((path, file.oid) for path, file in files.items())])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid], self.heads[ref] = files, oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.heads.get(revision, revision if revision in self.commits else None)


class HubServer:
    """``with HubServer() as hub:`` serves at ``hub.url``.

    Args:
        part_bytes: have larger files sent in parts of this size (LFS "multipart") instead of at once.
    """

    def __init__(self, *, part_bytes: int | None = None) -> None:
        self.part_bytes = part_bytes
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        handler = type("Bound", (Answers,), {"hub": self, "log": self.log, "faults": self.faults, "routes": ROUTES})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, pattern: str, status: int, *, times: int = 1, **headers: str) -> None:
        """Answer requests that ``pattern`` is found in with an error; ``Retry_After="3"`` adds that header."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, times, status, named))

    def cut(self, pattern: str, *, after: int, times: int = 1) -> None:
        """Break the connection when ``after`` bytes of the body have come."""
        self.faults.append(Fault(pattern, times, cut_after=after))

    def files(self, name: str, revision: str = "main") -> dict[str, Stored]:
        repository = self.repositories[name]
        return repository.commits[repository.heads[revision]]

    def requests(self, pattern: str) -> list[Request]:
        return [request for request in self.log if re.search(pattern, f"{request.method} {request.path}")]

    def received(self) -> int:
        """Bytes of large files that have come, whole or not."""
        return sum(request.received for request in self.requests(r"^PUT "))


class Answers(Connection):
    """What the hub answers, a method an address."""

    hub: HubServer

    @property
    def _right(self) -> str | None:
        _, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not token:
            return None
        if token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def _must_write(self) -> None:
        if self._right is None:
            raise Refused(401, "Invalid username or password.")
        if self._right != "write":
            raise Refused(403, "this token has no write permission")

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._right is None):
            raise Refused(401 if self._right is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, name: str, revision: str) -> tuple[Repository, str]:
        repository = self._repository(name)
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    def whoami(self) -> None:
        if self._right is None:
            raise Refused(401, "Invalid username or password.")
        self.answer({"name": "org", "type": "user", "auth": {"accessToken": {"role": self._right}}})

    def validate(self) -> None:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            fields = yaml.safe_load(head[1]) if head else {}
            wrong = [] if isinstance(fields.get("license"), str) else ["license must be a string"]
        except yaml.YAMLError as error:
            wrong = [str(error)]
        self.answer({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)

    def create(self) -> None:
        self._must_write()
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            raise Refused(409, "You already created this model repo", url=url)
        repository = self.hub.repositories[name] = Repository(wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": Stored(b"*.safetensors filter=lfs\n", False)})
        self.answer({"url": url, "name": name})

    def info(self, name: str, revision: str = "main") -> None:
        repository, commit = self._commit(name, revision)
        files = [{"rfilename": path} for path in repository.commits[commit]]
        self.answer({"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": files})

    def tree(self, name: str, revision: str) -> None:
        repository, commit = self._commit(name, revision)
        self.answer([_entry(path, file) for path, file in repository.commits[commit].items()])

    def preupload(self, name: str, revision: str) -> None:
        self._must_write()
        repository, commit = self._commit(name, revision)
        there = repository.commits[commit]
        answers = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(LARGE_ENDINGS) else "regular"
            oid = there[path].oid if path in there else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def batch(self, name: str) -> None:
        self._must_write()
        self._repository(name)
        objects = [self._transfer(name, wanted["oid"], wanted["size"]) for wanted in json.loads(self.body)["objects"]]
        self.answer({"transfer": "multipart" if self.hub.part_bytes else "basic", "objects": objects})

    def _transfer(self, name: str, oid: str, size: int) -> dict[str, Any]:
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        address, part = f"{self.hub.url}/storage/{oid}", self.hub.part_bytes
        upload: dict[str, Any] = {"href": address}
        if part is not None and size > part:
            numbers = range(1, -(-size // part) + 1)
            header = {"chunk_size": str(part), **{str(n): f"{address}?part={n}" for n in numbers}}
            upload = {"href": f"{address}/complete", "header": header}
        verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def store(self, oid: str) -> None:
        if "part" in self.query:
            self.hub.parts[oid, int(self.query["part"])] = self.body
        else:
            self._keep(oid, self.body)
        self.answer({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._keep(oid, b"".join(self.hub.parts[oid, number] for number in numbers))
        self.answer({})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content is not what its name says")
        self.hub.objects[oid] = content

    def verify(self, name: str) -> None:
        self._must_write()
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "Object does not exist")
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        self._must_write()
        repository, parent = self._commit(name, revision)
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = Stored(b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, "the object was never uploaded")
                files[value["path"]] = Stored(self.hub.objects[value["oid"]], True)
        oid = repository.commit(revision, files)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def branch(self, name: str, branch: str) -> None:
        self._must_write()
        repository, commit = self._commit(name, "main")
        if branch in repository.heads:
            raise Refused(409, "Reference already exists")
        repository.heads[branch] = commit
        self.answer({}, 201)

    def discuss(self, name: str) -> None:
        self._must_write()
        repository, commit = self._commit(name, "main")
        repository.pull_requests.append(json.loads(self.body)["title"])
        repository.heads[f"refs/pr/{len(repository.pull_requests)}"] = commit
        self.answer({"num": len(repository.pull_requests)}, 201)

    def discussion(self, name: str, number: str) -> None:
        title = self._repository(name).pull_requests[int(number) - 1]
        about = {"title": title, "num": int(number), "status": "draft", "createdAt": "2026-01-01T00:00:00.000Z"}
        of = {"isPullRequest": True, "author": {"name": "org"}, "repo": {"name": name, "type": "model"}}
        self.answer({**about, **of, "events": [], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository, commit = self._commit(name, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(file.content) - 1}/{len(file.content)}"
        self.answer(file.content[begin:], 206 if begin else 200, headers)


def _entry(path: str, file: Stored) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
    if file.large:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
    return entry


_NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Answers.whoami),
    ("POST", r"/api/validate-yaml", Answers.validate),
    ("POST", r"/api/repos/create", Answers.create),
    ("GET", rf"/api/models/{_NAME}", Answers.info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", Answers.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", Answers.tree),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", Answers.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", Answers.commit),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", Answers.branch),
    ("POST", rf"/api/models/{_NAME}/discussions", Answers.discuss),
    ("GET", rf"/api/models/{_NAME}/discussions/(\d+)", Answers.discussion),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Answers.batch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", Answers.verify),
    ("PUT", r"/storage/(\w+)", Answers.store),
    ("POST", r"/storage/(\w+)/complete", Answers.complete),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", Answers.resolve),
    ("HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", Answers.resolve),
]
