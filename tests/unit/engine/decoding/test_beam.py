"""The beam search itself, on tables instead of networks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding.beam import Beams, Search, Start
from engine.decoding.scheduler import Request, Scheduler
from export.reference.huggingface import PrefixBackend

BOS, EOS = 3, 4
VOCAB_SIZE = 5  # three words, [DEC] and [SEP]
SEARCH = Search(
    prompt=(BOS,),
    num_beams=3,
    max_length=6,
    min_length=0,
    length_penalty=1.0,
    early_stopping=False,
    no_repeat_ngram_size=0,
    num_return_sequences=1,
    eos=EOS,
    vocab_size=VOCAB_SIZE,
)


class TableBackend(PrefixBackend):
    """Log-probabilities drawn once for every (image, prefix), the image being its first byte."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.rows_fed = self.steps = 0

    def step(self, cache, inputs):
        self.steps += 1
        self.rows_fed += inputs.input_ids.size
        return super().step(cache, inputs)

    def log_probs(self, image, prefixes):
        return np.stack([self.row(int(image.flat[0]), prefix) for prefix in prefixes])

    def row(self, image: int, prefix: tuple[int, ...]) -> np.ndarray:
        logits = np.random.default_rng([self.seed, image, *prefix]).normal(0, 2, VOCAB_SIZE)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def sum(self, image: int, ids: tuple[int, ...]) -> float:
        return float(sum(self.row(image, ids[:i])[ids[i]] for i in range(1, len(ids))))


def pixels(*images: int) -> np.ndarray:
    """Pictures of one pixel whose value names them."""
    return np.array(images, np.uint8).reshape(-1, 1, 1, 1).repeat(3, 3)


def decode(backend, search, *images, num_slots=None):
    scheduler = Scheduler(backend, search, num_slots=num_slots or len(images), encode_batch=2)
    return dict(scheduler.decode(pixels(*images)))


def open_beams(search):
    """Beams with one open slot."""
    beams = Beams(search, 1)
    beams.start(np.array([0]))
    return beams


def advance(beams, scores, tokens):
    """One step in which every candidate continues beam 0."""
    scores, tokens = np.array([scores], np.float32), np.array([tokens])
    return beams.advance(scores, np.zeros_like(tokens), tokens, np.array([True]))


def every_caption(max_length: int):
    """All captions: words ended by EOS, or cut at max_length."""
    words = [i for i in range(VOCAB_SIZE) if i != EOS]
    for length in range(max_length - 1):
        for body in itertools.product(words, repeat=length):
            yield (BOS, *body, EOS)
    for body in itertools.product(words, repeat=max_length - 1):
        yield (BOS, *body)


