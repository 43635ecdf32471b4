"""The ancestry mask against lists of prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding.ancestry import Ancestry


def eye(slots: int, beams: int) -> np.ndarray:
    return np.eye(beams, dtype=bool)[None].repeat(slots, 0)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 4), beams=st.integers(1, 4))
def test_mask_selects_the_tokens_of_each_beam(seed, slots, beams):
    """Random parents, slots dropped, slots refilled, regrouping in between."""
    rng = np.random.default_rng(seed)
    ancestry = Ancestry(slots, beams)
    stored = np.zeros((slots, 0), int)  # the token at every cached position
    prefixes: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(slots)]
    for step in range(16):
        tokens = 100 * (step + 1) + rng.integers(0, 9, (slots, beams))
        fed = ancestry.feed(eye(slots, beams))
        stored = np.concatenate([stored, tokens], 1)
        parents = rng.integers(0, beams, (slots, beams))
        ancestry.choose(fed, parents)
        prefixes = [[[*prefixes[i][p], tokens[i, p]] for p in parents[i]] for i in range(slots)]
        if rng.random() < 0.3:
            slot = rng.integers(slots)
            ancestry.reset(np.array([slot]))
            prefixes[slot] = [[] for _ in range(beams)]
        if rng.random() < 0.3:
            kept = np.flatnonzero(rng.random(slots) < 0.8)
            if len(kept) == 0:
                return
            stored = np.take_along_axis(stored[kept], ancestry.compact(kept), 1)
            prefixes, slots = [prefixes[i] for i in kept], len(kept)
        for i in range(slots):
            for k in range(beams):
                assert stored[i][ancestry.mask[i, k]].tolist() == prefixes[i][k]


def test_compacting_stores_a_shared_past_once():
    ancestry = Ancestry(1, 4)
    for _ in range(10):  # every beam always continues beam 0
        ancestry.choose(ancestry.feed(eye(1, 4)), np.zeros((1, 4), int))
    assert ancestry.width == 40
    ancestry.compact(np.array([0]))
    assert ancestry.width == 10
