from __future__ import annotations

import re
import time

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


def test_lines_are_cut_and_replaced():
    board = StageBoard(1)
    board.write(0, "long " * 200)
    board.write(0, "short")
    assert [stage for stage, _ in board.read()] == ["short"]
    board.write(0, "\u00e4" * 200)
    assert board.read()[0][0].startswith("\u00e4" * 100)
