"""Pushing, with the real client against a hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from ast import literal_eval
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from PIL import Image

import quiltnet
from quiltnet.errors import UserError
from quiltnet.release.card import UNWRITTEN, write_card
from quiltnet.release.exporting import FORMATS, export_model
from quiltnet.release.push import check_push, push_folder
from tests.conftest import ROOT
from tests.model.towers import tiny_model
from tests.release.hub_server import HubServer, Stored
from tests.release.test_card import small_model

CARD = (
    "---\nlicense: mit\n---\n\n# mine\n\n<!-- yours: description -->\nA model of tiles.\n<!-- end of description -->\n"
)
REPOSITORY = "org/name"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and the client of this process turned to it."""
    with HubServer() as server:
        turn_to(server, monkeypatch, tmp_path / "cache")
        yield server
        close_session()


def turn_to(server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long was waited for, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path) -> Path:
    """What an export may look like: two large files, text, and a folder."""
    folder = tmp_path / "export"
    (folder / "onnx").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4000)  # 1,024,000
    (folder / "onnx/image.onnx").write_bytes(b"onnx" * 1000)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def there(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    return {path: file.content for path, file in hub.files(REPOSITORY, revision).items() if path != ".gitattributes"}


def test_a_folder_arrives_whole_and_only_once(hub, folder):
    result = push_folder(folder, REPOSITORY)
    assert there(hub) == contents(folder)
    assert {path for path, file in hub.files(REPOSITORY).items() if file.large} == {
        "model.safetensors",
        "onnx/image.onnx",
    }
    assert not hub.repositories[REPOSITORY].private
    assert result.url == f"{hub.url}/{REPOSITORY}/commit/{hub.repositories[REPOSITORY].heads['main']}"
    assert 'quiltnet.load("hub:org/name")' in str(result) and "1,024,000  LFS  model.safetensors" in str(result)
    received = hub.received()
    assert received == 1_024_000 + 4000
    push_folder(folder, REPOSITORY)  # the repository exists: 409
    assert (hub.received(), len(hub.repositories[REPOSITORY].commits)) == (received, 2)


def test_large_files_may_go_in_parts(monkeypatch, tmp_path, folder):
    with HubServer(part_bytes=300_000) as hub:
        turn_to(hub, monkeypatch, tmp_path / "cache")
        push_folder(folder, REPOSITORY)
        assert there(hub) == contents(folder)
        assert [request.received for request in hub.requests("^PUT ")].count(300_000) == 3


def test_a_dry_run_lists_and_sends_nothing(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    listed = str(push_folder(folder, REPOSITORY, dry_run=True))
    assert "dry run: 4 files" in listed and f"{sum(map(len, contents(folder).values())):,} bytes" in listed
    assert "LFS  onnx/image.onnx" in listed and "       README.md" in listed
    assert hub.log == []


def test_a_repository_may_be_private_and_is_not_shown_by_mistake(hub, folder, tmp_path):
    push_folder(folder, "org/hidden", private=True)
    assert hub.repositories["org/hidden"].private
    push_folder(folder, REPOSITORY)
    sent = hub.received()
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match=r"org/name exists and everybody can read it.*nothing was sent"):
        push_folder(folder, REPOSITORY, private=True)
    assert hub.received() == sent


def test_a_revision_is_made_and_main_stays(hub, folder):
    push_folder(folder, REPOSITORY)
    main = there(hub)
    (folder / "open_clip_config.json").write_text('{"new": true}')
    for _ in range(2):  # it exists the second time
        push_folder(folder, REPOSITORY, revision="v2")
    assert there(hub) == main and there(hub, "v2") == contents(folder) != main


def test_a_pull_request_is_opened_once_and_can_be_continued(hub, folder, waits):
    push_folder(folder, REPOSITORY)
    main = there(hub)
    (folder / "model.safetensors").write_bytes(b"better" * 100)
    hub.fail("POST .*/commit/", 503)
    result = push_folder(folder, REPOSITORY, create_pr=True)
    assert hub.repositories[REPOSITORY].pull_requests == ["quiltnet export"]
    assert result.pull_request == f"{hub.url}/{REPOSITORY}/discussions/1"
    assert there(hub) == main and there(hub, "refs/pr/1") == contents(folder)
    assert "quiltnet.load" not in str(result), "which would load main"
    hub.fail("POST .*/commit/", 500, times=9)
    with pytest.raises(UserError, match=r"the same command with --revision refs/pr/2 in place of --create-pr"):
        push_folder(folder, REPOSITORY, create_pr=True)
    hub.faults.clear()
    push_folder(folder, REPOSITORY, revision="refs/pr/1")
    assert len(hub.repositories[REPOSITORY].pull_requests) == 2


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("hf_wrong_secret_token", r"does not accept the token \(401.*hf auth login"),
        ("hf_reads", r"\(403.*no write perm"),
    ],
)
def test_a_token_that_is_refused_is_not_repeated(hub, folder, monkeypatch, waits, token, said):
    before = contents(folder)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=said) as caught:
        push_folder(folder, REPOSITORY)
    assert token not in str(caught.value) and not waits, "it is not tried again"
    assert hub.repositories == {} and contents(folder) == before


