"""``quiltnet app``: a page on this machine that shows what a model makes of a tile."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quiltnet.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from quiltnet.evaluation.prompts import PromptSet
    from quiltnet.release.app import Answers


def serve(
    source: Annotated[
        str, typer.Argument(help="Run directory (RUN@best, RUN@ema), checkpoint, or anything that quiltnet.load takes.")
    ],
    gallery: Annotated[
        str | None,
        typer.Option(
            help="Where the nearest are looked for: shards (their captions), a file of quiltnet embed (its images), or "
            "none. The run's held-out shards by default."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine reaches it.")
    ] = "127.0.0.1",
) -> None:
    """Show a page where one drops a tile and types texts: probabilities, relevance map, nearest captions.

    It listens on this machine alone, sends nothing anywhere, and deletes uploaded tiles. Ctrl-C stops it.
    """
    if find_spec("gradio") is None:
        raise UserError('the app needs Gradio, which is not installed: pip install "quiltnet[app]"')
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="quiltnet-app-") as uploads:
        _confine_gradio(Path(uploads))
        _serve_until_stopped(_load_answers(source, gallery), source, host, port)


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen there, before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise UserError(f"--host {host} is no address of this machine ({error}); leave it out, or give one") from error
    except OSError as error:
        raise UserError(
            f"cannot listen on port {port} of {host} ({error.strerror}); something else may: take another --port"
        ) from error


def exposure_warning(host: str) -> str:
    """Who reaches a server that listens on ``host``, and how to do without."""
    who = (
        "everyone who can reach this machine by any of its networks"
        if _is_any(host)
        else f"everyone who reaches {host}"
    )
    return (
        f"warning: --host {host} lets {who} use this model and see the gallery's captions, without a password and "
        "unencrypted. Tiles and captions may be patient data. For yourself alone, leave --host out and open a tunnel: "
        "ssh -L 7860:localhost:7860 THIS_MACHINE"
    )


def read_tile(path: str) -> Image.Image:
    """RGB image of an uploaded file. Raises UserError where it is none, or too large."""
    from quiltnet.data.decoding import BrokenSample, decode_pil
    from quiltnet.image_opening import FORMATS, MAX_PIXELS

    try:
        return decode_pil(Path(path).read_bytes())
    except BrokenSample as error:
        if error.reason == "too_many_pixels":
            raise UserError(f"the image has more than {MAX_PIXELS:,} pixels; give a tile of a slide") from error
        raise UserError(f"the file cannot be read ({error.reason}); give an image: {', '.join(FORMATS)}") from error


def read_prompt_sets() -> dict[str, PromptSet]:
    """Those of conf/prompts by name, without the bare class name, which is the text as it is typed."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    files = (file.name for file in resources.files("quiltnet.conf").joinpath("prompts").iterdir())
    names = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
    with initialize_config_module("quiltnet.conf", version_base="1.3"):
        return {name: instantiate(compose(f"prompts/{name}").prompts) for name in names if name != "class_name"}


def _load_answers(source: str, gallery: str | None) -> Answers:
    from quiltnet.cli.app_gallery import find_gallery
    from quiltnet.model.embedder import Embedder
    from quiltnet.release.app import Answers
    from quiltnet.release.hub import load_model
    from quiltnet.training.precision import build_accelerator

    embedder = Embedder(load_model(source)).to(build_accelerator().device)
    return Answers(embedder, read_prompt_sets(), find_gallery(source, gallery, embedder))


def _serve_until_stopped(answers: Answers, source: str, host: str, port: int) -> None:
    from quiltnet.release.app_page import build_page, is_loopback, start_server

    page = build_page(answers, read_tile, source)
    if not is_loopback(host):
        print(exposure_warning(host), file=sys.stderr, flush=True)
    try:
        address = start_server(page, host, port)
    except OSError as error:
        raise UserError(f"port {port} of {host} was taken meanwhile ({error}); take another --port") from error
    print(f"{source}: {address} (Ctrl-C stops)", flush=True)
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        page.close(verbose=False)


def _confine_gradio(uploads: Path) -> None:
    """Gradio reads its environment when imported: nothing there may share, open or report anything.

    What it asks itself when it starts must not go by way of a proxy.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    # The history would be kept by the browser.
    settings = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": str(uploads)}
    os.environ |= settings
    without_proxy = [os.environ.get("NO_PROXY", ""), "localhost", "127.0.0.1", "::1"]
    os.environ["NO_PROXY"] = ",".join(filter(None, without_proxy))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _is_any(host: str) -> bool:
    return host in ("0.0.0.0", "::")
