"""The app's page and its server, by Gradio; imported only where the page is wanted."""

from __future__ import annotations

import html
import ipaddress
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from quiltnet.errors import UserError
from quiltnet.release.app import AS_TYPED, Answers
from quiltnet.release.explaining import Explanation, overlay

MAX_FILE_BYTES = 32 * 1024**2
CACHE_S = 600  # uploads older than this are deleted; so is everything at the end
WAITING = 20  # requests that may wait for the model

# Fonts of the reader's machine: some of Gradio's themes load theirs from another host.
FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")

NOTICE = "For research only, not for diagnosis. Tiles stay on the machine that runs this app, which deletes them."
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
#notice { opacity: 0.7; }
#relevance img { height: 100%; width: 100%; object-fit: contain; }
"""

# All events take turns: the model answers one request at a time.
_TURN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def build_page(answers: Answers, read_tile: Callable[[str], Image.Image], title: str) -> gr.Blocks:
    """
    Args:
        read_tile: path of an uploaded file -> RGB image; raises UserError for what is none.
        title: what the model is called.
    """
    requests = _Requests(answers, read_tile)
    with gr.Blocks(title=f"QuiltNet: {title}", analytics_enabled=False, delete_cache=(CACHE_S, CACHE_S)) as page:
        gr.Markdown(f"## QuiltNet\n`{title.replace('`', ' ')}`")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                tile, texts, wording, button = _questions(answers)
            with gr.Column(scale=5, min_width=320):
                probabilities, chosen, picture, words, nearest = _answer_fields(answers)
        gr.Markdown(NOTICE, elem_id="notice")
        shown = [probabilities, chosen, picture, words, nearest]
        button.click(
            requests.look, [tile, texts, wording], shown, api_name="look", show_progress_on=probabilities, **_TURN
        )
        chosen.input(
            requests.relevance,
            [tile, chosen, wording],
            [picture, words],
            api_name="relevance",
            show_progress_on=picture,
            **_TURN,
        )
        _refuse_addresses(page)
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


class _Requests:
    """What the page asks for, with values as its fields show them."""

    def __init__(self, answers: Answers, read_tile: Callable[[str], Image.Image]) -> None:
        self.answers = answers
        self.read_tile = read_tile

    def look(self, tile: str | None, texts: str, wording: str) -> tuple[Any, ...]:
        """Probabilities of texts, the relevance map of the best one, and the nearest entries of the gallery."""
        with _short_messages():
            image = self.read_tile(_given(tile))
            seen = self.answers.look(image, texts, wording)
            picture, words = self._map_of_best(image, seen.best, wording)
        if not seen.probabilities:
            gr.Info(
                "One text has nothing to be compared with; type a second one for probabilities. Its cosine similarity "
                f"is {seen.similarities[seen.best]:.3f}."
            )
        choice = gr.Dropdown(choices=list(seen.similarities), value=seen.best)
        nearest = [[f"{similarity:.3f}", label] for similarity, label in seen.nearest]
        return seen.probabilities or None, choice, picture, words, nearest

    def relevance(self, tile: str | None, text: str, wording: str) -> tuple[Any, ...]:
        """The relevance map of one text, and how much each of its pieces matters."""
        with _short_messages():
            return _shown(self.answers.relevance(self.read_tile(_given(tile)), text, wording))

    def _map_of_best(self, image: Image.Image, text: str, wording: str) -> tuple[Image.Image | None, Any]:
        """A model that cannot be explained still has its probabilities."""
        try:
            return _shown(self.answers.relevance(image, text, wording))
        except UserError as error:
            gr.Warning(html.escape(f"No relevance map: {error}", quote=False))
            return None, []


def _questions(answers: Answers) -> tuple[gr.Image, gr.Textbox, gr.Dropdown, gr.Button]:
    tile = gr.Image(label="Tile", type="filepath", sources=["upload", "clipboard"], elem_id="tile", height=300)
    # Gradio would decode the file without a limit, turn it, and save it again with a loss.
    tile.preprocess = lambda payload: None if payload is None else payload.path
    texts = gr.Textbox(
        label="Class names or captions, one a line",
        placeholder="fatty tissue\nsmooth muscle\ntumor",
        lines=5,
        max_lines=15,
    )
    wording = gr.Dropdown(
        list(answers.prompt_sets),
        value=AS_TYPED,
        label="Wording",
        info="As typed, for captions; or a prompt set whose sentences are averaged for each class name.",
    )
    return tile, texts, wording, gr.Button("Look", variant="primary")


def _answer_fields(answers: Answers) -> tuple[gr.Label, gr.Dropdown, gr.Image, gr.HighlightedText, gr.Dataframe]:
    among = "of each text by itself" if answers.is_siglip else "among these texts"
    probabilities = gr.Label(label=f"Probability, {among}", show_heading=False)
    chosen = gr.Dropdown([], label="Relevance map for", allow_custom_value=True, interactive=True)
    with gr.Row(equal_height=True):
        picture = gr.Image(
            label="Where the model looks",
            elem_id="relevance",
            format="png",
            height=280,
            interactive=False,
            buttons=["fullscreen"],
            scale=3,
        )
        words = gr.HighlightedText(label="Words that matter", show_legend=False, interactive=False, scale=2)
    nearest = gr.Dataframe(
        headers=["cosine", answers.gallery.shows if answers.gallery else "caption"],
        label="Nearest in the gallery",
        datatype="str",
        column_widths=["22%", "78%"],
        wrap=True,
        interactive=False,
        visible=answers.gallery is not None,
    )
    return probabilities, chosen, picture, words, nearest


def start_server(page: gr.Blocks, host: str, port: int) -> str:
    """Answer in threads of their own until ``page.close()`` -> the address. Raises OSError where the port is taken."""
    name = f"[{host}]" if ":" in host else host
    # A page elsewhere whose name is made to point here (DNS rebinding) still sends that name.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", name])
    page.launch(
        server_name=name,
        server_port=port,
        app_kwargs={"middleware": [guard] if is_loopback(host) else [], "docs_url": None, "redoc_url": None},
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONO),
        css=CSS,
        max_file_size=MAX_FILE_BYTES,
        allowed_paths=[],
        share=False,
        inbrowser=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        footer_links=[],
        show_error=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return page.local_url


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_addresses(page: gr.Blocks) -> None:
    """Only what was uploaded is read: Gradio would download a file that a request names by its address."""
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = _uploads_only(block.async_move_resource_to_block_cache)


def _uploads_only(move: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def moved(path: Any) -> str | None:
        if str(path).startswith(("http:", "https:")):
            raise gr.Error("The app fetches nothing; upload the file.", print_exception=False)
        return await move(path)

    return moved


@contextmanager
def _short_messages() -> Iterator[None]:
    """A user's mistake -> its message on the page; a mistake of ours -> its traceback in the terminal."""
    try:
        yield
    except UserError as error:
        # Gradio shows a message as HTML, and this one may quote what was typed.
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, duration=None, print_exception=False) from None
    except Exception:
        logging.getLogger(__name__).exception("a request failed")
        raise gr.Error("The app failed; the terminal that it runs in says why.", print_exception=False) from None


def _given(tile: str | None) -> str:
    if tile is None:
        raise UserError("no tile is given; drop an image into the field")
    return tile


def _shown(explanation: Explanation) -> tuple[Image.Image, list[tuple[str, float]]]:
    return overlay(explanation), explanation.words
