"""Pictures of a sweep, by what is drawn in them."""

from __future__ import annotations

import re

import pytest
from matplotlib.colors import same_color

from quiltnet.release.charts import PURPLE
from quiltnet.release.sweep_plots import Scale, TrialLine, importance_chart, parallel_chart, write_pages


def test_scales_place_values_between_their_ends():
    rate = Scale(1e-6, 1e-2, log=True)
    assert [rate.height(value) for value in (1e-6, 1e-4, 1e-2)] == pytest.approx([0, 0.5, 1])
    assert [text for _, text in rate.ticks()] == ["1e-06", "1e-05", "0.0001", "0.001", "0.01"]
    assert Scale(0, 8).height(2) == 0.25
    loss = Scale(choices=("infonce", "siglip"))
    assert loss.ticks() == [(0.25, "infonce"), (0.75, "siglip")]
    assert Scale(3.0, 3.0).ticks() == [(0.5, "3")], "all trials ended alike"


@pytest.mark.parametrize(("lower_is_better", "best"), [(True, 0), (False, 2)])
def test_best_trial_is_purple_and_pruned_ones_are_dashed(lower_is_better, best):
    outcomes, done = [1.0, 2.0, 3.0, 0.5, 9.0], [True, True, True, False, False]
    trials = [TrialLine({"lr": 0.1 * (1 + n)}, outcomes[n], done[n]) for n in range(5)]
    figure = parallel_chart(trials, {"lr": Scale(0.1, 0.5)}, outcome="loss", lower_is_better=lower_is_better)
    lines = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    purple = [line for line in lines if same_color(line.get_color(), PURPLE)]
    assert [line.get_ydata()[0] for line in purple] == [pytest.approx(Scale(0.1, 0.5).height(0.1 * (1 + best)))]
    assert sorted(line.get_ydata()[1] for line in lines if line.get_linestyle() == "--") == [0.0, 1.0]


def test_importances_are_bars_the_greatest_on_top():
    (axis,) = importance_chart({"lr": 0.7, "decay": 0.0, "loss": 0.3}).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["decay", "loss", "lr"]
    assert [bar.get_width() for bar in axis.patches] == [0.0, 0.3, 0.7]


def test_pages_need_no_network(tmp_path):
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("plotly")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for value in (1.0, 1.0):
        trial = study.ask()
        trial.suggest_float("optim.lr", 1e-6, 1e-3, log=True)
        trial.suggest_categorical("loss", ["infonce", "siglip"])
        study.tell(trial, value)
    for page in write_pages(study, tmp_path):
        text = page.read_text(encoding="utf-8")
        assert "optim.lr" in text and not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", text)
