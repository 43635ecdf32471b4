"""Scores of every image from files of --per-image, and how two runs differ by them; knows nothing of pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.scoring import bootstrap
from engine.scoring.base import Measured
from engine.scoring.files import read_per_image


@dataclass(frozen=True)
class ScoreColumn:
    """One metric of one run (0: the run, 1: the other), for the images of the report.

    `places` i64[M] are the places in the report of the M images that `measured` is of; `value`, `low` and `high` are
    theirs, not the whole file's. `how` tells metrics apart that were measured in another way or against other
    references.
    """

    name: str
    how: str
    run: int
    places: NDArray[np.int64]
    measured: Measured
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A metric's difference, run minus other run, over the `images` both have: see bootstrap.Difference."""

    name: str
    how: str
    images: int
    first: float
    second: float
    found: bootstrap.Difference


def read_scores(path: Path, ids: Sequence[str], run: int) -> tuple[list[ScoreColumn], list[str]]:
    """Return the metrics of a file of --per-image for `ids`, and the ids of the file. Raises EngineError."""
    known, measured = read_per_image(path)
    place_of = {name: place for place, name in enumerate(known)}
    places = np.array([i for i, name in enumerate(ids) if name in place_of], np.int64)
    if not len(places):
        return [], known
    rows = np.array([place_of[ids[i]] for i in places], np.int64)
    columns = []
    for name_and_how, whole in measured.items():
        name, _, how = name_and_how.partition("@")
        part = _subset(whole, rows)
        columns.append(ScoreColumn(name, how, run, places, part, *bootstrap.interval(part)))
    return columns, known


def compare_scores(scores: Sequence[ScoreColumn]) -> tuple[list[Comparison], list[str]]:
    """Compare the metrics both runs have, measured in one way; the lines say what could not be compared."""
    ours, theirs = ({(one.name, one.how): one for one in scores if one.run == run} for run in (0, 1))
    if not ours or not theirs:
        return [], []
    comparisons, apart = [], {name for name, _ in ours} & {name for name, _ in theirs}
    for key, one in ours.items():
        other = theirs.get(key)
        if other is None:
            continue
        apart.discard(one.name)
        _, mine, his = np.intersect1d(one.places, other.places, return_indices=True)
        if not len(mine):
            continue
        first, second = _subset(one.measured, mine), _subset(other.measured, his)
        found = bootstrap.compare(second, first)
        comparisons.append(Comparison(one.name, one.how, len(mine), first.value, second.value, found))
    notes = []
    if apart:
        notes.append(
            f"{', '.join(sorted(apart))}: not compared, measured in another way or against other references in the two "
            "files of scores"
        )
    return comparisons, notes


def _subset(whole: Measured, rows: NDArray[np.int64]) -> Measured:
    """Return what was measured of some images, with the value of these."""
    counts = None if whole.counts is None else whole.counts[rows]
    return replace(whole, per_image=whole.per_image[rows], counts=counts, value=whole.resampled(rows))
