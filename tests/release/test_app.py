"""``quiltnet app``: what it says of a tile is what the model says, and nobody else can ask."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from quiltnet.cli import app_server
from quiltnet.cli.app_gallery import NO_GALLERY, find_gallery
from quiltnet.cli.app_server import check_port, exposure_warning, read_prompt_sets, read_tile
from quiltnet.cli.embed import embed
from quiltnet.errors import UserError
from quiltnet.evaluation.prompts import class_features
from quiltnet.model.embedder import Embedder
from quiltnet.release.app import MAX_CHARACTERS, MAX_TEXTS, Answers, AppGallery
from quiltnet.release.exporting import export_open_clip
from tests.commands import environment
from tests.model.towers import tiny_model

TEXTS = ["fatty tissue", "smooth muscle", "a gland"]
TYPED = "\n".join(["", *TEXTS, "  fatty tissue "])  # empty lines and repeats do not count


@pytest.fixture(scope="module")
def tile() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(tiny_model())


def cosines(embedder: Embedder, tile: Image.Image, texts: list[str]) -> torch.Tensor:
    """(C,) by the model alone."""
    model = embedder.model
    with torch.no_grad():
        image_features = model.encode_image(model.transform(tile)[None])
        return (model.encode_text(model.tokenize(texts)) @ image_features.T).squeeze(1)


def test_probabilities_are_those_of_the_model(embedder, tile):
    seen = Answers(embedder).look(tile, TYPED)
    expected = cosines(embedder, tile, TEXTS)
    assert list(seen.similarities) == TEXTS
    assert list(seen.similarities.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    softmax = (embedder.model.logit_scale * expected).softmax(dim=0).tolist()
    assert list(seen.probabilities.values()) == pytest.approx(softmax, abs=1e-6)
    assert seen.best == TEXTS[expected.argmax()]
    assert seen.nearest == []
    assert Answers(embedder).look(tile, "a gland").probabilities == {}  # nothing to compare it with


def test_a_siglip_model_judges_each_text_by_itself(tile):
    embedder = Embedder(tiny_model(init_logit_bias=-1.5))
    model = embedder.model
    for texts in (TEXTS, TEXTS[:1]):
        sigmoid = torch.sigmoid(model.logit_scale * cosines(embedder, tile, texts) + model.logit_bias).tolist()
        assert list(Answers(embedder).look(tile, "\n".join(texts)).probabilities.values()) == pytest.approx(sigmoid)


def test_a_prompt_set_is_averaged_and_its_first_prompt_explained(embedder, tile):
    answers = Answers(embedder, read_prompt_sets())
    prompts = answers.prompt_sets["quilt4_period"].fill(["fat", "gland"])
    assert len(prompts["fat"]) == 4 and prompts["fat"][0].endswith(".")
    of_classes = class_features(embedder.encode_text(texts) for texts in prompts.values())
    expected = (of_classes @ embedder.encode_images([tile]).T).squeeze(1).tolist()
    assert list(answers.look(tile, "fat\ngland", "quilt4_period").similarities.values()) == pytest.approx(expected)
    assert answers.relevance(tile, "fat", "quilt4_period").text == prompts["fat"][0]
    assert answers.relevance(tile, "fat").text == "fat"


def test_nearest_come_in_order(embedder, tile):
    own = embedder.encode_images([tile])
    turned = own.roll(1, dims=1)
    gallery = AppGallery(["opposite", "same", "near"], torch.cat([-own, own, own + turned / 4]))
    nearest = Answers(embedder, gallery=gallery).look(tile, TYPED).nearest
    assert [label for _, label in nearest] == ["same", "near", "opposite"]
    assert nearest[0][0] == pytest.approx(1) and nearest[2][0] == pytest.approx(-1)
    assert len(gallery.nearest(own, count=2)) == 2


@pytest.mark.parametrize(
    ("typed", "wording", "message"),
    [
        (" \n\n", "as typed", "no text is given"),
        ("\n".join(map(str, range(MAX_TEXTS + 1))), "as typed", f"at most {MAX_TEXTS}"),
        ("x" * (MAX_CHARACTERS + 1), "as typed", f"at most {MAX_CHARACTERS}"),
        ("Fat\nfat", "as typed", "share the prompt"),
        ("fat", "poems", "no wording 'poems'"),
    ],
    ids=["none", "many", "long", "equal", "wording"],
)
def test_what_cannot_be_asked(embedder, tile, typed, wording, message):
    with pytest.raises(UserError, match=message):
        Answers(embedder).look(tile, typed, wording)


def test_a_map_is_of_one_text(embedder, tile):
    with pytest.raises(UserError, match="2 texts"):
        Answers(embedder).relevance(tile, "fat\ngland")


def png(width: int, height: int) -> bytes:
    """A file that claims to be so large, and has no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "not_an_image"),
        (b"", "empty_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (png(60, 50), "broken_image"),
        (png(20_000, 20_000), "more than 89,478,485 pixels"),
        (png(10_000, 10_000), "more than 89,478,485 pixels"),
    ],
    ids=["text", "empty", "eps", "svg", "cut", "bomb", "large"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_tile(tmp_path, content, message):
    (tmp_path / "tile.png").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_tile(str(tmp_path / "tile.png"))


def test_a_tile_keeps_its_pixels(tmp_path, tile):
    tile.save(tmp_path / "tile.png")
    assert np.array_equal(np.asarray(read_tile(str(tmp_path / "tile.png"))), np.asarray(tile))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("model") / "tiny"
    export_open_clip(tiny_model(), out)
    return str(out)


def test_gallery_of_a_run_is_its_held_out_captions(tmp_path, capsys, embedder, drawn_shards):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "open_clip_config.json").touch()
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"val": {"shards": str(drawn_shards / "val")}}}))
    gallery = find_gallery(f"{run}@ema", None, embedder)
    assert gallery.shows == "caption"
    assert len(gallery.labels) == len({label.casefold() for label in gallery.labels}) > 1
    assert torch.equal(gallery.features, embedder.encode_text(gallery.labels))
    assert f"{len(gallery.labels)} captions" in capsys.readouterr().out
    assert find_gallery(str(run / "checkpoints" / "newest"), None, embedder).labels == gallery.labels
    assert find_gallery(str(run), NO_GALLERY, embedder) is None
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"val": {"shards": str(tmp_path / "moved")}}}))
    assert find_gallery(str(run), None, embedder) is None
    assert "no gallery" in capsys.readouterr().out


