from __future__ import annotations

import re
import time

import pytest
from torch import multiprocessing

from quiltnet.data.watchdog import StageBoard, Watchdog


def test_names_what_every_loader_is_at(capfd):
    board = StageBoard(2)
    board.write(0, "reading sample 7 of /data/quilt-000003.tar")
    watchdog = Watchdog(board, patience_s=0.2)
    try:
        with watchdog.waiting():
            time.sleep(0.05)
        time.sleep(0.4)  # not waiting: nothing to tell
        assert capfd.readouterr().err == ""
        with watchdog.waiting():
            time.sleep(0.5)
    finally:
        watchdog.close()
    told = capfd.readouterr().err
    assert re.search(r"no batch for 0 s\n  loader 0: reading sample 7 of /data/quilt-000003\.tar, for \d s\n", told)
    assert "  loader 1: starting" in told
    assert 1 <= told.count("no batch") <= 2


def test_the_rank_is_named_where_there_are_several(capfd):
    watchdog = Watchdog(StageBoard(1), patience_s=0.05, who="rank 3: ")
    try:
        with watchdog.waiting():
            time.sleep(0.2)
    finally:
        watchdog.close()
    assert capfd.readouterr().err.startswith("rank 3: no batch for")


def test_a_loader_that_has_said_nothing_is_as_old_as_the_board():
    ((stage, seconds),) = StageBoard(1).read()
    assert stage == "starting" and 0 <= seconds < 5


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_process_writes_on_the_same_board_however_it_was_started(method):
    board = StageBoard(2)
    process = multiprocessing.get_context(method).Process(target=board.write, args=(1, "reading"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [stage for stage, _ in board.read()] == ["starting", "reading"]


def test_lines_are_cut_and_replaced():
    board = StageBoard(1)
    board.write(0, "long " * 200)
    board.write(0, "short")
    assert [stage for stage, _ in board.read()] == ["short"]
    board.write(0, "\u00e4" * 200)
    assert board.read()[0][0].startswith("\u00e4" * 100)


def test_the_first_batch_is_waited_for_with_less_patience(capfd):
    board = StageBoard(1)
    board.write(0, "filling shuffle buffer 1200/2000")
    watchdog = Watchdog(board, patience_s=30, first_patience_s=0.2)
    try:
        with watchdog.waiting():
            time.sleep(0.6)
        assert "filling shuffle buffer 1200/2000" in capfd.readouterr().err
        with watchdog.waiting():
            time.sleep(0.6)
        assert capfd.readouterr().err == ""
    finally:
        watchdog.close()
