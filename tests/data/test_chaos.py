"""One set that has everything that is found in shards, through every door: what can be used is, the rest is counted."""

from __future__ import annotations

import gzip
import json
import resource
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from quiltnet.cli.check import check
from quiltnet.cli.prepare import prepare
from quiltnet.cli.shard import shard
from quiltnet.data import remote_sources
from quiltnet.data.batches import Batch
from quiltnet.data.held_out import ShardPairs
from quiltnet.data.manifest import read_manifest
from quiltnet.data.pairs import caption_id, id_to_int64
from quiltnet.data.prepared_images import PreparedForm
from quiltnet.data.prepared_shards import prepare_sample
from quiltnet.data.reading import PairLoader, build_loader
from quiltnet.data.shard_cache import ShardCache
from quiltnet.data.tar_index import open_index
from quiltnet.data.transforms import TrainTransform
from quiltnet.errors import UserError
from quiltnet.model.tokenizer import BatchTokenizer, bpe_tokenizer
from tests.commands import train, train_well
from tests.data.chaos_set import ALL, CUT, PACKED, REASONS, TARS, USABLE, Thrown, broken_among, write_chaos, write_tar
from tests.data.http_server import HASTY, QUICK, Fault, Server, serving

TOO_LONG_S = 60
BATCH = 8