def test_gallery_of_embeddings(tmp_path, embedder, model_folder, drawn_shards, tile):
    of_shards, of_folder = tmp_path / "shards.safetensors", tmp_path / "folder.safetensors"
    embed(model_folder, str(drawn_shards / "val"), of_shards)
    gallery = find_gallery(model_folder, str(of_shards), embedder)
    captions = find_gallery(model_folder, str(drawn_shards / "val"), embedder).labels
    assert gallery.shows == "image" and len(gallery.labels) == len(gallery.features) == 6
    assert all(any(caption in label for caption in captions) for label in gallery.labels)

    (tmp_path / "tiles").mkdir()
    tile.save(tmp_path / "tiles" / "mine.png")
    embed(model_folder, str(tmp_path / "tiles"), of_folder)
    gallery = find_gallery(model_folder, str(of_folder), embedder)
    assert gallery.labels == ["mine.png"]
    assert gallery.nearest(embedder.encode_images([tile]))[0][0] == pytest.approx(1)

    other = tiny_model()
    with torch.no_grad():
        other.clip.text_projection.add_(1)
    with pytest.raises(UserError, match="weights_sha256"):
        find_gallery(model_folder, str(of_folder), Embedder(other))
    embed(model_folder, str(tmp_path / "tiles"), of_folder, before_projection=True, overwrite=True)
    with pytest.raises(UserError, match="projected is false"):
        find_gallery(model_folder, str(of_folder), embedder)
    of_folder.write_bytes(b"something else")
    with pytest.raises(UserError, match="cannot be read"):
        find_gallery(model_folder, str(of_folder), embedder)


def test_where_it_cannot_listen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="take another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="no address of this machine"):
        check_port("no such host", 7860)
    with pytest.raises(UserError, match="cannot listen"):
        check_port("192.0.2.1", 7860)  # for documentation, RFC 5737


def test_another_host_is_warned_of():
    assert "any of its networks" in exposure_warning("0.0.0.0") and "patient data" in exposure_warning("10.0.0.7")


