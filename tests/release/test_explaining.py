"""Explanations for people: pieces of the caption with their scores, the overlay, the figure."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.release.explain_figure import CELL, FONT_SIZE, _placed, _text_width, _wrapped, explain_figure, shade
from quiltnet.release.explaining import Explanation, explain, overlay
from tests.model.towers import TINY_IMAGE, bert_folder, tiny_model


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))


def explanation(*words: tuple[str, float], text: str = "some text", similarity: float = 0.5) -> Explanation:
    image_map = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    return Explanation(Image.new("RGB", (4, 4), (100, 100, 100)), text, similarity, image_map, list(words))


def test_pieces_are_those_of_the_byte_pair_encoding(picture):
    found = explain(tiny_model(), picture, "Cilia, fatty  tissue")
    assert [piece for piece, _ in found.words] == ["cil", "ia", ",", "fatty", "tissue"]
    scores = [score for _, score in found.words]
    assert max(scores) == 1 and min(scores) >= 0 and len(set(scores)) > 2
    assert found.image_map.shape == (32, 32) and found.image_map.min() == 0 and found.image_map.max() == 1
    assert -1 <= found.similarity <= 1 and found.text == "Cilia, fatty  tissue"


def test_pieces_are_those_of_a_hugging_face_tokeniser(picture, tmp_path):
    text = {"hf_model_name": str(bert_folder(tmp_path)), "context_length": 6, "pretrained": True}
    model = build_model(image=TINY_IMAGE, text={**text, "hf_pooler_type": "mean_pooler"}, embed_dim=16)
    found = explain(model, picture, "A zebra of glands tissue")
    # Of six places two are taken by [CLS] and [SEP]; an unknown word keeps its letters.
    assert [piece for piece, _ in found.words] == ["A", "zebra", "of", "gland"]


def test_the_image_is_shown_as_the_tower_sees_it(picture):
    model = tiny_model()
    seen = explain(model, picture, "gland").image
    sized = picture.resize((32, 40), Image.Resampling.BICUBIC).crop((0, 4, 32, 36))
    assert np.abs(np.asarray(seen, int) - np.asarray(sized, int)).max() <= 1


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_a_text_without_a_token_is_refused(picture, text):
    with pytest.raises(UserError, match="has no token"):
        explain(tiny_model(), picture, text)


def test_the_overlay_is_blue_where_nothing_counts_and_red_where_most_does():
    mixed = np.asarray(overlay(explanation()), int)
    assert mixed[0, 0].tolist() == [50, 50, 114] and mixed[-1, -1].tolist() == [114, 50, 50]
    green = mixed[..., 1]
    assert green[1:3].min() > green[[0, -1]][:, [0, -1]].max()


def test_words_are_white_green_or_red():
    assert shade(0) == (1, 1, 1)
    for score, strongest in ((0.5, 1), (-0.5, 0)):
        colour, full = shade(score), shade(2 * score)
        assert max(range(3), key=colour.__getitem__) == strongest and full[strongest] == max(full)
        assert all(weak > strong for weak, strong in zip(colour, full, strict=True))


def test_pieces_never_leave_their_strip_and_never_overlap():
    words = [("surface", 0.1), ("epi", 0.9), ("theli", 0.3), ("um", 0.2), ("$\\alpha$", 0.5)] * 6
    placed = _placed(words, width=3.0)
    assert [(piece.text, piece.score) for piece in placed] == words
    assert all(piece.left + piece.width <= 3.0 for piece in placed) and placed[-1].line > 1
    for one, other in pairwise(placed):
        same_line = other.line == one.line and other.left > one.left + one.width
        assert same_line or (other.line == one.line + 1 and other.left == 0)


def test_a_text_is_wrapped_under_the_width_of_an_image():
    text = "a histopathology slide showing  lung squamous cell carcinoma\nin situ"
    lines = _wrapped(text)
    assert " ".join(lines).split() == text.split() and len(lines) > 1
    assert all(_text_width(line, FONT_SIZE) <= CELL for line in lines)
    assert _wrapped("immunohistochemistry" * 3 + " of it") == ["immunohistochemistry" * 3, "of it"]


def test_the_figure_shows_every_piece_similarity_and_model():
    rows = [explanation(("cil", 1.0), ("ia", 0.2)), explanation(("$x$", 0.4), text="$x$", similarity=-0.25)]
    figure = explain_figure({"start": rows, "tuned": rows})
    canvas, *images = figure.axes
    written = [text.get_text() for text in canvas.texts]
    for text in (
        "some text",
        "start",
        "tuned",
        "cil",
        "ia",
        "$x$",
        "similarity 0.500",
        "similarity -0.250",
        "Negative",
        "Positive",
    ):
        assert text in written
    assert written.count("cil") == 2 and len(images) == 6  # the image once, an overlay each, two rows
    figure.savefig("/dev/null", format="png", dpi=20)  # a "$" is no formula
    assert len(explain_figure({"one": rows}).axes) == 5


@pytest.mark.parametrize(
    "texts", [{"a": ["x"], "b": ["y"]}, {"a": []}, {}, {"a": ["x"], "b": ["x"], "c": ["x"]}], ids=str
)
def test_what_does_not_fit_side_by_side_is_refused(texts):
    shown = {model: [explanation(("x", 1.0), text=text) for text in rows] for model, rows in texts.items()}
    with pytest.raises(UserError, match="by one model, or of the same by two"):
        explain_figure(shown)
