from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from quiltnet.data.captions import check_policy, choose_caption
from quiltnet.errors import UserError

CAPTIONS = ["one", "two", "three"]


def test_first_and_joined_draw_nothing():
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert choose_caption(CAPTIONS, "first", rng) == "one"
    assert choose_caption(CAPTIONS, "joined", rng) == "one two three"
    assert rng.bit_generator.state == state


def test_random_is_even_and_repeatable():
    chosen = [choose_caption(CAPTIONS, "random", np.random.default_rng([0, n])) for n in range(600)]
    assert chosen == [choose_caption(CAPTIONS, "random", np.random.default_rng([0, n])) for n in range(600)]
    assert all(150 < times < 250 for times in Counter(chosen).values())
    assert set(chosen) == set(CAPTIONS)


def test_unknown_policy():
    with pytest.raises(UserError, match="'longest' is not known; use one of random, first, joined"):
        check_policy("longest")