def test_a_busy_hub_is_given_the_time_it_asks_for(hub, folder, waits):
    hub.fail("POST /api/repos/create", 429, Retry_After="7")
    hub.fail("POST .*/preupload/", 429, Retry_After="11")
    hub.fail("POST .*/commit/", 409)
    hub.fail("PUT /storage", 500)
    push_folder(folder, REPOSITORY)
    assert there(hub) == contents(folder)
    assert 7 in waits and 12 in waits, waits  # the client itself adds a second


def test_a_hub_that_stays_busy_ends_the_push_in_words(hub, folder, waits):
    hub.fail("POST /api/repos/create", 429, times=99, Retry_After="7")
    with pytest.raises(UserError, match=r"did not end.*429.*To continue, give the same command"):
        push_folder(folder, REPOSITORY)
    assert waits == [7, 7, 7]


class PageOnly(BaseHTTPRequestHandler):
    """A web site that answers everything with its front page."""

    def do_GET(self) -> None:
        page = b"<html>welcome</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    do_POST = do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


def test_a_site_that_is_no_hub_is_said(folder, monkeypatch, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), PageOnly) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        turn_to(SimpleNamespace(url=f"http://127.0.0.1:{site.server_port}"), monkeypatch, tmp_path / "cache")
        try:
            with pytest.raises(UserError, match=r"answers as no hub does.*is HF_ENDPOINT right\? The export in"):
                push_folder(folder, REPOSITORY)
            with pytest.raises(UserError, match="it answers as no hub does; is HF_ENDPOINT right"):
                quiltnet.load(f"hub:{REPOSITORY}")
        finally:
            close_session()
            site.shutdown()


def test_a_cut_connection_continues_where_it_broke(hub, folder, waits):
    before = contents(folder)
    hub.cut(r"PUT /storage/", after=200_000, times=99)
    with pytest.raises(UserError, match=r"export in .* is complete.*what has arrived is not sent again") as caught:
        push_folder(folder, REPOSITORY)
    assert "hf_writes" not in str(caught.value)
    kept = contents(folder)
    assert kept.keys() == before.keys() and kept["model.safetensors"] == before["model.safetensors"]
    assert there(hub) == {}, "no half of a push is to be seen"
    small = len(before["onnx/image.onnx"])
    hub.faults[0].pattern = f"PUT /storage/{sha256(before['model.safetensors']).hexdigest()}"
    with pytest.raises(UserError):
        push_folder(folder, REPOSITORY)  # the small file arrives
    hub.faults.clear()
    hub.log.clear()
    push_folder(folder, REPOSITORY)
    assert there(hub) == contents(folder)
    assert hub.received() == 1_024_000, f"the {small} bytes of the other file are there already"


def edit_card(hub: HubServer, before: str, after: str) -> None:
    """As its owner does on the hub's pages."""
    files = dict(hub.files(REPOSITORY))
    card = files["README.md"].content.decode()
    assert before in card
    files["README.md"] = Stored(card.replace(before, after).encode(), False)
    hub.repositories[REPOSITORY].commit("main", files)


