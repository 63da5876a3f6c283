from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quiltnet.data import preparing
from quiltnet.data.manifest import read_manifest, sha256_of, write_manifest
from quiltnet.data.prepared_images import PreparedForm
from quiltnet.data.preparing import plan_preparing, prepare_shards
from quiltnet.data.shard_files import ShardFile, resolve_shards
from quiltnet.data.stored_pairs import StoredPairs
from quiltnet.errors import UserError
from tests.conftest import ROOT
from tests.data.made_sets import encoded, pair, read_tar, tissue, write_set, write_tar


def large(seed: int) -> bytes:
    return encoded(tissue(seed, 150 + seed, 120), quality=92)


def sample(seed: int) -> dict[str, bytes | str]:
    ids = {"image_id": f"{seed + 1:016x}", "source_id": f"slide{seed // 2}"}
    return pair(f"tile{seed}", large(seed), f"One of {seed}.", f"Two of {seed}.", **ids)


@pytest.fixture
def source(tmp_path) -> Path:
    tars = [{**sample(0), **sample(1)}, {**sample(2), **sample(3), **sample(4)}]
    return write_set(tmp_path / "source", {"train": tars, "val": [sample(5)]})


def prepared(source: Path, out: Path, workers: int = 1, **form: object) -> Path:
    prepare_shards(plan_preparing(source, out, PreparedForm(**{"size": 64, **form})), workers=workers)
    return out


def decoded(data: bytes) -> np.ndarray:
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data), allow_pickle=False)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by name; of sidecar indices, which may differ in the order of their facts, the name alone."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): b"" if p.suffix == ".index" else p.read_bytes() for p in files}


@pytest.mark.parametrize("quality", [95, None])
def test_all_but_the_pixels_is_carried_over(source, tmp_path, quality):
    out = prepared(source, tmp_path / "out", quality=quality)
    before, after = read_manifest(source), read_manifest(out)
    assert [(name, e["samples"], e["captions"]) for name, e in after["splits"].items()] == [
        ("train", 5, 10), ("val", 1, 2)
    ]  # fmt: skip
    for split in before["splits"]:
        names = [[shard["path"] for shard in m["splits"][split]["shards"]] for m in (before, after)]
        assert names[0] == names[1]
        pairs = [StoredPairs(resolve_shards(folder / split)) for folder in (source, out)]
        assert len(pairs[0]) == len(pairs[1])
        for one, other in zip(*pairs, strict=True):
            assert (one.key, one.captions, one.image_id, one.record) == (
                other.key, other.captions, other.image_id, other.record
            )  # fmt: skip
            assert decoded(other.image).shape == (64, round(decoded(one.image).shape[1] * 64 / 120), 3)
    assert after["source"] == {"made": True} and after["seed"] == 3 and after["samples_per_shard"] == 9
    assert after["totals"]["rows"] == after["totals"]["captions"] == 12
    assert (after["totals"]["images"], after["totals"]["sources"]) == (6, 3)
    assert after["totals"]["in_several_splits"] == {"images": 0, "sources": 1}  # slide2 holds tiles 4 and 5
    facts = after["prepared"]
    assert facts["from"] == sha256_of(source / "manifest.json") and facts["totals_before"]["samples"] == 6
    assert (facts["size"], facts["format"], facts["quality"]) == (64, "raw" if quality is None else "jpeg", quality)
    assert facts["copied"] == 0 and facts["error"]["samples"] == 6


def test_entries_and_sidecars_are_of_the_new_files(source, tmp_path):
    out = prepared(source, tmp_path / "out")
    for split in read_manifest(out)["splits"].values():
        for entry in split["shards"]:
            path = out / entry["path"]
            assert (entry["bytes"], entry["sha256"]) == (path.stat().st_size, sha256_of(path))
            assert path.with_name(f"{path.name}.index").is_file()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "rejected.jsonl", "train", "val"]
    assert not (tmp_path / "out.partial").exists() and (out / "rejected.jsonl").read_text() == ""


