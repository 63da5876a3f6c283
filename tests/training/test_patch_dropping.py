"""PatchDropping is a function of the clock: the last part of a run sees all patches, resumed or not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quiltnet.training.patch_dropping import PatchDropping


def shares_of_steps(begin: int, *, total: int = 12, until: int = 8) -> dict[int, float]:
    """The share that each step of 2 pairs trains with, by the clock at its start."""
    current, seen = [], {}
    callback = PatchDropping(current.append, 0.5, until_samples=until)
    state = SimpleNamespace(samples_seen=begin)
    callback.fit_start(state)
    while state.samples_seen < total:
        seen[state.samples_seen] = current[-1]
        state.samples_seen += 2
        callback.step_end(state, None, {})
    return seen


def test_the_last_part_sees_all_patches():
    assert shares_of_steps(0) == {0: 0.5, 2: 0.5, 4: 0.5, 6: 0.5, 8: 0.0, 10: 0.0}
    assert shares_of_steps(0, until=7)[6] == 0.5  # the step that begins before the mark


@pytest.mark.parametrize("begin", [4, 8, 10])
def test_a_resumed_run_goes_on_alike(begin):
    straight = shares_of_steps(0)
    assert shares_of_steps(begin) == {clock: share for clock, share in straight.items() if clock >= begin}
