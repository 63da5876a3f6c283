from __future__ import annotations

import gc
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from quiltnet.cli.door import leave_if_user_error
from quiltnet.data import reading
from quiltnet.data.batches import Batch
from quiltnet.data.captions import CaptionChoice
from quiltnet.data.pairs import caption_id, id_to_int64, image_id
from quiltnet.data.permutation import permuted
from quiltnet.data.reading import Source, build_loader
from quiltnet.data.transforms import TrainTransform
from quiltnet.data.watchdog import Watchdog
from quiltnet.errors import UserError
from tests.data.conftest import draw_image, encode

TRANSFORM = TrainTransform(24, scale=(0.5, 1.0), horizontal_flip=True)


def tokenize(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 32): the letters; and whether there were more of them."""
    letters = torch.tensor([list(caption.encode()[:32].ljust(32)) for caption in captions])
    return letters, torch.tensor([len(caption) > 32 for caption in captions])


class Noise:
    """An augmentation on the device that wants two numbers a sample."""

    draws = 2

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.random(2, np.float32)


def batches(shards, count: int, **options) -> list[Batch]:
    defaults = {"global_batch_size": 6, "seed": 5, "workers": 0, "rank": 0, "world_size": 1, "augment": Noise()}
    loader = build_loader(shards, TRANSFORM, tokenize, **{**defaults, **options})
    stream = iter(loader)
    try:
        return list(islice(stream, count))
    finally:
        loader.close()


def joined(parts: list[Batch]) -> tuple:
    """Everything that is in the parts of a global batch, in order."""
    names = ("image", "text", "image_id", "caption_id", "number", "truncated", "draws")
    tensors = [torch.cat([getattr(p, name) for p in parts]) for name in names]
    lists = [[item for p in parts for item in getattr(p, name)] for name in ("key", "rejected")]
    return *(tensor.numpy().tobytes() for tensor in tensors), *lists


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_exactly_once_and_the_same_for_every_layout(make_shards, world_size, workers, shards):
    """One epoch of uneven shards: every sample once; every global batch as one process without workers has it."""
    train = make_shards(36, samples_per_shard={1: 36, 2: 20, 7: 6}[shards])
    uneven = sorted(train.glob("*.tar"))
    assert len(uneven) == {1: 1, 2: 2, 7: 6}[shards]
    if shards == 7:
        write_tar(train / "test-000006.tar", {"extra": encode(draw_image(99))})
        train = sorted(train.glob("*.tar"))
    total = 36 + (shards == 7)
    expected = [joined([batch]) for batch in batches(train, 8)]  # more than an epoch
    ranks = [batches(train, 8, rank=r, world_size=world_size, workers=workers) for r in range(world_size)]
    assert [joined(list(parts)) for parts in zip(*ranks, strict=True)] == expected
    keys = [key for parts in zip(*ranks, strict=True) for part in parts for key in part.key]
    assert len(set(keys[:total])) == total and len(keys) == 48
    numbers = [n for parts in zip(*ranks, strict=True) for part in parts for n in part.number.tolist()]
    assert sorted(numbers[:total]) == list(range(total))


def test_what_a_batch_holds(make_shards):
    batch = batches(make_shards(20), 1)[0]
    assert batch.image.shape == (6, 3, 24, 24) and batch.image.dtype == torch.uint8
    assert batch.text.shape == (6, 32) and batch.text.dtype == torch.int64
    assert batch.image_id.dtype == batch.caption_id.dtype == torch.int64
    for row, key in enumerate(batch.key):
        caption = bytes(batch.text[row].tolist()).decode().strip()
        number = int(caption.split()[-1])
        assert key.startswith(f"tile{number:03d}_")
        assert batch.image_id[row].item() == id_to_int64(image_id(f"tile{number:03d}.jpg"))
        assert batch.caption_id[row].item() == id_to_int64(caption_id(caption))
    assert batch.rejected == []
    assert batch.number.tolist() == permuted(np.arange(6), 20, 0, 5, 0, 0).tolist()
    assert batch.truncated.dtype == torch.bool and not batch.truncated.any()
    assert batch.draws.shape == (6, 2) and len(set(batch.draws.ravel().tolist())) == 12


def test_every_sample_once_an_epoch_and_epochs_differ(make_shards):
    keys = [key for batch in batches(make_shards(20), 10) for key in batch.key]
    epochs = [keys[start : start + 20] for start in (0, 20, 40)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_may_be_larger_than_an_epoch(make_shards):
    batch = batches(make_shards(4), 1, global_batch_size=10)[0]
    assert sorted(Counter(batch.key).values()) == [2, 2, 3, 3]


def test_the_order_is_that_of_the_definition(make_shards):
    """Independent of the reader: keys of the shards, permuted."""
    train = make_shards(20)
    keys = []
    for path in sorted(train.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]
    order = [keys[i] for epoch in (0, 1) for i in permuted(np.arange(20), 20, 0, 5, epoch, 0)]
    assert [key for batch in batches(train, 6) for key in batch.key] == order[:36]


def test_seeds_differ(make_shards):
    train = make_shards(20)
    assert joined(batches(train, 1)) == joined(batches(train, 1))
    assert joined(batches(train, 1)) != joined(batches(train, 1, seed=6))


def test_captions_and_crops_change_between_epochs(make_shards):
    seen: dict[str, set] = {}
    for batch in batches(make_shards(5), 20, global_batch_size=5):
        for key, image, text in zip(batch.key, batch.image, batch.text, strict=True):
            seen.setdefault(key, set()).add((image.numpy().tobytes(), text.numpy().tobytes()))
    assert len(seen) == 5
    assert all(len({image for image, _ in of_key}) > 15 for of_key in seen.values())  # two crops may agree
    assert all(len({text for _, text in of_key}) == 2 for of_key in seen.values())


@pytest.mark.parametrize(("policy", "start"), [("first", "first of"), ("joined", "first of 1")])
def test_caption_policies(make_shards, policy, start):
    for batch in batches(make_shards(5), 3, choose_caption=CaptionChoice(policy)):
        for text in batch.text:
            caption = bytes(text.tolist()).decode().strip()
            assert caption.startswith("first of ")
            assert ("second of" in caption) == (policy == "joined")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_position_is_enough_to_resume(make_shards, workers):
    train = make_shards(20)
    straight = batches(train, 8)
    resumed = batches(train, 3, start_position=5 * 6, workers=workers)
    assert [joined([b]) for b in resumed] == [joined([b]) for b in straight[5:]]
    # Another batch size goes on with the next sample.
    keys = [key for batch in straight for key in batch.key]
    regrouped = batches(train, 2, global_batch_size=4, start_position=3 * 6, workers=workers)
    assert [key for batch in regrouped for key in batch.key] == keys[18:26]


def test_several_sources(make_shards):
    one, two = make_shards(20, name="one"), make_shards(4, name="two")
    plain = {"one": Source(one), "two": Source(two)}
    keys = Counter((key, number >= 20) for b in batches(plain, 4) for key, number in zip(b.key, b.number, strict=True))
    assert sorted(keys.values()) == [1] * 24, "without weights, every sample of every source once an epoch"
    weighted = {"one": Source(one, 1), "two": Source(two, 3)}
    straight = batches(weighted, 40)
    share = np.mean([n >= 20 for batch in straight for n in batch.number.tolist()])
    assert 0.68 < share < 0.82
    halves = [batches(weighted, 40, rank=r, world_size=2, workers=1) for r in range(2)]
    assert [joined(list(parts)) for parts in zip(*halves, strict=True)] == [joined([b]) for b in straight]
    loader = build_loader(weighted, TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=0, rank=0, world_size=1)
    counts = loader.source_counts(240)
    assert sum(counts.values()) == 240 and counts["two"] == sum(n >= 20 for b in straight for n in b.number.tolist())
    assert set(np.flatnonzero(loader.seen(60))) == {n for b in straight[:10] for n in b.number.tolist()}


def test_a_broken_sample_is_replaced_by_one_of_its_source(tmp_path):
    good = write_tar(tmp_path / "good.tar", {f"good{n}": encode(draw_image(n)) for n in range(5)})
    rest = {f"ok{n}": encode(draw_image(n)) for n in range(5)}
    mixed = write_tar(tmp_path / "mixed.tar", {**rest, "bad": b"text"})
    sources = {"good": Source(good, 1), "mixed": Source(mixed, 1)}
    stand_ins = 0
    for batch in batches(sources, 20):
        for number, key in zip(batch.number.tolist(), batch.key, strict=True):
            assert key.startswith("good" if number < 5 else "ok")
        stand_ins += len(batch.rejected)
    assert stand_ins >= 5


def test_start_serves_several_streams(make_shards):
    loader = build_loader(
        make_shards(20), TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=0, rank=0, world_size=1
    )
    one, two = loader.start(0), loader.start(6)
    next(one)
    assert joined([next(one)]) == joined([next(two)])
    assert loader.samples_per_epoch == 20
    assert loader.describe()["samples"] == 20 and loader.describe()["tars"] == 3


def test_global_random_state_is_left_alone(make_shards):
    train = make_shards(20)
    for workers in (0, 1):
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        batches(train, 3, workers=workers)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])


def write_tar(path: Path, samples: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image in samples.items():
            for extension, data in (("jpg", image), ("txt", f"caption of {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_broken_samples_are_replaced_and_told(tmp_path):
    good = {f"good{n}": encode(draw_image(n)) for n in range(12)}
    bad = {
        "truncated": encode(draw_image(0))[:-80],
        "text": b"this is a text file called .jpg",
        "zero": b"",
    }
    shards = write_tar(tmp_path / "a.tar", good | bad)
    straight = batches(shards, 5)  # two epochs of 15
    rejected = [rejection for batch in straight for rejection in batch.rejected]
    reasons = {"truncated": "broken_image", "text": "not_an_image", "zero": "empty_image"}
    assert {key: reason for key, reason in rejected} == reasons
    assert all(times >= 2 for times in Counter(key for key, _ in rejected).values())  # once an epoch at least
    keys = [key for batch in straight for key in batch.key]
    assert len(keys) == 30 and set(keys) == set(good)
    for options in ({"workers": 2}, {"start_position": 0}):
        assert [joined([b]) for b in batches(shards, 5, **options)] == [joined([b]) for b in straight]
    halves = [batches(shards, 5, rank=r, world_size=2) for r in range(2)]
    assert [joined(list(parts)) for parts in zip(*halves, strict=True)] == [joined([b]) for b in straight]


def test_a_tar_that_shrinks_in_the_middle_of_an_epoch(make_shards):
    train = make_shards(30, samples_per_shard=10)
    loader = build_loader(train, TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=0, rank=0, world_size=1)
    stream = iter(loader)
    before = next(stream)
    path = train / "test-000001.tar"
    os.truncate(path, path.stat().st_size // 2)
    after = list(islice(stream, 9))
    assert before.rejected == []
    rejected = [rejection for batch in after for rejection in batch.rejected]
    assert {reason for _, reason in rejected} == {"truncated_tar"}
    assert 4 <= len({key for key, _ in rejected}) <= 6
    assert all(len(batch.key) == 6 for batch in after)
    assert loader.missing == {}
    # Opened again, the manifest tells what is gone.
    again = build_loader(train, TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=0, rank=0, world_size=1)
    assert again.missing == {str(path): 30 - again.samples_per_epoch}
    assert 4 <= again.missing[str(path)] <= 6


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_broken_samples_ends_the_run_with_the_reasons(tmp_path, workers):
    shards = write_tar(tmp_path / "a.tar", {f"bad{n}": b"text" for n in range(8)})
    with pytest.raises(
        UserError, match=r"^16 samples in a row are broken: not_an_image \(16\); the last is bad\d; look"
    ):
        batches(shards, 1, workers=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 10, "world_size": 4},
            "global_batch_size=10 cannot be split over 4 ranks; use 8 or change the number of ranks",
        ),
        ({"global_batch_size": 2, "world_size": 3}, "use 3 or change"),
        ({"global_batch_size": 0}, "global_batch_size=0 cannot be split"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_doors(make_shards, options, message):
    with pytest.raises(UserError, match=message):
        batches(make_shards(3), 1, **options)


def test_a_shard_that_is_deleted_between_two_epochs(make_shards):
    train = make_shards(24, samples_per_shard=8)
    loader = build_loader(train, TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=0, rank=0, world_size=1)
    stream = iter(loader)
    first = list(islice(stream, 4))
    (train / "test-000001.tar").unlink()
    second = list(islice(stream, 4))
    assert not any(batch.rejected for batch in first)
    rejected = [rejection for batch in second for rejection in batch.rejected]
    assert {reason for _, reason in rejected} == {"unreadable_shard"} and len({key for key, _ in rejected}) == 8
    assert all(len(batch.key) == 6 for batch in second)


def test_a_loader_process_that_dies_ends_the_run(make_shards, capsys):
    loader = build_loader(
        make_shards(20), TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=1, rank=0, world_size=1
    )
    before = children()
    stream = iter(loader)
    next(stream)
    killed = children() - before
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        list(islice(stream, 10))
    # Where the broken connection was noticed first, torch's handler of SIGCHLD raises the same once more, wherever this
    # process is then: here, and not while pytest sends its report.
    with suppress(RuntimeError):
        while any(map(is_running, killed)):
            time.sleep(0.01)
        time.sleep(0.2)
    with pytest.raises(SystemExit) as exit:
        leave_if_user_error(caught.value)
    assert exit.value.code == 2 and "fewer data.train.workers" in capsys.readouterr().err


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError()])
def test_a_loader_process_that_dies_amid_a_hand_over(make_shards, error):
    """What the trainer's end of the connection raises, before anybody has noticed that the process is gone."""

    def broken() -> Iterator[Batch]:
        raise error
        yield

    layout = {"global_batch_size": 6, "seed": 5, "rank": 0, "world_size": 1}
    for workers, raised in ((1, RuntimeError), (0, type(error))):
        loader = build_loader(make_shards(2, name=f"{workers}"), TRANSFORM, tokenize, workers=workers, **layout)
        with pytest.raises(raised, match="DataLoader worker" if workers else None):
            loader._next(broken())


