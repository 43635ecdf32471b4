"""What a metric is: text in, numbers out, with a signature that says how they were made."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError


class UnavailableError(EngineError):
    """A metric cannot be computed here; the message says what it needs."""


@dataclass(frozen=True)
class Items:
    """N images in one order: id, caption of the run, and one or several references each. Texts are raw.

    `how` is part of every signature: what else decides the scores, for example `|prompt:removed`.
    """

    ids: Sequence[str]
    candidates: Sequence[str]
    references: Sequence[tuple[str, ...]]
    images: Sequence[Path] | None = None
    how: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def preprocessed(self) -> Items:
        """Return the same with every text as the organisers preprocess it."""
        references = [tuple(map(preprocess, several)) for several in self.references]
        return replace(self, candidates=[preprocess(text) for text in self.candidates], references=references)


@dataclass(frozen=True)
class Measured:
    """A metric's answer: per_image f64[N], and the value of the whole run.

    `value` is their mean, unless the metric is a corpus metric; then `counts` f64[N,C] add up to what its value is
    made of by `combine`. `note` says what a reader must know beside the number.
    """

    per_image: NDArray[np.float64]
    value: float
    note: str = ""
    counts: NDArray[np.float64] | None = None
    combine: Any = None

    def resampled(self, places: NDArray[np.int64]) -> float:
        """Return the value of the run whose images are those at `places` i64[N], repeats included."""
        if self.counts is not None and self.combine is not None:
            return float(self.combine(self.counts[places].sum(0)))
        return float(self.per_image[places].mean())


def mean(per_image: Sequence[float] | NDArray[np.float64], note: str = "") -> Measured:
    """Return the answer of a metric whose value is the mean over images."""
    values = np.asarray(per_image, np.float64)
    return Measured(values, float(values.mean()) if len(values) else 0.0, note)


@dataclass(frozen=True)
class MetricInputs:
    """What metrics may need: folders of weights by metric name, commands of plug-ins, torch device and batch size."""

    weights: dict[str, Path] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    batch_size: int = 64


class Metric(Protocol):
    """One metric. `signature` is known before anything is measured, except by plug-ins, which sign what they did."""

    name: str

    def signature(self) -> str:
        """Return `name:value` pairs joined by `|`: model, layer, idf, preprocessing, library version."""
        ...

    def measure(self, items: Items) -> Measured:
        """Score every image. Raises UnavailableError when something is missing."""
        ...


def library(package: str) -> str:
    """Return `package:version` of an installed package."""
    return f"{package}:{version(package)}"


def settle_empty(items: Items, per_image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply the organisers' rule for empty captions: 1 where caption and reference are both empty, as they were
    written, 0 where one of them is.
    """
    settled = per_image.copy()
    for i, (candidate, references) in enumerate(zip(items.candidates, items.references, strict=True)):
        if candidate and all(references):
            continue
        if not candidate and "" in references:
            settled[i] = 1.0
        elif not candidate:
            settled[i] = 0.0
    return settled


DIGITS = re.compile(r"\d+")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
SIGNATURE = "lower+number+punct"
"""How signatures name it."""


def preprocess(caption: str) -> str:
    """Lower the case, put "number" for every run of digits, delete ASCII punctuation (without a space in its place).

    White space and Unicode punctuation stay. Source: the organisers' evaluators of 2023 to 2026.
    """
    return DIGITS.sub("number", caption.lower()).translate(NO_PUNCTUATION)


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