def test_what_was_written_on_the_hub_is_kept(hub, folder):
    write_card(folder, None, comparisons=[], license="mit")
    push_folder(folder, REPOSITORY)
    edit_card(hub, UNWRITTEN["description"], "For *my* slides.\n\nSecond paragraph.")
    edit_card(hub, "license: mit\n", "license: mit\ndatasets:\n- org/slides\n")
    write_card(folder, None, comparisons=[], license="apache-2.0")  # made again from nothing
    (folder / "README.md").write_text((folder / "README.md").read_text().replace(UNWRITTEN["citation"], "Me, 2026."))
    push_folder(folder, REPOSITORY)
    card = there(hub)["README.md"].decode()
    assert "For *my* slides.\n\nSecond paragraph." in card and "Me, 2026." in card
    assert "license: apache-2.0\n" in card and "- org/slides" in card
    assert (folder / "README.md").read_text() == card


def test_a_card_that_cannot_be_looked_at_is_not_overwritten(hub, folder, waits):
    push_folder(folder, REPOSITORY)
    edit_card(hub, "A model of tiles.", "Written there.")
    hub.fail("HEAD .*README", 503, times=99)
    with pytest.raises(UserError, match="did not end"):
        push_folder(folder, REPOSITORY)
    assert b"Written there." in there(hub)["README.md"]


def test_what_is_pushed_is_loaded_back(hub, folder, tmp_path):
    model = tiny_model()
    export_model(model, tmp_path / "out")
    push_folder(tmp_path / "out", REPOSITORY)
    loaded, image = quiltnet.load(f"hub:{REPOSITORY}"), Image.effect_noise((50, 40), 90).convert("RGB")
    local = quiltnet.load(tmp_path / "out")
    torch.testing.assert_close(loaded.encode_images([image]), local.encode_images([image]), rtol=0, atol=0)
    torch.testing.assert_close(loaded.encode_text(["glands"]), local.encode_text(["glands"]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"repository": "no such/name"}, "no name of a repository"),
        ({"repository": "name"}, "org/name"),
        ({"create_pr": True, "revision": "v2"}, "leave one of them out"),
        ({"offline": True}, "HF_HUB_OFFLINE is set"),
        ({"token": ""}, "hf auth login"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_sent(hub, monkeypatch, tmp_path, given, said):
    given = {"repository": REPOSITORY, **given}
    monkeypatch.setenv("HF_TOKEN", given.pop("token", "hf_writes"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", given.pop("offline", False))
    with pytest.raises(UserError, match=said):
        check_push(**given)
    assert not hub.log


def test_nothing_outside_the_folder_is_pushed(hub, folder, tmp_path):
    (tmp_path / "secret.txt").write_text("private")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=r"notes.txt is a link to a file outside"):
        push_folder(folder, REPOSITORY)
    (folder / "notes.txt").unlink()
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/token").write_text("private")
    push_folder(folder, REPOSITORY)
    assert not any("cache" in path for path in there(hub))


AS_A_USER = """
import re, sys
from pathlib import Path
import torch
import quiltnet
from PIL import Image
from quiltnet.release.push import push_folder

print(push_folder(Path("out"), "org/name", private=True))
image = Image.open("tile.png")
difference = quiltnet.load("hub:org/name").encode_images([image]) - quiltnet.load("out").encode_images([image])
assert not difference.any()
for code in re.findall(r"```python\\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL):
    exec(code, {})
"""


@pytest.mark.slow
def test_the_environment_names_the_hub_and_every_library_loads_from_it(tmp_path):
    formats = FORMATS if find_spec("onnxscript") else FORMATS[:2]
    export_model(
        small_model(),
        tmp_path / "out",
        formats=formats,
        finish=lambda folder, comparisons: write_card(
            folder, None, comparisons=comparisons, license="mit", final=tmp_path / "out"
        ),
    )
    Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / "tile.png")
    with HubServer() as hub:
        names = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writes", "HF_HOME": str(tmp_path / "home")}
        environment = {**os.environ, **names, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", AS_A_USER]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    probabilities = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(probabilities) == 1 + len(formats)
    by_library = [list(literal_eval(line).values()) for line in probabilities[1:]]
    for others in by_library[1:]:
        assert others == pytest.approx(by_library[0], abs=1e-4)
    assert "hf_writes" not in done.stdout + done.stderr