def is_running(pid: int) -> bool:
    """Whether it has not ended; nobody's ``wait`` is taken from it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 60
    while pids & children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pids & children()


@pytest.mark.parametrize("ending", ["close", "drop"])
def test_no_worker_is_left_behind(make_shards, ending):
    before = children()
    loader = build_loader(
        make_shards(20), TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=2, rank=0, world_size=1
    )
    stream: Iterator[Batch] | None = iter(loader)
    next(stream)
    workers = children() - before
    assert len(workers) >= 2
    if ending == "close":
        loader.close()
    else:
        stream = None
        gc.collect()
    wait_until_gone(workers)


def test_processes_are_forked_before_a_thread_is_there(make_shards, monkeypatch):
    """A fork copies the locks that other threads hold, and none of those who would release them."""
    before, at_start = children(), []

    class Noticing(Watchdog):
        def __init__(self, *args, **options) -> None:
            at_start.append(children() - before)
            super().__init__(*args, **options)

    monkeypatch.setattr(reading, "Watchdog", Noticing)
    batches(make_shards(20), 1, workers=2)
    assert len(at_start[0]) >= 2


def test_a_batch_that_is_kept_keeps_two_files_open(make_shards):
    """Images and texts are shared memory, which an open file stands for; a process may have 1,024 of these."""
    train = make_shards(20)
    before = len(os.listdir("/proc/self/fd"))
    kept = batches(train, 40, workers=1)
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 40 + 5
    assert [joined([b]) for b in kept] == [joined([b]) for b in batches(train, 40)]


def test_what_is_read_is_described(make_shards):
    """A resumed run is refused other shards, also those whose names and sizes are the same."""
    train = make_shards(20)
    options = {"global_batch_size": 6, "seed": 5, "workers": 0, "rank": 0, "world_size": 1}
    before = build_loader(train, TRANSFORM, tokenize, **options).describe()
    assert build_loader(train, TRANSFORM, tokenize, **options).describe() == before
    path = sorted(train.glob("*.tar"))[-1]
    data = path.read_bytes()
    at = data.index(b"second of")
    time.sleep(0.02)  # the clock of a file system is coarse
    path.write_bytes(data[:at] + b"SECOND" + data[at + 6 :])
    after = build_loader(train, TRANSFORM, tokenize, **options).describe()
    assert after["samples"] == before["samples"] and after["sha256"] != before["sha256"]


class Stalls(TrainTransform):
    """From the seventh sample on, as long as a server may be silent."""

    seen = 0

    def into(self, *args) -> None:
        self.seen += 1
        if self.seen > 6:
            time.sleep(60)
        super().into(*args)


def test_processes_that_wait_are_not_waited_for(make_shards):
    """Joining takes 5 s for each that has not finished its batch."""
    before = children()
    loader = build_loader(
        make_shards(20), Stalls(24), tokenize, global_batch_size=6, seed=5, workers=3, rank=0, world_size=1
    )
    stream = iter(loader)
    for _ in range(3):
        next(stream)
    time.sleep(0.5)  # all three are at their second batch
    begun = time.monotonic()
    loader.close()
    assert time.monotonic() - begun < 12
    wait_until_gone(children() - before)


ORPHANS = """
import sys
from tests.data.test_reading import Stalls, tokenize
from quiltnet.data.reading import build_loader
loader = build_loader(sys.argv[1], Stalls(24), tokenize, global_batch_size=6, seed=5, workers=2)
stream = iter(loader)
for _ in range(2):
    next(stream)
print("ready", flush=True)
next(stream)
"""


@pytest.mark.slow
def test_processes_that_wait_do_not_outlive_a_killed_run(make_shards):
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(make_shards(20))],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_lives(process.pid)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


READER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from tests.data.test_reading import TRANSFORM, tokenize
from quiltnet.data.reading import build_loader
loader = build_loader(sys.argv[1], TRANSFORM, tokenize, global_batch_size=6, seed=5, workers=2)
for batch in loader:
    print("batch", flush=True)
    time.sleep(1)  # a training step: interrupted amid a hand-over, the standard library prints a traceback of its own
"""


@pytest.mark.slow
def test_interrupt_ends_all_processes(make_shards):
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(make_shards(20))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        for _ in range(3):  # each worker has delivered
            assert process.stdout.readline() == "batch\n"
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does, to workers as well
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):  # nobody is left in the group
        os.killpg(process.pid, 0)