@pytest.mark.parametrize("seed", range(8))
def test_wide_beams_without_early_stopping_find_the_optimum(seed):
    backend = TableBackend(seed)
    search = replace(SEARCH, num_beams=400, max_length=5, early_stopping="never", length_penalty=0.0)
    (best,) = decode(backend, search, 7)[0]
    oracle = max(every_caption(5), key=lambda ids: backend.sum(7, ids))
    assert best.ids == oracle
    assert best.score == pytest.approx(backend.sum(7, oracle), abs=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
def test_score_is_sum_over_length_to_the_penalty(num_beams):
    backend = TableBackend(3)
    search = replace(SEARCH, num_beams=num_beams, length_penalty=0.7, num_return_sequences=num_beams)
    for hypothesis in decode(backend, search, 1)[0]:
        assert hypothesis.sum_log_prob == pytest.approx(backend.sum(1, hypothesis.ids), abs=1e-5)
        new_tokens = len(hypothesis.ids) - 1
        assert hypothesis.score == pytest.approx(hypothesis.sum_log_prob / new_tokens**0.7, abs=1e-5)


def test_greedy_takes_the_most_likely_token():
    backend = TableBackend(5)
    expected: tuple[int, ...] = (BOS,)
    while expected[-1] != EOS and len(expected) < SEARCH.max_length:
        expected = (*expected, int(backend.row(2, expected).argmax()))
    assert decode(backend, replace(SEARCH, num_beams=1), 2)[0][0].ids == expected


@settings(max_examples=100, deadline=None)
@given(
    images=st.lists(st.integers(0, 30), min_size=1, max_size=9),
    num_slots=st.integers(1, 10),
    num_beams=st.integers(1, 5),
    ngram=st.integers(0, 3),
    early_stopping=st.sampled_from([False, True, "never"]),
    max_length=st.integers(8, 16),
    prompt=st.lists(st.integers(0, 2), max_size=6),
)
def test_captions_do_not_depend_on_other_images_or_slots(
    images, num_slots, num_beams, ngram, early_stopping, max_length, prompt
):
    backend = TableBackend(9)
    search = replace(
        SEARCH,
        prompt=(BOS, *prompt),
        num_beams=num_beams,
        no_repeat_ngram_size=ngram,
        early_stopping=early_stopping,
        max_length=max_length,
        num_return_sequences=num_beams,
    )
    together = decode(backend, search, *images, num_slots=num_slots)
    assert sorted(together) == list(range(len(images)))
    for i, image in enumerate(images):
        assert together[i] == decode(backend, search, image)[0]


def test_caption_continues_its_prompt():
    """Ids after a prompt equal those of a table for the same prefix, however many steps the prompt takes."""
    backend = TableBackend(6)
    for num_beams in (1, 2, 5):
        for prompt in ((BOS,), (BOS, 1, 2), (BOS, 2, 1, 0, 0, 1, 2)):
            search = replace(SEARCH, prompt=prompt, num_beams=num_beams, max_length=len(prompt) + 4)
            (best,) = decode(backend, search, 3)[0]
            assert best.ids[: len(prompt)] == prompt
            expected = sum(float(backend.row(3, best.ids[:i])[best.ids[i]]) for i in range(len(prompt), len(best.ids)))
            assert best.sum_log_prob == pytest.approx(expected, abs=1e-5)


PROCESSORS = {
    "repetition_penalty": st.sampled_from([1.0, 1.2, 2.5]),
    "suppressed": st.sampled_from([(), (0,), (0, BOS)]),
    "begin_suppressed": st.sampled_from([(), (EOS,), (1, 2)]),
    "banned_sequences": st.sampled_from([(), ((1, 2),), ((0, 1), (2, 2, 0))]),
    "no_repeat_ngram_size": st.integers(0, 2),
}


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8),
    num_slots=st.integers(1, 5),
    num_beams=st.integers(1, 4),
    num_sets=st.integers(1, 2),
    processors=st.fixed_dictionaries(PROCESSORS),
)
def test_prompts_per_image_give_the_same_captions_as_alone(prompts, num_slots, num_beams, num_sets, processors):
    backend = TableBackend(4)
    alone = replace(SEARCH, num_beams=num_beams, num_return_sequences=num_beams, **processors)
    starts = [Start((BOS, *prompt), len(prompt) + 5, len(prompt) + 2) for prompt in prompts]
    search = replace(alone, max_length=max(start.max_length for start in starts))
    waiting = [Request(i, pixels(i)[0], start) for i, start in enumerate(starts)]
    scheduler = Scheduler(backend, search, num_slots=num_slots, encode_batch=2, num_sets=num_sets)
    together = dict(found for closed in scheduler.steps(waiting) for found in closed)
    for i, start in enumerate(starts):
        own = replace(alone, prompt=start.prompt, max_length=start.max_length, min_length=start.min_length)
        assert together[i] == decode(backend, own, i)[0]


def test_slot_of_a_closed_image_is_refilled_at_once():
    """With one slot, images come out one after the other, and no step is spent between them."""
    backend = TableBackend(11)
    steps = dict.fromkeys(range(5), 0)
    search = replace(SEARCH, num_beams=2, max_length=40)
    for image in steps:
        backend.steps = 0
        decode(backend, search, image)
        steps[image] = backend.steps
    backend.steps = 0
    order = [key for key, _ in Scheduler(backend, search, num_slots=1).decode(pixels(*steps))]
    assert order == list(steps)
    assert backend.steps == sum(steps.values())


@settings(max_examples=60, deadline=None)
@given(image=st.integers(0, 99), num_beams=st.integers(1, 5), ngram=st.integers(1, 4))
def test_no_ngram_is_repeated(image, num_beams, ngram):
    search = replace(SEARCH, num_beams=num_beams, no_repeat_ngram_size=ngram, max_length=20)
    for hypothesis in decode(TableBackend(1), search, image)[0]:
        if not np.isfinite(hypothesis.sum_log_prob):
            continue  # so few words that every continuation was banned
        ngrams = list(zip(*(hypothesis.ids[i:] for i in range(ngram)), strict=False))
        assert len(ngrams) == len(set(ngrams))


@pytest.mark.parametrize("num_beams", [1, 4])
def test_captions_reach_the_minimum_length(num_beams):
    search = replace(SEARCH, num_beams=num_beams, min_length=5, max_length=9)
    for hypotheses in decode(TableBackend(2), search, *range(6)).values():
        assert EOS not in hypotheses[0].ids[:5]