def test_pixels_are_those_of_pillow_to_a_level(source, tmp_path):
    out = prepared(source, tmp_path / "out", quality=None)
    before, after = (read_tar(folder / "val" / "made-000000.tar") for folder in (source, out))
    with Image.open(io.BytesIO(before["tile5.jpg"])) as image:
        expected = np.asarray(image.resize((83, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(expected - decoded(after["tile5.npy"]).astype(int)).max() <= 1


def view_by_pillow(data: bytes) -> np.ndarray:
    """open_clip's evaluation: the shorter side to 224, bicubic, and the central square."""
    image = Image.fromarray(decoded(data))
    scale = 224 / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + 224, top + 224))).astype(int)


def test_the_error_is_that_of_the_view(source, tmp_path):
    out = prepared(source, tmp_path / "out", quality=60)
    differences = []
    for split in ("train", "val"):
        for one, other in zip(*(StoredPairs(resolve_shards(f / split)) for f in (source, out)), strict=True):
            differences.append(np.abs(view_by_pillow(one.image) - view_by_pillow(other.image)))
    values = np.concatenate([difference.ravel() for difference in differences])
    error = read_manifest(out)["prepared"]["error"]
    assert error["mean_abs"] == pytest.approx(values.mean(), abs=0.02) and error["samples"] == 6
    assert error["psnr_db"] == pytest.approx(10 * np.log10(255**2 / (values**2).mean()), abs=0.1)
    assert abs(error["p99"] - np.quantile(values, 0.99)) <= 1 and abs(error["max"] - values.max()) <= 2
    better = read_manifest(prepared(source, tmp_path / "better", quality=100))["prepared"]["error"]
    assert better["psnr_db"] > error["psnr_db"] + 3


def test_broken_samples_are_dropped_counted_and_listed(tmp_path):
    members = {**sample(0), **sample(1), **sample(2)}
    members["tile1.jpg"] = members["tile1.jpg"][:-70]
    members |= {"none.json": '{"captions": ["x"]}', "blank.jpg": large(3), "blank.json": '{"captions": []}'}
    source = write_set(tmp_path / "source", {"train": [members, {"bad.jpg": b"x", "bad.json": '{"captions": ["y"]}'}]})
    out = prepared(source, tmp_path / "out")
    manifest = read_manifest(out)
    assert manifest["totals"]["rejected"] == {"broken_image": 2, "no_caption": 1, "no_image": 1, "not_an_image": 1}
    assert (manifest["totals"]["rows"], manifest["totals"]["captions"], manifest["totals"]["images"]) == (9, 4, 2)
    assert len(manifest["splits"]["train"]["shards"]) == 1  # of the second tar nothing is left
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"], line["rows"]) for line in lines} == {
        ("tile1", "broken_image", 2), ("none", "no_image", 1), ("blank", "no_caption", 1), ("bad", "not_an_image", 1)
    }  # fmt: skip
    assert {line["shard"] for line in lines} == {"train/made-000000.tar", "train/made-000001.tar"}


def test_a_source_that_lacks_samples_says_so(source, tmp_path):
    path = source / "train" / "made-000001.tar"
    os.truncate(path, 512 + 1024)
    out = prepared(source, tmp_path / "out")
    assert read_manifest(out)["totals"]["rejected"] == {"missing_from_tar": 2, "truncated_tar": 1}


def test_foreign_tars_keep_their_ids(tmp_path):
    """Ids of foreign samples come from folder, tar and key, of which the folder changes."""
    members = [
        ("a.cls", "3"), ("a.jpg", large(0)), ("a.txt", "From txt."),
        ("deep/b.seg.png", "mask"), ("deep/b.png", encoded(tissue(1), "PNG")), ("deep/b.json", '{"caption": "x"}'),
        ("c.jpg", large(2)), ("c.json", '{"caption": "y", "image_id": 17, "url": "z"}'),
        ("../../up.jpg", large(3)), ("../../up.txt", "up"), ("/root/abs.jpg", large(4)), ("/root/abs.txt", "abs"),
    ]  # fmt: skip
    source = write_tar(tmp_path / "foreign" / "00.tar", members).parent
    out = prepared(source, tmp_path / "out")
    pairs = [StoredPairs([ShardFile(path)]) for path in (source / "00.tar", out / "foreign" / "00.tar")]
    ids, captions = ([[getattr(p, name) for p in of] for of in pairs] for name in ("image_id", "captions"))
    assert ids[0] == ids[1] and len(set(ids[0])) == 5 and captions[0] == captions[1]
    content = read_tar(out / "foreign" / "00.tar")
    assert (content["a.cls"], content["deep/b.seg.png"]) == (b"3", b"mask") and "deep/b.jpg" in content
    assert not any(name.startswith("/") or ".." in name for name in content)
    assert pairs[1][2].record == {"caption": "y", "image_id": ids[0][2], "original_image_id": 17, "url": "z"}
    manifest = read_manifest(out)
    assert manifest["source"] == {"shards": "foreign"} and manifest["prepared"]["totals_before"] is None
    assert len(manifest["prepared"]["from"]) == 64