def test_without_gradio_there_is_a_remedy(monkeypatch):
    monkeypatch.setattr(app_server, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "quiltnet\[app\]"'):
        app_server.serve("outputs/none")


class Page:
    """The running app, asked as its page asks it."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        import httpx

        self.process = process
        self.client = httpx.Client(base_url=address, timeout=120, trust_env=False)

    def upload(self, name: str, content: bytes) -> dict[str, object]:
        (path,) = self.client.post("/gradio_api/upload", files={"files": (name, content)}).json()
        return uploaded(path)

    def ask(self, endpoint: str, *values: object) -> tuple[str, object]:
        """(``complete`` or ``error``, what came with it)."""
        call = f"/gradio_api/call/{endpoint}"
        event = self.client.post(call, json={"data": values}).json()["event_id"]
        lines = self.client.get(f"{call}/{event}").text.strip().splitlines()
        return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))


def uploaded(path: str) -> dict[str, object]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory, model_folder, drawn_shards):
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("app")
    port = free_port()
    options = ["app", model_folder, "--port", str(port), "--gallery", str(drawn_shards / "val")]
    with open(folder / "stderr", "w") as stderr:
        command = [sys.executable, "-m", "quiltnet.cli.app", *options]
        variables = {**environment(), "TMPDIR": str(folder), "GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/"}
        process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=stderr, text=True)
    lines = iter(process.stdout.readline, "")
    started = next((line for line in lines if "Ctrl-C" in line), None)
    assert started is not None, (folder / "stderr").read_text()
    page = Page(process, f"http://127.0.0.1:{port}")
    yield page
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    page.client.close()


@pytest.mark.slow
def test_the_page_answers(page, tmp_path, embedder, tile, drawn_shards):
    tile.save(tmp_path / "tile.png")
    sent = page.upload("tile.png", (tmp_path / "tile.png").read_bytes())
    outcome, (probabilities, _, picture, words, nearest) = page.ask("look", sent, TYPED, "as typed")
    gallery = find_gallery("", str(drawn_shards / "val"), embedder)
    expected = Answers(embedder, gallery=gallery).look(tile, TYPED)
    shown = {entry["label"]: entry["confidence"] for entry in probabilities["confidences"]}
    assert outcome == "complete" and shown == pytest.approx(expected.probabilities, abs=1e-6)
    assert nearest["data"] == [[f"{similarity:.3f}", label] for similarity, label in expected.nearest]
    assert words
    (tmp_path / "map.png").write_bytes(page.client.get(picture["url"]).content)
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == (32, 32) and len(image.getcolors(2000)) > 1
    outcome, (other, _) = page.ask("relevance", sent, "something else", "quilt4")
    assert outcome == "complete" and page.client.get(other["url"]).content != (tmp_path / "map.png").read_bytes()


@pytest.mark.slow
def test_mistakes_end_in_a_message(page, tmp_path, tile):
    outcome, told = page.ask("look", page.upload("tile.png", b"not an image"), TYPED, "as typed")
    assert outcome == "error" and "not_an_image" in told["error"]
    tile.save(tmp_path / "tile.png")
    outcome, told = page.ask("look", page.upload("tile.png", (tmp_path / "tile.png").read_bytes()), "", "as typed")
    assert outcome == "error" and "no text is given" in told["error"]
    sent = page.upload("tile.png", (tmp_path / "tile.png").read_bytes())
    outcome, told = page.ask("look", sent, "<img src='//example.org'>\n<IMG src='//example.org'>", "as typed")
    assert outcome == "error" and "&lt;img" in told["error"] and "<" not in told["error"]
    outcome, told = page.ask("look", None, TYPED, "as typed")
    assert outcome == "error" and "no tile is given" in told["error"]


@pytest.mark.slow
def test_only_this_machine_and_only_uploads(page, tmp_path, tile):
    listening = [c for c in psutil.Process(page.process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    assert page.client.get("/config").status_code == 200
    assert page.client.get("/config", headers={"Host": "evil.example"}).status_code == 400
    tile.save(tmp_path / "private.png")
    assert page.client.get(f"/gradio_api/file={tmp_path}/private.png").status_code == 403
    for path in (f"{tmp_path}/private.png", "http://127.0.0.1:9/tile.png", "https://example.org/tile.png"):
        outcome, _ = page.ask("look", uploaded(path), TYPED, "as typed")
        assert outcome == "error"
    too_large = page.client.post("/gradio_api/upload", files={"files": ("tile.png", bytes(33 * 2**20))})
    assert too_large.status_code == 413


@pytest.mark.slow
def test_ctrl_c_stops_it_and_leaves_no_tile(page, tmp_path, tile):
    tile.save(tmp_path / "tile.png")
    sent = page.upload("tile.png", (tmp_path / "tile.png").read_bytes())
    kept = read_tile(sent["path"])
    assert kept.size == tile.size
    page.process.send_signal(signal.SIGINT)
    assert page.process.wait(timeout=60) == 0
    with pytest.raises(FileNotFoundError):
        read_tile(sent["path"])
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            check_port("127.0.0.1", page.client.base_url.port)
            return
        except UserError:
            time.sleep(0.1)
    raise AssertionError("the port is still taken")
