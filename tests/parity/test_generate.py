"""Parity with Hugging Face `generate`: ids and scores over the whole grid of settings.

The ids of transformers 4.57.6 are stored as one digest per row of the grid (tests/data/grid_ids.json, written with
GRID_IDS=write), and transformers 5 must give the same ids: `make test-next`. Most of the time of these tests is
`generate`. So with 4.57.6 it only runs for LIVE_BEAMS, and for rows whose ids are not the stored ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.captions import Caption
from engine.decoding.scheduler import Scheduler
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from export.families.modules import IS_5
from export.reference.huggingface import Reference, generate_arguments
from tests.helpers.tiny import SPECIAL, random_pictures

BEAMS = (1, 2, 3, 4, 5, 10)
NO_REPEAT = (0, 2, 3)
LENGTH_PENALTY = (0.6, 1.0, 2.0)
EARLY_STOPPING = (False, True, "never")
PROMPT = (None, "a picture of the chest")
MIN_NEW_TOKENS = (None, 6)
MAX_NEW_TOKENS = 14
IMAGES = 17
SLOTS = (17, 5, 1)
"""Images decoded in parallel, of 17 in all (of 3 with one slot); each number of slots must give the same captions."""

LIVE_BEAMS = (1, 4)
"""Numbers of beams for which `generate` always runs, so that scores are compared too."""

SCORE_TOLERANCE = 1e-4
"""Required bound; measured 2e-6 on the tiny model."""


GRID_IDS = Path(__file__).parents[1] / "data/grid_ids.json"


IS_WRITING = os.environ.get("GRID_IDS") == "write"


class Row:
    """The ids of a row of the grid; `must_run` says whether `generate` must run, or the stored digest suffices."""

    def __init__(self, name: str, num_beams: int, digests: dict[str, str]) -> None:
        self._name, self._digests = name, digests
        self._stored = {} if IS_WRITING else json.loads(GRID_IDS.read_text())
        self._is_live = IS_5 or IS_WRITING or num_beams in LIVE_BEAMS

    def must_run(self, ours: list[list[list[tuple[int, ...]]]]) -> bool:
        """Return whether `generate` is asked; `ours` are our ids by option, image and rank."""
        return self._is_live or digest_of(ours) != self._stored.get(self._name)

    def note(self, theirs: list[list[list[tuple[int, ...]]]]) -> None:
        """Note the ids of `generate`. Those of transformers 5 must be those of 4.57.6."""
        self._digests[self._name] = digest_of(theirs)
        if IS_5:
            assert self._digests[self._name] == self._stored[self._name], "differs from transformers 4.57.6"


def digest_of(options: list[list[list[tuple[int, ...]]]]) -> str:
    return hashlib.sha256("".join(map(json.dumps, options)).encode()).hexdigest()


@pytest.fixture(scope="module")
def digests():
    """Digests of the ids of each row of the grid that was run."""
    by_row: dict[str, str] = {}
    yield by_row
    if IS_WRITING:
        GRID_IDS.write_text(json.dumps(by_row, indent=1) + "\n")


@pytest.fixture(scope="module")
def pictures():
    return random_pictures(IMAGES)


@pytest.fixture(scope="module")
def pixel_values(pictures, tiny_reference):
    return tiny_reference.pixels(pictures)


def search_options(num_beams):
    """Return the combinations to test. Length penalty and early stopping have no effect on greedy search."""
    return [(1.0, False)] if num_beams == 1 else itertools.product(LENGTH_PENALTY, EARLY_STOPPING)


@pytest.mark.parametrize("min_new_tokens", MIN_NEW_TOKENS)
@pytest.mark.parametrize("prompt", PROMPT)
@pytest.mark.parametrize("ngram", NO_REPEAT)
@pytest.mark.parametrize("num_beams", BEAMS)
def test_captions_equal_generate(
    num_beams, ngram, prompt, min_new_tokens, pictures, pixel_values, tiny_captioner, tiny_reference, digests
):
    options = [
        DecodeOptions(
            num_beams=num_beams,
            no_repeat_ngram_size=ngram,
            prompt=prompt,
            min_new_tokens=min_new_tokens,
            max_new_tokens=MAX_NEW_TOKENS,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_beams,
        )
        for length_penalty, early_stopping in search_options(num_beams)
    ]
    ours = [list(tiny_captioner.caption(pictures, one, rows=SLOTS[0] * num_beams)) for one in options]
    for one, captions in zip(options, ours, strict=True):
        for slots in SLOTS[1:]:
            count = 3 if slots == 1 else IMAGES
            again = tiny_captioner.caption(pictures[:count], one, rows=slots * num_beams)
            assert list(map(ids_of, again)) == list(map(ids_of, captions[:count])), one
    row = Row(f"{num_beams} beams, {ngram}-grams, prompt {prompt}, at least {min_new_tokens}", num_beams, digests)
    compare_row(row, options, ours, pixel_values, tiny_reference)


def ids_of(caption: Caption) -> list[tuple[int, ...]]:
    return [alternative.ids for alternative in caption.alternatives]


def compare_row(
    row: Row, options: list[DecodeOptions], ours: list[list[Caption]], pixel_values, reference: Reference
) -> None:
    """Compare captions by option and image with the stored digest of the row's ids, or with `generate`."""
    if not row.must_run([list(map(ids_of, captions)) for captions in ours]):
        return
    found = []
    for one, captions in zip(options, ours, strict=True):
        theirs = reference.generate(pixel_values, one)
        found.append([[expected.ids for expected in several] for several in theirs])
        for mine, expected in zip(captions, theirs, strict=True):
            assert ids_of(mine) == [e.ids for e in expected], one
            if one.num_beams > 1:
                scores = [alternative.score for alternative in mine.alternatives]
                np.testing.assert_allclose(scores, [e.score for e in expected], atol=SCORE_TOLERANCE)
    row.note(found)


