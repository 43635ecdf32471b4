"""Banned ids against a plain transcription of the rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding.bans import NOT_BANNED, banned_ids, repeated_ngrams


def plain_bans(ids: list[int], size: int) -> set[int]:
    """Ids that would complete an n-gram already in ids."""
    if size == 0 or len(ids) + 1 < size:
        return set()
    start = tuple(ids[len(ids) - size + 1 :])
    ngrams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return {ngram[-1] for ngram in ngrams if ngram[:-1] == start}


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4),
    size=st.integers(0, 5),
)
def test_bans_equal_the_plain_rule_for_every_length_and_size(sequences, size):
    lengths = np.array([len(s) for s in sequences])
    tokens = np.full((len(sequences), 1, 14), 2)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[0, : len(sequence)] = sequence
    rows, ids = repeated_ngrams(tokens, lengths, size)
    assert rows.tolist() == sorted(rows.tolist())
    bans = banned_ids(tokens, lengths, ngram_size=size, min_length=0, eos=9)
    for i, sequence in enumerate(sequences):
        assert set(ids[rows == i].tolist()) == plain_bans(sequence, size)
        assert set(bans[i, 0].tolist()) == (plain_bans(sequence, size) or {NOT_BANNED})


def test_a_row_with_bans_is_filled_with_its_own_and_a_row_without_holds_none():
    tokens = np.array([[[5, 6, 5, 6, 5], [1, 2, 3, 4, 5]]])
    bans = banned_ids(tokens, np.array([5]), ngram_size=2, min_length=0, eos=9)
    assert set(bans[0, 0].tolist()) == {6}
    assert set(bans[0, 1].tolist()) == {NOT_BANNED}


def test_a_short_row_with_repeats_has_both_kinds_of_bans():
    tokens = np.array([[[5, 6, 5, 6, 5], [1, 2, 3, 4, 5]], [[5, 5, 0, 0, 0], [1, 2, 0, 0, 0]]])
    bans = banned_ids(tokens, np.array([5, 2]), ngram_size=2, min_length=3, eos=9)
    assert [[set(row.tolist()) for row in slot] for slot in bans] == [[{6}, {NOT_BANNED}], [{5, 9}, {9}]]


@pytest.mark.parametrize(("min_length", "banned"), [(0, False), (5, False), (6, True)])
def test_the_end_token_is_banned_below_the_minimum_length(min_length, banned):
    tokens = np.array([[[1, 2, 3, 4, 5]]])
    bans = banned_ids(tokens, np.array([5]), ngram_size=0, min_length=min_length, eos=9)
    assert (9 in bans) is banned
    assert bans.shape == (1, 1, 1)
