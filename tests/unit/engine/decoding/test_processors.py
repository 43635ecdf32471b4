"""Marked ids against a plain transcription of the rules, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding.beam import resolve_search
from engine.decoding.processors import NOT_MARKED, Processors, penalised, process
from engine.errors import UsageError
from engine.options import DecodeOptions

EOS, WIDTH = 9, 14


def plain_bans(ids: list[int], size: int) -> set[int]:
    """Ids that would complete an n-gram already in ids."""
    if size == 0 or len(ids) + 1 < size:
        return set()
    start = tuple(ids[len(ids) - size + 1 :])
    ngrams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return {ngram[-1] for ngram in ngrams if ngram[:-1] == start}


def plain_marks(ids: list[int], processors: Processors, prompt_length: int, min_length: int) -> set[int]:
    """All marks of one row."""
    banned = plain_bans(ids, processors.no_repeat_ngram_size) | set(processors.suppressed)
    banned |= {EOS} if len(ids) < min_length else set()
    banned |= set(processors.begin_suppressed) if len(ids) == prompt_length else set()
    for sequence in processors.banned_sequences:
        if len(ids) >= len(sequence) and ids[len(ids) - len(sequence) + 1 :] == list(sequence[:-1]):
            banned.add(sequence[-1])
    said = {int(penalised(np.array(i))) for i in set(ids) - banned} if processors.has_penalty else set()
    return banned | said or {NOT_MARKED}


def marked(sequences, processors, *, prompt_lengths=None, min_lengths=None):
    """i64[B,1,M] of sequences of any lengths."""
    lengths = np.array([len(s) for s in sequences])
    tokens = np.full((len(sequences), 1, WIDTH), 2, np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[0, : len(sequence)] = sequence
    zeros = np.zeros_like(lengths)
    return processors.marked_ids(
        tokens,
        lengths,
        prompt_lengths=zeros if prompt_lengths is None else np.array(prompt_lengths),
        min_lengths=zeros if min_lengths is None else np.array(min_lengths),
        eos=EOS,
    )


WORDS = st.integers(0, 3)


@settings(max_examples=300, deadline=None)
@given(
    sequences=st.lists(st.lists(WORDS, min_size=1, max_size=12), min_size=1, max_size=4),
    size=st.integers(0, 5),
    penalty=st.sampled_from([1.0, 1.3]),
    suppressed=st.lists(st.sampled_from([0, 3, 7, EOS]), max_size=3, unique=True),
    begin=st.lists(WORDS, max_size=2, unique=True),
    banned=st.lists(st.lists(WORDS, min_size=2, max_size=4), max_size=3, unique_by=tuple),
    prompt=st.integers(1, 5),
    shortest=st.integers(0, 9),
)
def test_marked_ids_equal_the_plain_rules(sequences, size, penalty, suppressed, begin, banned, prompt, shortest):
    processors = Processors(penalty, size, tuple(suppressed), tuple(begin), tuple(map(tuple, banned)))
    prompts = [(prompt + i) % 5 for i in range(len(sequences))]
    shortest_of = [shortest + i for i in range(len(sequences))]
    found = marked(sequences, processors, prompt_lengths=prompts, min_lengths=shortest_of)
    for row, ids, own_prompt, own_shortest in zip(found[:, 0], sequences, prompts, shortest_of, strict=True):
        assert set(row.tolist()) == plain_marks(ids, processors, own_prompt, own_shortest)


def test_each_row_of_a_slot_has_its_marked_ids():
    tokens = np.array([[[5, 6, 5, 6, 5], [1, 2, 3, 4, 5]], [[5, 5, 0, 0, 0], [1, 2, 0, 0, 0]]])
    lengths = np.array([5, 2])
    bans = Processors(no_repeat_ngram_size=2).marked_ids(
        tokens, lengths, prompt_lengths=np.ones(2), min_lengths=np.array([3, 3]), eos=EOS
    )
    assert [[set(row.tolist()) for row in slot] for slot in bans] == [[{6}, {NOT_MARKED}], [{5, 9}, {9}]]


@pytest.mark.parametrize(("min_length", "banned"), [(0, False), (5, False), (6, True)])
def test_the_end_token_is_banned_below_the_minimum_length(min_length, banned):
    bans = marked([[1, 2, 3, 4, 5]], Processors(), min_lengths=[min_length])
    assert (EOS in bans) is banned
    assert bans.shape == (1, 1, 1)


def test_with_a_penalty_all_steps_have_one_width():
    widths = {marked([[1, 2, 3, 1, 2][:n]], Processors(1.2, 2)).shape[2] for n in range(1, 6)}
    assert widths == {WIDTH}


def test_the_penalty_is_on_logits_or_on_log_probabilities_and_bans_win():
    logits = np.array([[2.0, -1.0, 0.5, 3.0]], np.float32)
    log_probs = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
    marks = np.array([[penalised(np.array(0)), penalised(np.array(1)), 3, 3]])
    greedy = process(log_probs, logits, marks, np.array([2, 1], np.float32))
    np.testing.assert_allclose(greedy - log_probs, [[-1.0, -1.0, 0.0, -np.inf]], atol=1e-6)
    beams = process(log_probs, logits, marks, np.array([1, 2], np.float32))
    np.testing.assert_allclose(beams[0, :3], [2 * log_probs[0, 0], 2 * log_probs[0, 1], log_probs[0, 2]])


def test_bad_words_from_the_start_token_are_refused():
    """transformers 4.57 ignores [start, id] for the first word, 5.24 applies it."""
    sizes = {"prompt": (7, 1), "eos": EOS, "vocab_size": 20, "max_positions": 64}
    with pytest.raises(UsageError, match=r"bad_words_ids \[7, 3\] begins with the start token 7"):
        resolve_search(DecodeOptions(bad_words_ids=((2, 3), (7, 3))), **sizes)
    search = resolve_search(DecodeOptions(bad_words_ids=((2, 3), (3, 7), (7,))), **sizes)
    assert search.banned_sequences == ((2, 3), (3, 7))
