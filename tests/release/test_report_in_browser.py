"""The page in a real browser: nothing leaves it, nothing runs in it, and it fits a phone."""

from __future__ import annotations

import base64
import shutil
from dataclasses import dataclass
from itertools import pairwise

import pytest

from quiltnet.release.report import render_report
from quiltnet.release.report_samples import Example, Hit, Query, Samples, Tile
from quiltnet.release.report_subjects import read_subjects
from tests.release.reported_runs import BREAK_OUT, CLASSES, SCRIPT, results, write_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"
]  # fmt: skip
LONG = "a_very_long_name_without_any_space_" * 6
PIXEL = Tile(
    "data:image/gif;base64," + base64.b64encode(b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff!\xf9\4\0\0\0\0\0,"
                                                b"\0\0\0\0\1\0\1\0\0\2\2D\1\0;").decode(), 128, 128
)  # fmt: skip


@dataclass
class Seen:
    """What the browser noticed of a page that it was shown."""

    page: playwright.Page
    requests: list[str]
    complaints: list[str]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two runs with everything that a page can show, hostile and long names among it."""
    folder = tmp_path_factory.mktemp("report")
    found = results()
    found["outcomes"][LONG] = found["outcomes"].pop("val_pairs")
    corrupted = {"balanced_accuracy": 0.9, "balanced_accuracy@hed_1": 0.8, "balanced_accuracy@hed_2": 0.6}
    found["outcomes"]["robustness"] = {"scores": {**corrupted, "drop@hed_1": 0.1, "drop@hed_2": 0.3}}
    runs = [write_run(folder / name, found=found, note=BREAK_OUT, **{LONG: LONG}) for name in ("one", LONG)]
    hits = [Hit(0.5 - rank / 10, rank == 1, PIXEL, caption) for rank, caption in enumerate([*CLASSES, LONG, BREAK_OUT])]
    queries = [Query(hits, PIXEL, SCRIPT)] * 2
    example = Example(PIXEL, PIXEL, [(SCRIPT, 1.0), (LONG, -0.5)], 0.3)
    samples = Samples("one", 20, 5, queries, queries, [example])
    path = folder / "report.html"
    path.write_text(render_report(read_subjects(runs), [samples], share_samples=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def show(browser, file):
    """Open the page at a width and in a colour scheme."""
    contexts = []

    def opened(width: int = 1280, scheme: str = "light") -> Seen:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        seen = Seen(contexts[-1].new_page(), [], [])
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.complaints.append(message.text))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.goto(file.as_uri())
        return seen

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def wide(show):
    return show()


def test_nothing_is_asked_for_and_nothing_goes_wrong(wide, file):
    outside = [url for url in wide.requests if not url.startswith("data:")]
    assert outside == [file.as_uri()]
    assert wide.complaints == []


def test_no_script_of_a_caption_or_a_name_runs(wide):
    assert "hacked" not in wide.page.title()
    assert wide.page.locator("script").count() == 0
    assert SCRIPT in wide.page.inner_text("#samples"), "it is shown as the text that it is"


def test_the_policy_stops_what_escaping_would_miss(show):
    seen = show()
    seen.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/x onerror=1>')")
    seen.page.wait_for_timeout(100)
    assert any("Content Security Policy" in complaint for complaint in seen.complaints)


@pytest.mark.parametrize("width", [375, 1280])
def test_only_boxes_scroll_sideways(show, width):
    page = show(width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = """[...document.querySelectorAll('main *')].filter(
        e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""
    assert page.evaluate(beyond) == []


def test_light_and_dark_differ_and_can_be_read(show):
    colours = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    found = [show(scheme=scheme).page.evaluate(colours) for scheme in ("light", "dark")]
    for text, background in found:
        assert contrast(text, background) >= 7
    assert luminance(found[0][1]) > 0.9 and luminance(found[1][1]) < 0.1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(show, scheme):
    # Of every text on what lies behind it; color-mix() is computed by a canvas, which knows all notations.
    script = """selector => {
        const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const rgb = (colours) => { colours.forEach(c => { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); });
                                   return 'rgb(' + pen.getImageData(0, 0, 1, 1).data.slice(0, 3).join(', ') + ')'; };
        return [...document.querySelectorAll(selector)].map(element => {
            const behind = [];
            for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
            const style = getComputedStyle(element);
            return [rgb([...behind, element instanceof SVGElement ? style.fill : style.color]), rgb(behind)];
        });
    }"""
    page = show(scheme=scheme).page
    for selector in (".note", "nav a", ".better", ".worse", ".heat td.cell", ".word", "pre", "svg text"):
        pairs = page.evaluate(script, selector)
        assert pairs and all(contrast(*pair) >= 4.5 for pair in pairs), (selector, pairs)


def test_links_lead_to_sections_and_a_reader_can_find_the_way(wide):
    page = wide.page
    for link in page.locator("nav a").all():
        assert page.locator(f"section{link.get_attribute('href')} h2").count() == 1
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => e.tagName)")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0
    assert page.locator("thead th:not([scope]), tbody th:not([scope])").count() == 0


def test_a_page_is_light(wide, file):
    assert file.stat().st_size < 1_000_000
    assert wide.page.evaluate("document.querySelectorAll('*').length") < 4000


def luminance(colour: str) -> float:
    """Relative, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