# The words of packing for what the readers call broken; the finer reason is then in rejected.jsonl.
PACKED_REASONS = {
    **dict.fromkeys(("broken_image", "not_an_image", "empty_image", "too_many_pixels"), "unreadable_image"),
    "no_image": "missing_image",
    "no_caption": "null_caption",
}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory) -> Path:
    """The five tars; read only."""
    return write_chaos(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    """A gzip-ed tar."""
    return gzip.compress(write_tar(tmp_path_factory.mktemp("packed") / "x.tar", PACKED).read_bytes())


@pytest.fixture(scope="module")
def tokenize() -> BatchTokenizer:
    return BatchTokenizer(bpe_tokenizer(77), trim=True)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Nothing hangs."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"not done after {TOO_LONG_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TOO_LONG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def open_loader(shards, tokenize, *, decode: str = "exact", batch: int = BATCH, **options) -> PairLoader:
    transform = TrainTransform(24, scale=(0.5, 1.0), decode=decode)
    layout = {"global_batch_size": batch, "seed": 3, "workers": 0, "rank": 0, "world_size": 1}
    return build_loader(shards, transform, tokenize, **{**layout, **options})


def read(loader: PairLoader, count: int) -> list[Batch]:
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def ids_of(samples: list[Thrown]) -> set[int]:
    return {id_to_int64(caption_id(thrown.caption)) for thrown in samples}


def assert_accounted(batches: list[Batch], given: list[Thrown], lost: list[tuple[str, str]]) -> None:
    """An epoch's batches: each of ``given`` is there, each of ``lost`` (key and reason) is counted, and that is all."""
    assert len(ids_of(given)) == len(given)
    assert sum(len(batch.key) for batch in batches) == len(given) + len(lost), "an epoch"
    assert {number for batch in batches for number in batch.caption_id.tolist()} == ids_of(given)
    rejected = Counter(rejection for batch in batches for rejection in batch.rejected)
    assert set(rejected) == set(lost)
    assert rejected >= Counter(lost)  # drawn to stand in for another, a broken sample is met once more


def test_the_set_is_what_it_is_meant_to_be():
    assert len(ALL) % BATCH == 0, "so that an epoch is whole batches"
    assert len(USABLE) + sum(REASONS.values()) == len(ALL)
    assert set(REASONS) == {
        "broken_image", "empty_image", "no_caption", "no_image", "not_an_image", "several_images", "too_many_pixels",
        "truncated_tar", "unreadable_json",
    }  # fmt: skip


def test_local_shards(chaos, tokenize):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    epochs = {}
    for decode, workers in (("exact", 0), ("scaled", 0), ("pil", 0), ("exact", 2), ("scaled", 2), ("pil", 2)):
        loader = open_loader(chaos, tokenize, decode=decode, workers=workers)
        assert loader.samples_per_epoch == len(ALL)
        assert loader.missing == {str(chaos / name): 1 for name in CUT}
        epochs[decode, workers] = read(loader, 2 * len(ALL) // BATCH)
        first = epochs[decode, workers][: len(ALL) // BATCH]
        assert_accounted(first, USABLE, broken_among(ALL))
        cut = {
            key for batch in first for key, is_cut in zip(batch.key, batch.truncated.tolist(), strict=True) if is_cut
        }
        assert cut == {"long", "endless"}
    expected = [(batch.key, batch.rejected) for batch in epochs["exact", 0]]
    for batches in epochs.values():
        assert [(batch.key, batch.rejected) for batch in batches] == expected, "however they are decoded, and by whom"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak  # KiB
    assert grown < 600 * 1024, "20,000 x 20,000 pixels are 1,200 MB"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_local_shard_that_is_deleted_between_two_epochs(chaos, tokenize, tmp_path, workers):
    folder = shutil.copytree(chaos, tmp_path / "set")
    loader = open_loader(folder, tokenize, workers=workers)
    batches = iter(loader)
    epoch = len(ALL) // BATCH
    assert_accounted(list(islice(batches, epoch)), USABLE, broken_among(ALL))
    (folder / "b.tar").unlink()
    list(islice(batches, epoch))  # some of these were read before
    left = [thrown for name, samples in TARS.items() if name != "b.tar" for thrown in samples]
    gone = [(thrown.key, "unreadable_shard") for thrown in TARS["b.tar"]]
    given = [thrown for thrown in left if not thrown.reason]
    assert_accounted(list(islice(batches, epoch)), given, broken_among(left) + gone)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_deleted_with_its_index(make_shards, tokenize, workers):
    train = make_shards(24, samples_per_shard=8)
    loader = open_loader(train, tokenize, workers=workers)
    tar = train / "test-000001.tar"
    tar.unlink()
    tar.with_name(f"{tar.name}.index").unlink()
    batches = read(loader, 3)
    rejected = Counter(rejection for batch in batches for rejection in batch.rejected)
    assert set(rejected) == {(str(tar), "unreadable_shard")} and rejected.total() >= 8
    assert len({key for batch in batches for key in batch.key}) == 16


def test_held_out_shards_that_are_deleted_with_their_index(make_shards):
    train = make_shards(6)
    pairs = ShardPairs(train)
    for path in train.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"test-000000\.tar cannot be read \(unreadable_shard\)"):
        pairs[0]


@pytest.mark.parametrize("name", ["packed.tar", "packed.tar.gz", "packed.tgz"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gzipped_tar_is_refused_where_samples_are_read_at_random(chaos, packed, tokenize, tmp_path, name, named):
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(chaos / "b.tar", folder)
    (folder / name).write_bytes(packed)
    place = folder if named == "folder" else folder / name
    message = rf"{name} is not a tar that can be read .*; shards are uncompressed tars"
    with pytest.raises(UserError, match=message):
        open_loader(place, tokenize)
    with pytest.raises(UserError, match=message):
        run(prepare, place, tmp_path / "prepared")
    report = report_of(tmp_path / "check", place, code=1)
    assert report["findings"]["unreadable_shards"]["count"] == 1
    assert report["sets"] == {place.stem: len(TARS["b.tar"]) if named == "folder" else 0}


@pytest.fixture
def server(chaos, packed, monkeypatch) -> Iterator[Server]:
    """The set and the gzip-ed tar, in several requests a tar."""
    monkeypatch.setattr(remote_sources, "BLOCK_BYTES", 50_000)
    with serving() as state:
        state.files = {f"set/{name}": (chaos / name).read_bytes() for name in TARS} | {"set/packed.tar.gz": packed}
        yield state


def published(server: Server, *, known: bool) -> str | list[str]:
    """The set as it is named; known: numbers of samples are told, and count what was cut off."""
    if not known:
        return [server.url(path) for path in server.files]
    counts = {name: len(samples) + (name in CUT) for name, samples in TARS.items()}
    server.files["set/sizes.json"] = json.dumps({**counts, "packed.tar.gz": len(PACKED)}).encode()
    return server.url("set")


SLOTS = len(ALL) + len(CUT) + len(PACKED)


def cut_off(server: Server) -> list[tuple[str, str]]:
    """What is lost without a name: of each cut tar, one."""
    return [(server.url(f"set/{name}"), "truncated_tar") for name in CUT]


def stream(shards, tokenize, *, batch: int = SLOTS, **options) -> PairLoader:
    told = {"patience": QUICK, "samples_per_epoch": SLOTS, "shuffle_buffer": 20, **options.pop("stream", {})}
    return open_loader(shards, tokenize, batch=batch, stream=told, **options)


@pytest.mark.parametrize("known", [True, False], ids=["counts", "no counts"])
def test_streamed_shards(server, tokenize, tmp_path, known):
    shards = published(server, known=known)
    lost = broken_among(ALL) + cut_off(server)
    expected = read(stream(shards, tokenize), 2)
    for batch in expected:
        assert_accounted([batch], USABLE + PACKED, lost)
    cache = ShardCache(tmp_path / "cache", 10**7)
    for options in ({"decode": "scaled"}, {"decode": "pil"}, {"stream": {"cache": cache}}):
        batches = read(stream(shards, tokenize, **options), 2)
        assert [(batch.key, batch.rejected) for batch in batches] == [(b.key, b.rejected) for b in expected]


def test_streamed_shards_by_two_workers(server, tokenize):
    half = SLOTS // 2
    assert 2 * half == SLOTS
    batches = read(stream(published(server, known=True), tokenize, batch=half, workers=2), 4)
    for epoch in (batches[:2], batches[2:]):
        assert_accounted(epoch, USABLE + PACKED, broken_among(ALL) + cut_off(server))


@pytest.mark.parametrize("known", [True, False], ids=["counts", "no counts"])
def test_a_server_that_stalls_resets_and_answers_503(server, tokenize, known):
    shards = published(server, known=known)
    expected = [(batch.key, batch.rejected) for batch in read(stream(shards, tokenize), 2)]
    server.faults = {
        "set/a.tar": [Fault("stall", at=60_000), Fault("reset", at=90_000), Fault("refuse", at=110_000)],
        "set/b.tar": [Fault("refuse", times=3)],
        "set/c.tar": [Fault("reset", at=700, times=2)],
        "set/packed.tar.gz": [Fault("stall", at=2000)],
    }
    batches = read(stream(shards, tokenize, stream={"patience": HASTY}), 2)
    assert [(batch.key, batch.rejected) for batch in batches] == expected
    assert not any(fault.times for faults in server.faults.values() for fault in faults), "all were met"


@pytest.mark.parametrize("known", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize(("fault", "reason"), [("503", "unreachable_shard"), ("gone", "missing_shard")])
def test_a_remote_shard_that_is_lost_between_two_epochs(server, tokenize, known, fault, reason):
    loader = stream(published(server, known=known), tokenize)
    batches = iter(loader)
    lost = broken_among(ALL) + cut_off(server)
    assert_accounted([next(batches)], USABLE + PACKED, lost)
    if fault == "gone":
        del server.files["set/b.tar"]
    else:
        server.faults["set/b.tar"] = [Fault("refuse", times=10**6)]
    next(batches)  # a part of this was read before
    given = [thrown for thrown in USABLE + PACKED if thrown not in TARS["b.tar"]]
    lost = [rejection for rejection in lost if rejection not in broken_among(TARS["b.tar"])]
    if known:  # each of its samples keeps its place
        assert_accounted([next(batches)], given, lost + [(server.url("set/b.tar"), reason)] * len(TARS["b.tar"]))
    else:  # the shard is one that is lost, and an epoch is shorter now
        later = [next(batches), next(batches)]
        assert {number for batch in later for number in batch.caption_id.tolist()} == ids_of(given)
        rejected = {rejection for batch in later for rejection in batch.rejected}
        assert rejected == {*lost, (server.url("set/b.tar"), reason)}
    loader.close()


app = typer.Typer()
app.command(name="prepare")(prepare)
app.command(name="shard")(shard)


def run(command, *arguments: object) -> str:
    """Output of a command; a UserError is raised (the command line prints it)."""
    result = CliRunner().invoke(app, [command.__name__, *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def report_of(out: Path, folder: Path, *, code: int) -> dict:
    """What ``quiltnet check data`` finds."""
    result = CliRunner().invoke(check, ["data", str(folder), "--out", str(out), "--workers", "1"])
    assert result.exit_code == code, result.output
    return json.loads((out / "report.json").read_text())


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_checked(chaos, tmp_path):
    report = report_of(tmp_path / "check", chaos, code=1)
    found = report["findings"]
    assert report["sets"] == {chaos.name: len(ALL)}
    assert found["broken"]["count"] == sum(REASONS.values()) and found["broken"]["of"] == len(ALL)
    assert found["broken"]["details"] == REASONS
    named = Counter((example["key"], example["reason"]) for example in found["broken"]["examples"])
    assert named == Counter(broken_among(ALL))
    assert {Path(example["shard"]).name for example in found["unreadable_shards"]["examples"]} == set(CUT)
    flags = {
        "repeated_keys": 4, "alpha": 1, "cmyk": 1, "tiny": 2, "giant": 2, "caption_missing": 1, "caption_empty": 3,
        "caption_not_text": 3, "caption_garbled": 1, "caption_wordless": 1, "truncated_captions": 2,
    }  # fmt: skip
    assert {name: found[name]["count"] for name in flags} == flags
    assert [name for name, finding in found.items() if finding["above_limit"]] == ["unreadable_shards", "broken"]


def assert_clean(folder: Path, tokenize: BatchTokenizer, given: list[Thrown], out: Path) -> None:
    """A set that holds ``given``, and nothing that is wrong."""
    found = report_of(out, folder, code=0)["findings"]
    assert found["broken"]["count"] == 0 and found["broken"]["of"] == len(given)
    assert_accounted(read(open_loader(folder, tokenize, batch=len(given)), 1), given, [])


def test_packed_again(chaos, packed, tokenize, tmp_path):
    folder = shutil.copytree(chaos, tmp_path / "set")
    (folder / "packed.tar.gz").write_bytes(packed)
    out = tmp_path / "out"
    run(shard, "--format", "webdataset", "--images", folder, "--out", out, "--samples-per-shard", 20)
    totals = read_manifest(out)["totals"]
    given = USABLE + PACKED
    assert totals["rows"] == len(ALL) + len(PACKED)
    assert totals["samples"] == totals["captions"] == totals["images"] == len(given)
    expected = Counter()
    for reason, count in REASONS.items():
        expected[PACKED_REASONS.get(reason, reason)] += count
    assert totals["rejected"] == expected
    assert totals["findings"] == {"duplicate_keys": 3, "truncated_tars": len(CUT), "unsafe_names": 3}
    rejected = Counter((row["image_path"], row["detail"] or row["reason"]) for row in rows_of(out / "rejected.jsonl"))
    assert rejected == Counter(
        (f"{name[0]}/{thrown.key}.{'png' if thrown.key == 'giant-png' else 'jpg'}", detail_of(thrown.reason))
        for name, samples in TARS.items()
        for thrown in samples
        if thrown.reason
    )
    assert {path.name for path in tmp_path.iterdir()} == {"set", "out"}
    assert_clean(out, tokenize, given, tmp_path / "check")


def detail_of(reason: str) -> str:
    """The most exact that rejected.jsonl has."""
    packed_reason = PACKED_REASONS.get(reason, reason)
    return reason if packed_reason == "unreadable_image" else packed_reason


@pytest.mark.parametrize("form", [["--size", 64], ["--size", 64, "--raw"]], ids=["jpeg", "raw"])
def test_prepared(chaos, tokenize, tmp_path, form):
    out = tmp_path / "out"
    run(prepare, chaos, out, "--workers", 1, *form)
    totals = read_manifest(out)["totals"]
    assert totals["samples"] == totals["captions"] == len(USABLE)
    assert totals["rejected"] == REASONS + Counter(missing_from_tar=len(CUT))
    assert totals["rows"] == len(ALL) + len(CUT)
    rejected = Counter((row["key"], row["reason"]) for row in rows_of(out / "rejected.jsonl"))
    assert rejected == Counter([*broken_among(ALL), *[("", "missing_from_tar")] * len(CUT)])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert_clean(out, tokenize, USABLE, tmp_path / "check")
    for tar in out.rglob("*.tar"):
        with tarfile.open(tar) as members:
            assert not [m.name for m in members if m.name.startswith("/") or ".." in m.name.split("/")]


def test_a_tar_that_goes_while_it_is_prepared_stops_it(chaos, tmp_path):
    tar = Path(shutil.copy(chaos / "b.tar", tmp_path))
    index = open_index(tar)
    tar.unlink()
    with pytest.raises(UserError, match=r"b\.tar can no longer be read .*; bring it back, and the same command"):
        prepare_sample(index, 0, PreparedForm())


RUN = ["model=tiny", "run_name=chaos", "epochs=1", f"global_batch_size={BATCH}"]


@pytest.mark.slow
def test_trained_on(chaos, tmp_path):
    train_well(tmp_path, *RUN, f"data.train.shards={chaos}", "data.max_bad_fraction=1")
    lines = rows_of(tmp_path / "outputs" / "chaos" / "metrics.jsonl")
    rows = rows_of(tmp_path / "outputs" / "chaos" / "quarantine.jsonl")
    assert max(line["samples_seen"] for line in lines) == len(ALL)
    assert [line["data/missing_samples"] for line in lines if "data/missing_samples" in line] == [len(CUT)]
    counts = [line for line in lines if "data/bad_samples" in line][-1]
    by_reason = Counter(row["reason"] for row in rows if row["reason"] != "missing_from_tar")
    assert by_reason == {reason: counts[f"data/bad_samples_{reason}"] for reason in REASONS}
    assert counts["data/bad_samples"] == by_reason.total()
    assert by_reason >= REASONS
    missing = {(str(chaos / name), "missing_from_tar") for name in CUT}
    assert {(row["key"], row["reason"]) for row in rows} == {*broken_among(ALL), *missing}
    shares = [line["data/unique_coverage"] for line in lines if "data/unique_coverage" in line]
    assert shares[-1] == pytest.approx(len(USABLE) / len(ALL))


@pytest.mark.slow
def test_too_much_is_broken_to_train_on(chaos, tmp_path):
    done = train(tmp_path, *RUN, f"data.train.shards={chaos}")
    assert done.returncode == 2
    assert "samples were broken" in done.stderr and "more than max_bad_fraction=0.01" in done.stderr
    assert "Traceback" not in done.stderr
    rows = rows_of(tmp_path / "outputs" / "chaos" / "quarantine.jsonl")
    told = {(row["key"], row["reason"]) for row in rows}
    assert told <= {*broken_among(ALL), *((str(chaos / name), "missing_from_tar") for name in CUT)}
    assert sum(row["reason"] != "missing_from_tar" for row in rows) > 10