TOKEN_TOLERANCE = 1e-5
"""Required bound of a token's log-probability, a difference of two float32 sums."""


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 1},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 3, "prompt": PROMPT[1], "no_repeat_ngram_size": 2, "min_new_tokens": 6, "bad_words": ("the",)},
        {"do_sample": True, "temperature": 0.7},
    ],
)
def test_token_log_probs_equal_one_pass(more, pictures, pixel_values, tiny_captioner, tiny_reference):
    """Bans and warpers only rule tokens out, so the values are those of the model, whatever the search."""
    count = more.get("num_beams", 3)
    options = DecodeOptions(max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=count).replace(**more)
    start = len(tiny_captioner.search(options).prompt)
    for caption, pixels in zip(tiny_captioner.caption(pictures[:6], options, rows=8), pixel_values, strict=False):
        for alternative in caption.alternatives:
            ids = torch.tensor([alternative.ids])
            with torch.inference_mode():
                encoded = tiny_reference.family.encode(tiny_reference.model, pixels[None])
                rows = torch.log_softmax(tiny_reference.family.logits(tiny_reference.model, ids, encoded)[0], -1)
            expected = [rows[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
            np.testing.assert_allclose(alternative.token_log_probs, expected, atol=TOKEN_TOLERANCE)
            assert sum(alternative.token_log_probs) == pytest.approx(alternative.sum_log_prob, abs=TOKEN_TOLERANCE)


def test_token_log_probs_with_penalty_equal_transition_scores(pictures, pixel_values, tiny_captioner, tiny_reference):
    options = DecodeOptions(num_beams=3, max_new_tokens=MAX_NEW_TOKENS, repetition_penalty=2.5, num_return_sequences=3)
    model, (prompt, _) = tiny_reference.model, tiny_reference.family.prompt_arguments(tiny_reference.tokenizer, None, 6)
    with torch.inference_mode():
        given = prompt | generate_arguments(options) | {"output_scores": True, "return_dict_in_generate": True}
        output = model.generate(pixel_values=pixel_values[:6], **given)
    expected = model.text_decoder.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    captions = list(tiny_captioner.caption(pictures[:6], options))
    found = [alternative.token_log_probs for caption in captions for alternative in caption.alternatives]
    for mine, theirs in zip(found, expected.numpy(), strict=True):
        np.testing.assert_allclose(mine, theirs[: len(mine)], atol=TOKEN_TOLERANCE)
        assert not theirs[len(mine) :].any()


PENALTIES = (1.0, 1.2, 2.5)
EOS = SPECIAL.index("[SEP]")
BANS = {
    "none": {},
    "words": {"bad_words": ("the", "white arrow", "t2-weighted", "of the left")},
    "ids": {
        "bad_words_ids": ((6,), (12, 13), (7, 8, 9), (EOS,)),
        "suppress_tokens": (10, 11),
        "begin_suppress_tokens": (9, EOS),
    },
}


@pytest.mark.parametrize("bans", BANS)
@pytest.mark.parametrize("num_beams", [1, 3, 4])
def test_penalties_and_bans_equal_generate(
    num_beams, bans, pictures, pixel_values, tiny_captioner, tiny_reference, digests
):
    """The penalty applies to raw logits in greedy search and to log-probabilities with beams; prompt tokens count."""
    options = [
        DecodeOptions(
            num_beams=num_beams,
            no_repeat_ngram_size=ngram,
            prompt=prompt,
            min_new_tokens=least,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=num_beams,
            repetition_penalty=penalty,
            **BANS[bans],
        )
        for penalty, ngram, prompt, least in itertools.product(PENALTIES, (0, 2), PROMPT, (None, 6))
    ]
    ours = [list(tiny_captioner.caption(pictures, one, rows=5 * num_beams)) for one in options]
    plain = None
    for one, captions in zip(options, ours, strict=True):
        if (one.repetition_penalty, one.no_repeat_ngram_size, one.min_new_tokens) == (1.0, 0, None):
            plain = list(map(ids_of, captions))
        elif one.repetition_penalty == PENALTIES[-1]:
            assert list(map(ids_of, captions)) != plain, "the penalty changes no caption"
    compare_row(
        Row(f"{num_beams} beams, penalties, bans: {bans}", num_beams, digests),
        options,
        ours,
        pixel_values,
        tiny_reference,
    )


FIRST = 9
FORCED = {
    "first": {"forced_bos_token_id": FIRST},
    "last": {"forced_eos_token_id": EOS},
    "both": {"forced_bos_token_id": FIRST, "forced_eos_token_id": EOS, "begin_suppress_tokens": (12, EOS)},
    "another last": {"forced_eos_token_id": 14},
}
FORCED_WITH: list[dict[str, Any]] = [
    {"max_new_tokens": 14},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2, "begin_suppress_tokens": None},
    {"max_length": 9, "min_new_tokens": 5, "no_repeat_ngram_size": 2, "length_penalty": 2.0, "early_stopping": True},
    {"max_new_tokens": 6, "min_new_tokens": 6, "repetition_penalty": 2.5, "bad_words_ids": ((FIRST,), (FIRST, 12))},
    {"max_new_tokens": 8, "prompt": PROMPT[1], "early_stopping": "never"},
]


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("num_beams", [1, 3, 4])
def test_forced_tokens_equal_generate(num_beams, forced, pictures, pixel_values, tiny_captioner, tiny_reference):
    """They come after other bans, cost nothing and count as generated; a prompt has no forced first token."""
    for more in FORCED_WITH:
        is_one = more.get("max_new_tokens") == 1  # all beams but the first are placeholders of one score then
        given = FORCED[forced] | more | ({"begin_suppress_tokens": None} if is_one else {})
        options = DecodeOptions(num_beams=num_beams, num_return_sequences=1 if is_one else num_beams, **given)
        theirs = tiny_reference.generate(pixel_values, options)
        ours = tiny_captioner.caption(pictures, options, rows=5 * num_beams)
        for mine, expected in zip(ours, theirs, strict=True):
            assert [a.ids for a in mine.alternatives] == [e.ids for e in expected], options
            if num_beams > 1:
                np.testing.assert_allclose(
                    [a.score for a in mine.alternatives], [e.score for e in expected], atol=SCORE_TOLERANCE
                )
            if "forced_bos_token_id" in given and "prompt" not in given and not is_one:
                assert mine.ids[1] == FIRST
                assert mine.alternatives[0].token_log_probs[0] == 0.0


def test_forced_first_token_when_sampling(pictures, tiny_captioner):
    options = DecodeOptions(do_sample=True, num_return_sequences=3, forced_bos_token_id=FIRST, forced_eos_token_id=EOS)
    options = options.replace(max_new_tokens=6, min_new_tokens=6)
    for caption in tiny_captioner.caption(pictures[:5], options):
        for drawn in caption.alternatives:
            assert (drawn.ids[1], drawn.ids[-1], len(drawn.ids)) == (FIRST, EOS, 7)
            assert drawn.token_log_probs[0] == drawn.token_log_probs[-1] == 0.0


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"repetition_penalty": 1.3, "bad_words": ("the",)},
        {"forced_bos_token_id": FIRST},
        {"forced_bos_token_id": FIRST, "begin_suppress_tokens": tuple(range(5, 40)), "max_length": 14},
    ],
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_prompt_per_image_equals_generate_one_by_one(num_beams, more, pictures, tiny_captioner, tiny_reference):
    texts = ("", "a", "a picture of the chest", "ct of the left upper lobe showing", "mri")
    prompts = {str(i): texts[i % len(texts)] for i in range(len(pictures))}
    length = {} if "max_length" in more else {"max_new_tokens": MAX_NEW_TOKENS}
    options = DecodeOptions(num_beams=num_beams, no_repeat_ngram_size=2, min_new_tokens=4, **length, **more)
    ours = tiny_captioner.caption(pictures, options, rows=5 * num_beams, prompts=prompts)
    for picture, mine in zip(pictures, ours, strict=True):
        own = options.replace(prompt=prompts[mine.id] or None)
        ((theirs, *_),) = tiny_reference.generate(tiny_reference.pixels([picture]), own)
        assert mine.ids == theirs.ids, prompts[mine.id]


