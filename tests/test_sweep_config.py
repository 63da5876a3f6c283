"""The command line of ``quiltnet sweep``: from options to a plan, and each mistake before a trial starts."""

from __future__ import annotations

import shlex
import sys

import pytest

pytest.importorskip("optuna")
pytest.importorskip("plotly")

from hydra import compose, initialize_config_module

from quiltnet.cli.door import at_the_door
from quiltnet.cli.search import sweep
from quiltnet.cli.search_config import plan_search, share_gpus
from quiltnet.cli.search_plan import SearchPlan, trial_command
from quiltnet.errors import UserError

TRAINED = ["model=tiny", "data.train.shards=train", "evaluator=[val_pairs]", "data.val.shards=val"]
BASE = ["sweep=optuna", "run_name=rates", *TRAINED]


def test_plan_is_what_was_said():
    plan = plan_search(
        [*BASE, "n_trials=7", "parallel=2", "search.optim.lr.high=1e-2", "+search.loss={choices:[infonce,siglip]}",
         "~search.optim.weight_decay", "callbacks.evaluate_every_samples=64", "total_samples=100",
         "global_batch_size=16", "logger=[wandb]"]
    )  # fmt: skip
    assert (plan.n_trials, plan.parallel, plan.direction, plan.monitor) == (7, 2, "minimize", "val_pairs/loss")
    assert list(plan.space) == ["optim.lr", "loss"] and plan.space["optim.lr"].high == 1e-2
    assert (plan.first_samples, plan.total_samples, plan.log_to_wandb) == (64, 112, True)
    assert plan.options[:4] == tuple(TRAINED) and not any("search" in option for option in plan.options)
    assert plan.prunes
    assert plan_search([*BASE, "monitor=val_pairs@ema/image_to_text_recall@1"]).direction == "maximize"


def test_a_trial_is_an_ordinary_run_and_so_is_the_best_again():
    plan = plan_search([*BASE, "logger=[wandb]", "nproc_per_trial=2"])
    values = {"optim.lr": 3e-5, "loss": "siglip"}
    command = trial_command(plan, 3, values)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"] and "--nproc-per-node" in command
    again = shlex.split(plan.command_line(values))
    assert again[: again.index("train") + 1] == shlex.split("torchrun --nproc-per-node 2 -m quiltnet.cli.app train")
    with initialize_config_module("quiltnet.conf", version_base="1.3"):
        trial = compose("train", command[command.index("train") + 1 :])
        best = compose("train", again[again.index("train") + 1 :])
    for cfg in (trial, best):
        assert (cfg.optim.lr, cfg.loss._target_) == (3e-5, "quiltnet.training.siglip.SigLIP")
    assert (trial.run_name, trial.output_dir, trial.resume) == ("trial-003", "outputs/rates", "auto")
    assert trial.logger.wandb.name == "rates/trial-003"
    assert (best.run_name, best.output_dir, best.resume, best.logger.wandb.name) == (
        "rates-best",
        "outputs",
        None,
        None,
    )


MISTAKES = {
    "no search": (["sweep=lr"], "say sweep=optuna"),
    "end that is no number": (["+search.model.init_logit_scale={low: 1, high: inf}"], "two numbers, low below high"),
    "folder": (["output_dir=null"], "output_dir=None must be a name or path"),
    "no name": (["run_name=???"], "run_name is not set"),
    "name is a path": (["run_name=a/b"], "is a folder's name"),
    "unknown key": (["+search.optim.learn={low: 1, high: 2}"], "a run has no option optim.learn; the nearest"),
    "unknown group": (["+search.los={choices: [infonce, siglip]}"], "no option los; the nearest are loss"),
    "unknown choice": (["+search.loss={choices: [infonce, siglp]}"], "there is no loss=siglp; the nearest: siglip"),
    "bad end of a range": (["+search.global_batch_size={low: 0, high: 64}"], "global_batch_size=0 must be"),
    "bad choice": (["+search.data.decode={choices: [thread, fast]}"], "data.decode=thread must be one of"),
    "misspelt field": (["search.optim.lr.hihg=1"], "search.optim.lr.hihg"),
    "given twice": (["optim.lr=1e-4"], "optim.lr is both given and searched"),
    "several values": (["global_batch_size=8,16"], "+search.<option>={choices: [a, b]}"),
    "the run's name": (["+search.run_name={choices: [a, b]}"], "search.run_name"),
    "no number to go by": (["evaluator=[]"], "needs a number to go by"),
    "monitor": (["monitor=zeroshot_x/accuracy"], "one of the run's evaluators (val_pairs)"),
    "monitor of an average": (["monitor=zeroshot_x@ema/accuracy"], "one of the run's evaluators (val_pairs)"),
    "monitor without metric": (["monitor=val_pairs"], "must be evaluator/metric"),
    "n_trials": (["n_trials=0"], "n_trials=0 must be a whole number of at least 1"),
    "parallel": (["parallel=two"], "parallel=two must be"),
    "sampler": (["sampler=gp"], "sampler=gp must be one of tpe, random"),
    "pruner": (["pruner=median"], "hyperband, none"),
    "direction": (["direction=up"], "minimize, maximize"),
    "storage": (["storage=sweep.db"], "must be a URL"),
    "storage in memory": (["storage=sqlite:///:memory:"], "must be a URL"),
    "resume": (["resume=auto"], "the same command goes on"),
    "option of a trial": (["max_grad_norm=0"], "max_grad_norm=0 must be a number above 0"),
    "flag": (["-m"], "not -m"),
    "misspelt option": (["n_trial=3"], "n_trial"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_exit_2_and_nothing_written(mistake, work, capsys):
    options, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as exit_:
        at_the_door(sweep)([*BASE, *options])
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told
    assert not list(work.iterdir())


def test_a_forgotten_sweep_file_is_asked_for(work):
    """Hydra knows n_trials from that file alone, and would advise to add it with a plus."""
    with pytest.raises(UserError, match="say sweep=optuna"):
        plan_search(["run_name=rates", *TRAINED, "n_trials=20"])


def test_file_of_a_sweep_holds_the_search_alone(tmp_path):
    (tmp_path / "sweep").mkdir()
    text = "# @package _global_\ndefaults: [optuna]\nepochs: 3\n"
    (tmp_path / "sweep/mine.yaml").write_text(text)
    options = [f"hydra.searchpath=[file://{tmp_path}]", "sweep=mine", "run_name=rates", *TRAINED]
    with pytest.raises(UserError, match="the sweep's file sets epochs"):
        plan_search(options)
    (tmp_path / "sweep/mine.yaml").write_text(text.replace("epochs", "n_trials"))
    assert plan_search(options).n_trials == 3


def test_under_torchrun_a_sweep_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="nproc_per_trial=8"):
        plan_search(BASE)


def test_gpus_that_are_shared_out(monkeypatch, tmp_path):
    plan = SearchPlan("s", tmp_path, {}, "a/b", parallel=2, nproc_per_trial=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert share_gpus(plan) == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert share_gpus(plan) == ["7", "5", "3", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(UserError, match="need 4 GPUs; there are 3"):
        share_gpus(plan)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert share_gpus(plan) == []


def test_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "quiltnet\[sweep\]"'):
        sweep(BASE)
