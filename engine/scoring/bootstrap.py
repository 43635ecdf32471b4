"""How sure a score, or the difference of two, is: the paired bootstrap over images, with a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scoring.base import Measured

RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class Difference:
    """The second run's value minus the first's, with its 95 % interval, and a two-sided p-value.

    `p` is the share of resamples in which the difference turns or vanishes, twice, one added above and below (Davison
    and Hinkley 1997). `wins`, `losses`, `ties` count images by the second run's own value.
    """

    difference: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    ties: int


def interval(measured: Measured, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of a score."""
    values = [measured.resampled(places) for places in _resamples(len(measured.per_image), resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(first: Measured, second: Measured, resamples: int = RESAMPLES) -> Difference:
    """Compare two runs on the same images in the same order."""
    differences = np.array(
        [second.resampled(places) - first.resampled(places) for places in _resamples(len(first.per_image), resamples)]
    )
    low, high = np.percentile(differences, [2.5, 97.5])
    turned = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    gain = second.per_image - first.per_image
    return Difference(
        difference=second.value - first.value,
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (turned + 1) / (resamples + 1)),
        wins=int((gain > 0).sum()),
        losses=int((gain < 0).sum()),
        ties=int((gain == 0).sum()),
    )


def _resamples(count: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(SEED)
    for _ in range(resamples):
        yield rng.integers(0, count, count)