def test_grid_captions_are_diverse(pictures, tiny_captioner):
    """Captions must differ between images and in length, otherwise parity would be too easy."""
    options = DecodeOptions(num_beams=4, max_new_tokens=MAX_NEW_TOKENS)
    ids = [caption.ids for caption in tiny_captioner.caption(pictures, options)]
    assert len(set(ids)) > IMAGES // 2
    assert len({len(i) for i in ids}) >= 5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"max_length": 9}, {"min_length": 12, "max_length": 16}])
@pytest.mark.parametrize("prompt", PROMPT)
def test_lengths_count_as_in_generate(options, prompt, pictures, pixel_values, tiny_captioner, tiny_reference):
    """max_length counts the prompt; without any limit generate adds 20 new tokens to it."""
    options = DecodeOptions(prompt=prompt, **options)
    theirs = tiny_reference.generate(pixel_values, options)
    for mine, (expected, *_) in zip(tiny_captioner.caption(pictures, options), theirs, strict=True):
        assert mine.ids == expected.ids


def test_captions_are_in_input_order_with_ids(pictures, tiny_captioner):
    captions = list(tiny_captioner.caption(pictures, DecodeOptions(num_beams=2), rows=6))
    assert [caption.id for caption in captions] == [str(i) for i in range(IMAGES)]


