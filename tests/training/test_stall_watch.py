"""A process that stands still ends, and says where."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial

import pytest
from PIL import Image

from quiltnet.evaluation.features import SetEncoder
from quiltnet.training.stage import current_stage, stage
from quiltnet.training.stall_watch import EXIT_STALLED, StallWatch
from tests.commands import environment
from tests.evaluation.toy import ToyModel

HANGS = """
import sys, threading
from quiltnet.training.stage import stage
from quiltnet.training.stall_watch import StallWatch

def hang_here():
    threading.Event().wait(60)

with StallWatch(0.4, lambda: "step 7"):
    with stage("evaluation"):
        threading.Event().wait(1.5)  # no limit of its own
    for _ in range(4):
        with stage("data"):
            threading.Event().wait(0.2)
    print("still there", flush=True)
    with stage("backward"):
        hang_here()
"""


@pytest.mark.slow
def test_stage_rank_step_and_stacks_are_told():
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], env=environment(), capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begun < 50
    assert done.returncode == EXIT_STALLED == 70
    assert done.stdout == "still there\n", "neither an evaluation nor what moves is ended"
    assert "stalled: rank 0 is at backward (step 7) and has not moved for 0" in done.stderr
    assert "in hang_here" in done.stderr


def test_stages_nest_and_every_change_counts():
    before = current_stage()
    with stage("forward"):
        inside = current_stage()
        with stage("loss"):
            assert current_stage().name == "loss"
        again = current_stage()
    assert (inside.name, again.name, current_stage().name) == ("forward", "forward", before.name)
    assert before.number < inside.number < again.number < current_stage().number


def test_of_an_evaluation_the_wait_for_a_loader_is_a_stage_of_its_own():
    """Neither the towers nor what comes after them, such as a probe's fit, may be ended."""
    seen = []

    class Samples(list):
        def __getitem__(self, index):
            seen.append(("loader", current_stage().name))
            return (Image.new("RGB", (8, 8)),)

        def content(self):
            return []

    class Model(ToyModel):
        def encode_image(self, image, *, projected=True):
            seen.append(("towers", current_stage().name))
            return super().encode_image(image, projected=projected)

    with stage("evaluation"):
        encoder = SetEncoder(Model(), waiting=partial(stage, "evaluation data"))
        encoder.images(Samples(range(3)), batch_size=2)
        seen.append(("after", current_stage().name))
    loader, towers = ("loader", "evaluation data"), ("towers", "evaluation")
    assert seen == [loader, loader, towers, loader, towers, ("after", "evaluation")]


def test_no_limit_starts_no_thread():
    with StallWatch(None, lambda: "") as watch:
        assert watch._thread is None
