"""The data options of a run, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quiltnet.cli.check_run import check_run
from tests.data.http_server import serving
from tests.test_train_cli import refused, run


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"outputs/{name}/metrics.jsonl").read_text().splitlines()]


def test_sources_captions_and_augmentation(drawn_shards, work, capsys):
    run(
        "run_name=x",
        f"data.train.sources={{one:{{shards:{drawn_shards}/train,weight:3}},"
        f"two:{{shards:{drawn_shards}/val,weight:1}}}}",
        "data.train.caption_policy={weighted:{caption:0.5,pattern:0.5}}",
        "data.train.sentences=true",
        "data.train.right_angle_rotations=true",
        "data.augment.hed_jitter=0.1",
        "data.augment.color_jitter=[0.2,0.2,0.2,0.02]",
        "data.decode=scaled",
        "data.exif=apply",
        "total_samples=64",
    )
    last = lines_of("x")[-1]
    assert last["data/samples_of_one"] + last["data/samples_of_two"] == 64
    assert last["data/samples_of_one"] > last["data/samples_of_two"] > 0
    assert 0 < last["data/unique_coverage"] <= 1
    assert 0 <= last["data/truncated_captions"] <= 1 and 0 <= last["data/duplicate_images_in_batch"] <= 1
    assert all(looked.is_well for looked in check_run("outputs/x"))


def test_coverage_is_that_of_an_unbroken_run(drawn_shards, work):
    shards = f"data.train.shards={drawn_shards}/train"
    run("run_name=whole", shards, "total_samples=64", "callbacks.checkpoint_every_samples=32")
    checkpoint = next(Path("outputs/whole/checkpoints").glob("*64"))
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    expected = [line for line in lines_of("whole") if "data/unique_coverage" in line][-1]
    run("run_name=whole", shards, "total_samples=64", "callbacks.checkpoint_every_samples=32", "resume=auto")
    assert lines_of("whole")[-1]["data/unique_coverage"] == expected["data/unique_coverage"] == 1.0


def test_a_server_s_shards_are_trained_on_and_gone_on_with(drawn_shards, work, capsys):
    with serving() as server:
        server.files["set/manifest.json"] = (drawn_shards / "manifest.json").read_bytes()
        for tar in (drawn_shards / "train").glob("*.tar"):
            server.files[f"set/train/{tar.name}"] = tar.read_bytes()
        options = [
            f"data.train.shards={server.url('set/train')}", "data.stream.cache=cache", "total_samples=32",
            "callbacks.checkpoint_every_samples=16",
        ]  # fmt: skip
        run("run_name=x", *options)
        assert len(list(Path("cache").glob("*.tar"))) == 5
        run("run_name=x", *options, "resume=auto", "data.train.workers=2")
        told = capsys.readouterr().err
        assert "by 1 loaders (ranks x workers) when the run began and 2 now" in told
        assert "--url" not in told
    assert max(line["samples_seen"] for line in lines_of("x")) == 32


def test_decoding_on_a_device_that_cannot(drawn_shards, work, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run("run_name=x", f"data.train.shards={drawn_shards}/train", "data.decode=cuda")
    assert (
        "data.decode=cuda is not possible: there is no CUDA device; decoding by decode=exact" in capsys.readouterr().err
    )


MISTAKES = {
    "neither": ([], "data.train.shards is not set"),
    "both": (["data.train.shards={train}", "data.train.sources={{a:{{shards:{train}}}}}"], "two ways to say the same"),
    "no shards of a source": (["data.train.sources={{a:{{weight:1}}}}"], "data.train.sources.a="),
    "weights of some": (
        ["data.train.sources={{a:{{shards:{train},weight:1}},b:{{shards:{train}}}}}"], "weigh all or none"
    ),
    "weight": (["data.train.sources={{a:{{shards:{train},weight:-1}},b:{{shards:{train},weight:1}}}}"], "above 0"),
    "pipe": (["data.train.shards='pipe:cat x.tar'"], "allow_pipe"),
    "nothing there": (["data.train.shards=http://127.0.0.1:1/set/train"], "127.0.0.1:1"),
    "decode": (["data.train.shards={train}", "data.decode=fast"], "exact, scaled, pil"),
    "exif": (["data.train.shards={train}", "data.exif=yes"], "ignore, apply"),
    "policy": (["data.train.shards={train}", "data.train.caption_policy={{weighted:{{caption:0}}}}"], "weight"),
    "jitter": (["data.train.shards={train}", "data.augment.color_jitter=[1,2]"], "four numbers"),
    "normalization": (["data.train.shards={train}", "data.augment.stain_normalization=vahadane"], "macenko, reinhard"),
    "switch": (["data.train.shards={train}", "data.allow_pipe=perhaps"], "true or false"),
    "a number for shards": (["data.train.shards=3"], "data.train.shards=3 must be a folder of shards, a tar"),
    "a table for shards": (["data.train.shards={{a:b}}"], "data.train.shards.a is not an option"),
    "a number for a cache": (["data.train.shards={train}", "data.stream.cache=3"], "must be a name or path"),
    "sources without names": (["data.train.sources=[{train}]"], "must be {name: {shards: …}, …}"),
    "a number for shards of a source": (["data.train.sources={{a:{{shards:3}}}}"], "a.shards=3 must be a folder"),
    "a word for a weight": (
        ["data.train.sources={{a:{{shards:{train},weight:three}},b:{{shards:{train},weight:1}}}}"],
        "must be numbers above 0, not {'a': 'three'}"
    ),
    "misspelt": (
        ["data.train.shards={train}", "+data.train.crop_scal=[0.5,1]"],
        "data.train.crop_scal is not an option; the nearest is data.train.crop_scale"
    ),
    "misspelt below": (["data.train.shards={train}", "+data.augment.jitter=1"], "augment.jitter is not an option"),
    "no folder to stream": (["data.train.shards=file:///no/where"], "name the tars themselves"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, drawn_shards, work, capsys, monkeypatch):
    monkeypatch.setattr("quiltnet.data.remote_sources.Patience.__init__.__defaults__", (0, 1.0, 0.0))
    options, message = MISTAKES[mistake]
    told = refused(capsys, "run_name=x", *(option.format(train=f"{drawn_shards}/train") for option in options))
    assert message in told
    assert not Path("outputs").exists()


def test_what_is_lost_is_said(drawn_shards, work, caplog):
    """Hydra's job_logging=disabled would drop every warning below ERROR."""
    first, *rest = sorted((drawn_shards / "train").glob("*.tar"))
    with serving() as server:
        server.files["set/manifest.json"] = (drawn_shards / "manifest.json").read_bytes()
        for tar in rest:
            server.files[f"set/train/{tar.name}"] = tar.read_bytes()
        shards = f"data.train.shards={server.url('set/train')}"
        run("run_name=x", shards, "total_samples=64", "data.max_bad_fraction=1")
    assert f"missing_shard: {server.url(f'set/train/{first.name}')}: 404" in caplog.text