def test_identical_images_are_captioned_once(pictures, tiny_captioner, monkeypatch):
    """Copies next to each other, far apart and at the end get the captions of a run without copies."""
    options = DecodeOptions(num_beams=2)
    alone = {
        id(picture): caption.ids
        for picture, caption in zip(pictures, tiny_captioner.caption(pictures, options), strict=True)
    }
    encoded = []
    encode = tiny_captioner.backend.encode
    monkeypatch.setattr(tiny_captioner.backend, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    mixed = [pictures[0], pictures[0], *pictures[1:6], pictures[0], *pictures[6:], pictures[3], pictures[3]]
    captions = list(tiny_captioner.caption(mixed, options, rows=6))
    assert [caption.ids for caption in captions] == [alone[id(picture)] for picture in mixed]
    assert [caption.id for caption in captions] == [str(i) for i in range(len(mixed))]
    assert sum(encoded) == IMAGES


@pytest.fixture(scope="module")
def one_at_a_time(pictures, tiny_reference):
    """Captions of generate for each image alone, greedy and with four beams."""
    found = {}
    for num_beams in (1, 4):
        options = DecodeOptions(num_beams=num_beams, no_repeat_ngram_size=2, max_new_tokens=MAX_NEW_TOKENS)
        found[num_beams] = (
            options,
            [tiny_reference.generate(tiny_reference.pixels([picture]), options)[0][0].ids for picture in pictures],
        )
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=2 * IMAGES),
    num_slots=st.integers(1, IMAGES + 3),
    encode_batch=st.integers(1, 5),
    num_beams=st.sampled_from([1, 4]),
)
def test_batching_does_not_change_captions(
    arrivals, num_slots, encode_batch, num_beams, pictures, tiny_captioner, one_at_a_time
):
    """In any order, with any number of slots and any encoder batch, an image gets the ids that it gets alone."""
    options, expected = one_at_a_time[num_beams]
    spec = tiny_captioner.bundle.image
    pixels = np.stack([read_image(pictures[i], spec.height, spec.width, spec.resample) for i in arrivals])
    scheduler = Scheduler(
        tiny_captioner.backend, tiny_captioner.search(options), num_slots=num_slots, encode_batch=encode_batch
    )
    found = dict(scheduler.decode(pixels))
    assert [found[i][0].ids for i in range(len(arrivals))] == [expected[i] for i in arrivals]
