"""The search for settings on synthetic scores, and the division of ids into halves."""

from __future__ import annotations

import random
from itertools import product

import pytest

from engine.errors import DataError, UsageError
from train.sweep.tune import halve, search

GRIDS = {"a": [0, 1, 2, 3], "b": [0, 1, 2], "c": [0, 1]}
START = {"a": 2, "b": 9, "c": 0}
"""The start value of b is not in its grid."""


class Scores:
    """A score function that records the settings it is called with."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, settings):
        self.calls.append(dict(settings))
        return self.function(settings)


def test_search_finds_best_of_independent_settings():
    score = Scores(lambda s: -((s["a"] - 1) ** 2) - (s["b"] - 2) ** 2 + s["c"])
    found = search(score, START, GRIDS)
    assert found.best.settings == {"a": 1, "b": 2, "c": 1}
    assert found.best.score == max(score.function(dict(zip("abc", s, strict=True))) for s in product(*GRIDS.values()))
    assert found.settled
    assert [trial.settings for trial in found.trials] == score.calls
    assert score.calls[0] == START


def test_setting_is_tried_again_after_another_changed():
    table = {(0, 0): 1, (1, 0): 0, (0, 1): 2, (1, 1): 3}
    found = search(lambda s: table[s["a"], s["b"]], {"a": 0, "b": 0}, {"a": [0, 1], "b": [0, 1]})
    assert found.best.settings == {"a": 1, "b": 1}
    assert found.rounds == 3  # the first changes b, the second a, the third nothing


@pytest.mark.parametrize("seed", range(20))
def test_search_ends_in_local_optimum_without_repeats(seed):
    drawn = random.Random(seed)
    values = {key: drawn.randrange(6) for key in product(range(4), (0, 1, 2, 9), range(2))}
    score = Scores(lambda s: values[s["a"], s["b"], s["c"]])
    found = search(score, START, GRIDS, max_rounds=50)
    assert len({tuple(call.items()) for call in score.calls}) == len(score.calls)
    assert found.settled
    for name, grid in GRIDS.items():
        for value in grid:
            assert score.function({**found.best.settings, name: value}) <= found.best.score


def test_equal_scores_keep_the_earlier_setting():
    assert search(lambda _: 1.0, START, GRIDS).best.settings == START
    found = search(lambda s: float(s["a"] in (1, 3)), START, GRIDS)
    assert found.best.settings == {**START, "a": 1}


def test_settings_with_equal_effect_are_scored_once():
    score = Scores(lambda s: -s["a"])
    found = search(score, START, GRIDS, effect=lambda settings: settings["a"])
    assert [call["a"] for call in score.calls] == [2, 0, 1, 3]
    assert found.best.settings == {**START, "a": 0}


def test_search_stops_at_max_rounds():
    start, grids = {"a": 0, "b": 0}, dict.fromkeys("ab", range(3))
    found = search(lambda s: s["a"] + s["b"], start, grids, max_rounds=1)
    assert (found.rounds, found.settled) == (1, False)
    found = search(lambda s: -abs(s["a"] - s["b"]), start, grids, max_rounds=1)
    assert (found.rounds, found.settled) == (1, True)


IDS = [f"p{i // 3}_slice{i}" for i in range(30)]


def test_halves_are_equal_in_size_and_disjoint():
    for count in (4, 5, 30):
        tuning, held_back = halve(IDS[:count], 0)
        assert sorted(tuning + held_back) == sorted(IDS[:count])
        assert abs(len(tuning) - len(held_back)) <= 1


def test_halves_depend_on_seed_not_order():
    shuffled = random.Random(1).sample(IDS, len(IDS))
    first, second = halve(IDS, 0), halve(shuffled, 0)
    assert [set(half) for half in first] == [set(half) for half in second]
    assert second[0] == [name for name in shuffled if name in first[0]]
    assert set(halve(IDS, 1)[0]) != set(first[0])
    assert first[0] not in (IDS[:15], IDS[15:], IDS[::2], IDS[1::2])


@pytest.mark.parametrize("pattern", ["^[^_]+", r"^p(\d+)_"])
def test_ids_of_a_group_stay_together(pattern):
    tuning, held_back = halve(IDS, 0, pattern)
    of = [{name.split("_")[0] for name in half} for half in (tuning, held_back)]
    assert not of[0] & of[1]
    assert (len(tuning), len(held_back)) == (15, 15)


@pytest.mark.parametrize(
    ("ids", "group", "kind", "message"),
    [
        (IDS[:3], None, DataError, "3 images cannot be divided into two halves of at least 2: use more images"),
        (IDS[:3], "^p", DataError, "3 images in 1 group cannot be divided into two halves"),
        ([*IDS[:9], "x"], "^p.", DataError, "--tune-group ^p. matches nothing in 1 of 10 ids (x): it must match"),
        (IDS, "(", UsageError, "--tune-group ( is not a valid regular expression: "),
    ],
)
def test_impossible_halves_are_refused(ids, group, kind, message):
    with pytest.raises(kind) as caught:
        halve(ids, 0, group)
    assert message in str(caught.value)
