"""Charts say what the numbers say, and their words do not run into each other."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.release.charts import bar_chart, confusion_chart, line_chart, save_chart

LONG = [
    "outputs/2026-11-02/quiltnet_b32_lr1e-4_bs1024_seed0", "ViT-B-32:openai", "hub:wisdomik/QuiltNet-B-32",
    "outputs/b16", "b", "c"
]  # fmt: skip


def bars(figure):
    return [bar for axis in figure.axes for bar in axis.patches]


def words(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def overlaps(figure):
    """Pairs of texts of a figure that share more than a pixel's edge."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        labels = [*axis.get_xticklabels(), *(axis.get_yticklabels() if axis.yaxis.get_visible() else [])]
        texts += [text for text in (*axis.texts, *labels) if text.get_text()]
    low, high = np.array([text.get_window_extent(renderer).padded(-0.5).get_points() for text in texts]).swapaxes(0, 1)
    meet = ((low[:, None] < high) & (low < high[:, None])).all(-1)
    return [(texts[i].get_text(), texts[j].get_text()) for i, j in np.argwhere(np.triu(meet, 1))]


def test_the_best_bar_of_each_group_is_hatched_and_its_number_bold():
    values = {"clip": {"lung": 0.5, "colon": 0.625}, "quilt": {"lung": 0.75, "colon": 0.625}, "new": {"lung": 0.1}}
    figure = bar_chart(values)
    # Of the lung: clip, quilt, new; of the colon: clip, quilt, which share the best value.
    assert [bool(bar.get_hatch()) for bar in bars(figure)] == [False, True, False, True, True]
    assert words(figure) == ["50", "75", "10", "62", "62", "–"]
    assert [text.get_weight() for text in figure.axes[0].texts][:3] == ["normal", "bold", "normal"]
    assert [bar.get_height() for bar in bars(figure)] == [0.5, 0.75, 0.1, 0.625, 0.625]
    assert not figure.axes[0].yaxis.get_visible()


def test_the_least_bar_is_the_best_where_less_is_better():
    values = {"clip": {"pairs": 1234.5}, "quilt": {"pairs": 37.0}}
    figure = bar_chart(values, percent=False, lower_is_better=True)
    assert [bool(bar.get_hatch()) for bar in bars(figure)] == [False, True]
    assert words(figure) == ["1,234", "37"]


def test_a_model_alone_is_not_hatched():
    assert not bars(bar_chart({"clip": {"lung": 0.5}}))[0].get_hatch()


def test_four_models_are_three_greys_and_purple():
    figure = bar_chart({model: {"lung": 0.5} for model in "abcd"})
    *greys, last = (to_rgb(bar.get_facecolor()) for bar in bars(figure))
    assert all(len(set(grey)) == 1 for grey in greys)
    assert sorted(greys, reverse=True) == greys, "from light to dark"
    red, green, blue = last
    assert green < red < blue


def test_error_bars_are_the_intervals():
    figure = bar_chart({"a": {"lung": 0.5}, "b": {"lung": 0.6}}, intervals={"b": {"lung": (0.55, 0.7)}})
    assert [list(line.get_ydata()) for line in figure.axes[0].lines][:2] == [[0.5, 0.5], [0.55, 0.7]]


@pytest.mark.parametrize(("groups", "models"), [(12, 6), (12, 1), (1, 6), (1, 1)])
def test_no_words_of_a_bar_chart_overlap(groups, models):
    names = [f"robustness_skin_cancer_{group}" for group in range(groups)]
    values = {model: dict.fromkeys(names, 1.0) for model in LONG[:models]}
    figure = bar_chart(values, title="balanced_accuracy")
    assert overlaps(figure) == []
    assert figure.get_figwidth() < 13


def test_a_confusion_matrix_is_of_percents_of_each_row_and_counts():
    figure = confusion_chart([[3, 1, 0], [0, 1200, 0]], ["benign", "malignant"])
    assert words(figure) == ["75 %", "3", "25 %", "1", "0 %", "0", "100 %", "1,200"]
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["benign", "malignant"], "an empty column of none is left out"
    figure = confusion_chart([[3, 0, 1], [0, 0, 0]], ["benign", "malignant"])
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "none"
    assert words(figure)[-1] == "no image"


@pytest.mark.parametrize("classes", [2, 16])
def test_no_words_of_a_confusion_matrix_overlap(classes):
    names = [f"colorectal adenocarcinoma epithelium {name}" for name in range(classes)]
    counts = [[12345] * (classes + 1) for _ in range(classes)]
    assert overlaps(confusion_chart(counts, names, title="zeroshot_nct_crc_100k")) == []


def test_curves_go_through_the_points_in_order_of_x():
    figure = line_chart({"clip": {16.0: 0.7, 2.0: 0.5}, "quilt": {2.0: 0.6}}, x_label="examples", y_label="accuracy")
    clip, quilt = figure.axes[0].lines
    assert (list(clip.get_xdata()), list(clip.get_ydata())) == ([2.0, 16.0], [0.5, 0.7])
    assert list(quilt.get_xdata()) == [2.0]
    low, high = figure.axes[0].get_ylim()
    assert 0.4 < low < 0.5 < 0.7 < high < 0.8, "the axis shows where the points are"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "16"]


def test_curves_have_their_intervals():
    lines = {"clip": {2.0: 0.5, 4.0: 0.6}, "quilt": {2.0: 0.6}}
    figure = line_chart(lines, x_label="x", y_label="y", intervals={"clip": {2.0: (0.4, 0.55)}}, log_x=False)
    assert [0.4, 0.55] in [list(line.get_ydata()) for line in figure.axes[0].lines]


def test_a_chart_is_written_as_png_and_svg_and_always_alike(tmp_path):
    written = []
    for folder in ("one", "two"):
        figure = bar_chart({"a": {"lung": 0.5}, "b": {"lung": 0.6}})
        written.append(save_chart(figure, tmp_path / folder / "balanced_accuracy@16-shot.v1"))
    assert [path.name for path in written[0]] == [
        "balanced_accuracy@16-shot.v1.png",
        "balanced_accuracy@16-shot.v1.svg",
    ]
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*written, strict=True))
    with Image.open(written[0][0]) as image:
        assert image.width > 600
    assert written[0][1].read_text().startswith("<?xml")


def test_nothing_to_draw_is_said():
    with pytest.raises(UserError, match="draw bars of"):
        bar_chart({"a": {}})
    with pytest.raises(UserError, match="draw a curve of"):
        line_chart({"a": {}}, x_label="x", y_label="y")
    with pytest.raises(UserError, match=r"2 classes has 2 rows of 3 counts.*\(2, 2\)"):
        confusion_chart([[1, 0], [0, 1]], ["a", "b"])


def test_matplotlib_comes_with_the_first_chart_and_pyplot_never():
    code = (
        "import sys, quiltnet.release.charts as charts; assert 'matplotlib' not in sys.modules;"
        "charts.bar_chart({'a': {'b': 1.0}}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