def test_one_split(source, tmp_path):
    manifest = read_manifest(prepared(source / "val", tmp_path / "out"))
    assert list(manifest["splits"]) == ["val"] and manifest["totals"]["samples"] == 1
    assert resolve_shards(tmp_path / "out")[0].samples == 1


@pytest.mark.slow
def test_workers_write_the_same_bytes(source, tmp_path):
    one, two = prepared(source, tmp_path / "one"), prepared(source, tmp_path / "two", workers=2)
    assert files_of(one) == files_of(two)


def test_a_run_that_stopped_goes_on(source, tmp_path, monkeypatch):
    whole = files_of(prepared(source, tmp_path / "whole"))
    done: list[str] = []
    prepare = preparing.prepare_shard

    def stop_at_the_third(task, form):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.target.name)
        return prepare(task, form)

    monkeypatch.setattr(preparing, "prepare_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepared(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"neither tars nor a manifest|no shards"):
        resolve_shards(tmp_path / "out.partial")
    done.clear()
    plan = plan_preparing(source, tmp_path / "out", PreparedForm(64))
    assert plan.finished == 2
    prepare_shards(plan)
    assert len(done) == 1 and files_of(tmp_path / "out") == whole and not (tmp_path / "out.partial").exists()


def test_another_request_starts_over(source, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(source, tmp_path / "out")
    assert plan_preparing(source, tmp_path / "out", PreparedForm(64)).finished == 3
    (tmp_path / "out.partial" / "train" / "made-000000.tar").unlink()
    assert plan_preparing(source, tmp_path / "out", PreparedForm(64)).finished == 2
    monkeypatch.undo()
    plan = plan_preparing(source, tmp_path / "out", PreparedForm(48))
    assert plan.finished == 0
    said: list[str] = []
    assert prepare_shards(plan, say=said.append)["prepared"]["size"] == 48
    assert len(said) == 1 and "starting over" in said[0]


KILLED = """
import sys
from quiltnet.data.prepared_images import PreparedForm
from quiltnet.data.preparing import plan_preparing, prepare_shards
prepare_shards(plan_preparing(sys.argv[1], sys.argv[2], PreparedForm(64)), progress=lambda *s: print(s, flush=True))
"""


def test_killed_nothing_looks_finished_and_the_same_command_continues(tmp_path):
    tars = [{k: v for n in range(12) for k, v in sample(t * 12 + n).items()} for t in range(6)]
    source = write_set(tmp_path / "source", {"train": tars})
    whole = files_of(prepared(source, tmp_path / "whole"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline().startswith("(1, 6")  # a tar is finished, another one begun
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "manifest.json").exists()
    plan = plan_preparing(source, tmp_path / "out", PreparedForm(64))
    assert 1 <= plan.finished <= 6
    prepare_shards(plan)
    assert files_of(tmp_path / "out") == whole


def test_the_estimate_comes_close(tmp_path):
    tars = [{k: v for n in range(8) for k, v in sample(t * 8 + n).items()} for t in range(3)]
    source = write_set(tmp_path / "source", {"train": tars})
    for quality in (95, None):
        plan = plan_preparing(source, tmp_path / f"out{quality}", PreparedForm(64, quality))
        prepare_shards(plan)
        written = sum(path.stat().st_size for path in plan.out.rglob("*.tar"))
        assert plan.estimated_bytes == pytest.approx(written, rel=0.2)


def test_bad_places(source, tmp_path, monkeypatch):
    form = PreparedForm(64)
    for out in (source, source / "train", source / "new", tmp_path):
        with pytest.raises(UserError, match=r"is, holds or lies in the source"):
            plan_preparing(source, out, form)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(UserError, match="exists already; give another folder"):
        plan_preparing(source, tmp_path / "used", form)
    with pytest.raises(UserError, match="there is no such folder"):
        plan_preparing(tmp_path / "nowhere", tmp_path / "out", form)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs about 0.00 GB and 0.00 GB are free; make room"):
        plan_preparing(source, tmp_path / "out", form)
    monkeypatch.undo()
    (source / "train" / "made-000000.tar").unlink()
    with pytest.raises(UserError, match="is missing, and the manifest lists it"):
        plan_preparing(source, tmp_path / "out", form)
    assert not (tmp_path / "out.partial").exists()


def test_nothing_left(tmp_path):
    source = write_set(tmp_path / "source", {"train": [{"bad.jpg": b"x", "bad.json": '{"captions": ["y"]}'}]})
    with pytest.raises(UserError, match=r"not one sample of .* can be used \({'not_an_image': 1}\)"):
        prepared(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_tar(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(UserError, match="is not a tar that can be read"):
        plan_preparing(tmp_path / "source", tmp_path / "out", PreparedForm(64))


def test_folders_may_have_any_name_but_that_of_the_work(tmp_path):
    source = write_tar(tmp_path / "work" / "00.tar", sample(0)).parent
    out = prepared(source, tmp_path / "out")
    assert resolve_shards(out / "work")[0].samples == 1 and len(read_tar(out / "work" / "00.tar")) == 2
    source.rename(tmp_path / ".work")
    with pytest.raises(UserError, match=r"a split cannot be called \.work, as the folder .* is; rename it"):
        plan_preparing(tmp_path / ".work", tmp_path / "other", PreparedForm(64))


@pytest.mark.parametrize("split", ["../../outside", "..", ".", "", "a/b"])
def test_no_split_leads_out_of_the_set(source, tmp_path, split):
    manifest = read_manifest(source)
    manifest["splits"][split] = manifest["splits"].pop("val")
    write_manifest(source, manifest)
    with pytest.raises(UserError, match="which names no folder; pack the pairs again"):
        plan_preparing(source, tmp_path / "deep" / "er" / "out", PreparedForm(64))


def test_a_manifest_that_lists_no_shard(source, tmp_path):
    manifest = read_manifest(source)
    manifest["splits"] = {"train": {"samples": 0, "captions": 0, "shards": []}}
    write_manifest(source, manifest)
    with pytest.raises(UserError, match="has no shards: its manifest lists none"):
        plan_preparing(source, tmp_path / "out", PreparedForm(64))


def test_tars_in_a_folder_and_in_one_of_the_same_name_in_it(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", sample(0))
    (tmp_path / "train" / "train").mkdir()
    assert plan_preparing(tmp_path / "train", tmp_path / "out", PreparedForm(64)).tasks[0].split == "train"
    write_tar(tmp_path / "train" / "train" / "1.tar", sample(1))
    with pytest.raises(UserError, match="two splits of one name; rename one of them"):
        plan_preparing(tmp_path / "train", tmp_path / "out", PreparedForm(64))


def test_what_a_killed_run_has_begun_goes(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(preparing, "_manifest", lambda *_: 1 / 0)
        prepared(source, tmp_path / "out")
    for name in (".made-000000.tar.unfinished", ".made-000000.tar.index.x1y2"):
        (tmp_path / "out.partial" / "train" / name).write_bytes(b"half")
    assert files_of(prepared(source, tmp_path / "out")) == files_of(prepared(source, tmp_path / "whole"))


def test_the_layout_is_carried_over(source, tmp_path):
    write_manifest(source, {**read_manifest(source), "layout": "rows"})
    assert read_manifest(prepared(source, tmp_path / "out"))["layout"] == "rows"
