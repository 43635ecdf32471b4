"""A coordinate search: one setting after the other, over small grids. Knows nothing of captions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_ROUNDS = 5
"""Small grids settle after two or three."""


@dataclass(frozen=True)
class Trial:
    """Settings by name, and their score: the higher, the better."""

    settings: dict[str, Any]
    score: float


@dataclass(frozen=True)
class Found:
    """How a search went: every trial in its order, the start first, and the best, of equal ones the earliest.

    `settled` says that the last of the `rounds` changed nothing; else they were used up.
    """

    trials: list[Trial]
    best: Trial
    rounds: int
    settled: bool


def all_of(settings: Mapping[str, Any]) -> Hashable:
    """Return what tells settings apart where each of them counts."""
    return tuple(sorted(settings.items()))


def search(
    score: Callable[[dict[str, Any]], float],
    start: Mapping[str, Any],
    grids: Mapping[str, Sequence[Any]],
    effect: Callable[[Mapping[str, Any]], Hashable] = all_of,
    most_rounds: int = MOST_ROUNDS,
) -> Found:
    """Search from `start` for the settings with the highest score: each setting of `grids` in turn takes the best of
    its values while the others stay, round after round, until a round changes nothing.

    `score` is asked once for settings with one `effect`. Only a higher score changes a setting.
    """
    trials: dict[Hashable, Trial] = {}

    def tried(settings: dict[str, Any]) -> Trial:
        key = effect(settings)
        if key not in trials:
            trials[key] = Trial(settings, score(settings))
        return trials[key]

    best, rounds, settled = tried(dict(start)), 0, False
    while not settled and rounds < most_rounds:
        rounds, before = rounds + 1, best
        for name, values in grids.items():
            for trial in [tried({**best.settings, name: value}) for value in values]:
                if trial.score > best.score:
                    best = trial
        settled = best is before
    return Found(list(trials.values()), best, rounds, settled)