def test_empty_slots_are_removed():
    backend = TableBackend(11)
    search = replace(SEARCH, num_beams=2, max_length=40)
    alone = {}
    for image in range(6):
        backend.rows_fed = 0
        decode(backend, search, image)
        alone[image] = backend.rows_fed
    assert len(set(alone.values())) > 1, "the table must close its images at different steps"
    backend.rows_fed = 0
    decode(backend, search, *range(6), num_slots=100)
    assert backend.rows_fed < 6 * max(alone.values())


def test_running_beams_become_hypotheses_at_max_length():
    class NeverEnds(TableBackend):
        def row(self, image, prefix):
            row = super().row(image, prefix)
            row[EOS] = -50.0
            return row

    hypotheses = decode(NeverEnds(4), replace(SEARCH, num_return_sequences=3), 1)[0]
    assert [len(h.ids) for h in hypotheses] == [6, 6, 6]
    assert all(a.score >= b.score for a, b in itertools.pairwise(hypotheses))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_below_the_placeholder_still_give_a_caption(num_beams):
    """Length penalties can push a real score below NEVER; greedy keeps it, beams return what Hugging Face does."""
    search = replace(SEARCH, num_beams=num_beams, min_length=30, max_length=40, length_penalty=-9.0)
    (best,) = decode(TableBackend(1), search, 5)[0]
    if num_beams == 1:
        assert len(best.ids) > 29
    else:
        assert (best.ids, best.score) == ((BOS, EOS), -1e9)


def test_end_token_ranked_after_the_first_k_is_dropped():
    beams = open_beams(replace(SEARCH, num_beams=2))
    advance(beams, [-1.0, -2.0, -3.0, -4.0], [0, 1, EOS, 2])
    assert not beams._finished.any()
    assert beams.tokens[0, :, 1].tolist() == [0, 1]


def test_end_token_within_the_first_k_becomes_a_hypothesis():
    beams = open_beams(replace(SEARCH, num_beams=2))
    assert advance(beams, [-1.0, -2.0, -3.0, -4.0], [0, EOS, 1, 2]).tolist() == [[0, 2]]
    assert beams._finished.sum() == 1
    assert beams._hypothesis_scores[0, 0] == np.float32(-2.0)


@pytest.mark.parametrize(("early_stopping", "closes"), [(True, True), (False, True), ("never", False)])
def test_early_stopping_decides_whether_k_hypotheses_close_an_image(early_stopping, closes):
    """Two hypotheses score -1; the best running beam sums to -2.2: -2.2 now, but -2.2 / 5 at the longest."""
    beams = open_beams(replace(SEARCH, num_beams=2, early_stopping=early_stopping))
    advance(beams, [-1.0, -1.0, -2.2, -2.3], [EOS, EOS, 0, 1])
    assert beams.closed[0] == closes


def test_never_bounds_by_the_present_length_if_longer_is_worse():
    """With penalty -1 scores are sums times lengths: the worst is -1.0 * 2; a beam of -0.9 is now at -1.8."""
    beams = open_beams(replace(SEARCH, num_beams=2, early_stopping="never", length_penalty=-1.0))
    advance(beams, [-0.8, -0.85, -1.0, -1.1], [EOS, 0, 1, 2])
    advance(beams, [-0.9, -1.0, -3.0, -3.1], [0, EOS, 1, 2])
    assert not beams.closed[0]


def test_a_running_beam_that_can_still_win_keeps_its_image_open():
    """Two hypotheses score -1; the best running beam sums to -0.9, so it may end better than the worst of them."""
    beams = open_beams(replace(SEARCH, num_beams=2))
    advance(beams, [-0.8, -0.9, -1.0, -1.1], [EOS, 0, 1, 2])
    advance(beams, [-1.0, -1.1, -3.0, -3.1], [EOS, 0, 1, 2])
    assert not beams.closed[0]


def test_a_slot_that_is_not_active_does_not_move():
    beams = open_beams(replace(SEARCH, num_beams=2))
    before = {name: value.copy() for name, value in vars(beams).items() if isinstance(value, np.ndarray)}
    scores = np.full((1, 4), -np.inf, np.float32)
    beams.advance(scores, np.zeros((1, 4), np.int64), np.zeros((1, 4), np.int64), np.array([False]))
    del before["_next_tokens"]  # a place to write to
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(beams, name), value)
