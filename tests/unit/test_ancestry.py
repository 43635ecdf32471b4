"""The ancestry mask against lists of prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding.ancestry import Ancestry


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 4), beams=st.integers(1, 4), prompt=st.integers(1, 3))
def test_masks_select_exactly_the_tokens_each_beam_descends_from(seed, images, beams, prompt):
    rng = np.random.default_rng(seed)
    ancestry = Ancestry(images, beams)
    fed = ancestry.feed(np.tri(prompt, dtype=bool))
    stored = np.arange(prompt)[None].repeat(images, 0)  # the token at every cached position
    ancestry.choose(fed, np.full((images, beams), prompt - 1))
    prefixes = [[list(range(prompt))] * beams for _ in range(images)]
    for step in range(12):
        tokens = 100 * (step + 1) + rng.integers(0, 9, (images, beams))
        fed = ancestry.feed(np.eye(beams, dtype=bool))
        stored = np.concatenate([stored, tokens], 1)
        parents = rng.integers(0, beams, (images, beams))
        ancestry.choose(fed, parents)
        prefixes = [[prefixes[i][p] + [tokens[i, p]] for p in parents[i]] for i in range(images)]
        if rng.random() < 0.3:
            kept = np.flatnonzero(rng.random(images) < 0.8)
            if len(kept) == 0:
                return
            stored = np.take_along_axis(stored[kept], ancestry.compact(kept), 1)
            prefixes, images = [prefixes[i] for i in kept], len(kept)
        for i in range(images):
            for k in range(beams):
                assert stored[i][ancestry.mask[i, k]].tolist() == prefixes[i][k]


def test_compacting_stores_a_shared_past_once():
    ancestry = Ancestry(1, 4)
    ancestry.choose(ancestry.feed(np.tri(1, dtype=bool)), np.zeros((1, 4), int))
    for _ in range(10):  # every beam always continues beam 0
        ancestry.choose(ancestry.feed(np.eye(4, dtype=bool)), np.zeros((1, 4), int))
    assert ancestry.width == 41
    ancestry.compact(np.array([0]))
    assert ancestry.width == 11
