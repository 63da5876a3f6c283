"""Tiles and captions of a report are those of the set, answers are marked as it has them, and only where asked for."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from quiltnet.cli import report as command
from quiltnet.errors import UserError
from quiltnet.release import report_samples
from quiltnet.release.report import render_report
from quiltnet.release.report_samples import make_samples
from quiltnet.release.report_subjects import read_subjects
from tests.model.towers import tiny_model
from tests.release.reported_runs import SCRIPT, Page, results, write_run

COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 10)]
CAPTIONS = [["fatty tissue"], [SCRIPT], ["gland"], ["fatty tissue", "a gland of tissue"]]


class Pairs:
    """Four tiles of one colour each; the first and the last share a caption."""

    split = "val"

    def __len__(self) -> int:
        return len(COLOURS)

    def __getitem__(self, number: int) -> tuple[Image.Image, list[str], str]:
        return Image.new("RGB", (300, 200), COLOURS[number]), CAPTIONS[number], f"image{number}"

    def content(self) -> list[str]:
        return ["four"]


@pytest.fixture(scope="module")
def made():
    return make_samples("demo", tiny_model(), Pairs())


def colour_of(tile) -> tuple[int, int, int]:
    header, data = tile.uri.split(",")
    assert header == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (tile.width, tile.height) and not image.getexif()
    middle = np.asarray(image)[tile.height // 2, tile.width // 2]
    return min(COLOURS, key=lambda colour: np.abs(middle.astype(int) - colour).sum())


def test_the_answers_of_an_image_are_its_captions(made):
    assert (made.images, made.captions) == (4, 4) and len(made.image_queries) == 4
    for query in made.image_queries:
        own = CAPTIONS[COLOURS.index(colour_of(query.tile))]
        assert {hit.caption for hit in query.hits if hit.is_right} == set(own)
        assert [hit.similarity for hit in query.hits] == sorted((hit.similarity for hit in query.hits), reverse=True)


def test_the_answers_of_a_caption_are_all_images_that_carry_it(made):
    by_caption = {query.caption: query for query in made.caption_queries}
    right = {colour_of(hit.tile) for hit in by_caption["fatty tissue"].hits if hit.is_right}
    assert right == {COLOURS[0], COLOURS[3]}
    assert max(made.caption_queries[0].hits[0].tile.width, made.caption_queries[0].hits[0].tile.height) == 128


def test_similarities_are_the_models(made):
    model = tiny_model().eval()
    with torch.no_grad():
        image = model.encode_image(model.transform(Pairs()[0][0])[None])
        text = model.encode_text(model.tokenize([hit.caption for hit in made.image_queries[0].hits]))
    found = [hit.similarity for hit in made.image_queries[0].hits]
    assert found == pytest.approx((image @ text.T)[0].tolist(), abs=1e-5)


def test_pairs_are_explained(made):
    assert len(made.examples) == 4 and not made.notes
    assert all(-1 <= weight <= 1 for example in made.examples for _, weight in example.words)


def test_a_tower_that_cannot_be_explained_leaves_the_gallery(monkeypatch):
    def refuse(*arguments):
        raise UserError("no method is known for this tower")

    monkeypatch.setattr(report_samples, "explain", refuse)
    made = make_samples("demo", tiny_model(), Pairs())
    assert not made.examples and made.image_queries
    assert made.notes == ["No relevance examples: no method is known for this tower."]


def test_the_page_shows_them_as_text_and_only_where_they_are_shared(tmp_path, made):
    subjects = read_subjects([write_run(tmp_path / "demo", found=results())])
    page = Page(render_report(subjects, [made], share_samples=True))
    assert "fatty tissue" in page.words and SCRIPT in page.text and not page.all("script")
    assert len(page.all("img")) == 4 + 4 * 4 + 2 * 4
    without = Page(render_report(subjects))
    assert "fatty tissue" not in without.words and not without.all("img")
    assert "quiltnet report RUN --share-samples" in without.words


def test_a_run_without_weights_or_shards_says_so(tmp_path, monkeypatch):
    run = write_run(tmp_path / "demo", data={"val": {"shards": None}})
    command.report([run], share_samples=True)
    assert "the run has saved no checkpoint yet" in Page((run / "report.html").read_text()).words
    monkeypatch.setattr(command, "_has_weights", lambda path: True)
    command.report([run], share_samples=True)
    assert "the run names no held-out shards" in Page((run / "report.html").read_text()).words
    with pytest.raises(UserError, match=r"samples of demo cannot be shown: .*name the shards with --shards"):
        command.report([run], share_samples=True, shards=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="say --share-samples as well"):
        command.report([run], shards="shards/val")
