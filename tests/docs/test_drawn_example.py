"""Run the drawn example of "How it works" through the search that it explains."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.figures import ROOT
from engine.decoding.ancestry import Ancestry
from engine.decoding.beam import Beams, Search

WORDS = ["[DEC]", "a", "the", "dog", "cat", "sits", "runs", "fast", "there", "[SEP]"]
STEPS = [
    [("a", 0, -0.5), ("the", 0, -1.2), ("dog", 0, -2.9), ("cat", 0, -3.4)],
    [("dog", 0, -1.1), ("cat", 0, -1.3), ("dog", 1, -1.9), ("cat", 1, -2.6)],
    [("sits", 1, -1.7), ("[SEP]", 0, -1.8), ("runs", 0, -2.2), ("[SEP]", 1, -2.6)],
    [("[SEP]", 0, -1.9), ("fast", 1, -2.6), ("there", 0, -2.7), ("[SEP]", 1, -3.0)],
]
"""The best four candidates of each step: token, parent beam, sum of log-probabilities.

The last two candidates of the first step are not in the drawing.
"""
PASTS = [
    [[0], [0]],
    [[0, 2], [0, 2]],
    [[0, 2, 5], [0, 2, 4]],
]
"""Cache columns of both beams after steps 1 to 3, as drawn: 0 [DEC], 1 unused, 2 a, 3 the, 4 dog, 5 cat."""


def text(ids) -> str:
    """Return the words of token ids, separated by spaces."""
    return " ".join(WORDS[i] for i in ids)


def test_search_matches_the_drawing():
    search = Search(
        prompt=(0,),
        num_beams=2,
        max_length=20,
        min_length=0,
        length_penalty=1.0,
        early_stopping=False,
        no_repeat_ngram_size=0,
        num_return_sequences=2,
        eos=WORDS.index("[SEP]"),
        vocab_size=len(WORDS),
    )
    beams, ancestry = Beams(search, 1), Ancestry(1, 2)
    beams.start(np.array([0]))
    for number, step in enumerate(STEPS):
        fed = ancestry.feed(np.array([[[True, False], [False, number > 0]]]))
        tokens, parents, scores = ([entry[part] for entry in step] for part in range(3))
        ids = np.array([[WORDS.index(word) for word in tokens]])
        assert not beams.closed[0]
        rows = np.array([parents])
        chosen = beams.advance(np.array([scores], np.float32), rows, ids, np.array([True]))
        ancestry.choose(fed, rows[:, chosen[0]])
        if number < len(PASTS):
            assert [np.flatnonzero(mask).tolist() for mask in ancestry.mask[0]] == PASTS[number]
    running = [text(row[: beams.lengths[0]]) for row in beams.tokens[0]]
    assert running == ["[DEC] a dog runs fast", "[DEC] a cat sits there"]
    assert beams.closed[0]
    results = [(text(result.ids), round(result.score, 3)) for result in beams.results(0)]
    assert results == [("[DEC] a cat sits [SEP]", -0.475), ("[DEC] a dog [SEP]", -0.6)]
    columns = ancestry.compact(np.array([0]))
    assert not {1, 3} & set(columns[0].tolist())


@pytest.mark.parametrize("drawing", ["beams.svg", "ancestry.svg"])
def test_drawings_show_the_tokens(drawing):
    shown = re.findall(r">([^<>\n]+)</text>", (ROOT / "docs/assets" / drawing).read_text(encoding="utf-8"))
    drawn = STEPS[1:] if drawing == "beams.svg" else STEPS[:2]
    assert {word for step in drawn for word, *_ in step} <= set(shown)
    if drawing == "beams.svg":
        assert all(any(line.startswith(str(score)) for line in shown) for step in drawn for *_, score in step)
