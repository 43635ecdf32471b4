"""The interface of a metric, the preprocessing of captions, and bootstrap intervals and comparisons."""

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
    """Raised if a metric cannot be computed on this machine; the message names what is missing."""


@dataclass(frozen=True)
class Items:
    """The input of a metric: N images, each with an id, a candidate caption and one or more references.

    Texts are raw; metrics that need preprocessed text call `preprocessed`. `how` is appended to every signature and
    names what else the scores depend on, for example `|prompt:removed`.
    """

    ids: Sequence[str]
    candidates: Sequence[str]
    references: Sequence[tuple[str, ...]]
    images: Sequence[Path] | None = None
    how: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def preprocessed(self) -> Items:
        """Return a copy whose candidates and references are preprocessed as by the organisers."""
        references = [tuple(map(preprocess, texts)) for texts in self.references]
        return replace(self, candidates=[preprocess(text) for text in self.candidates], references=references)


@dataclass(frozen=True)
class Measured:
    """The result of a metric: `per_image` f64[N] and `value`, the score of the whole run.

    `value` is the mean of `per_image`, except for corpus metrics such as BLEU. Those also return `counts` f64[N,C], and
    their value is `combine(counts.sum(0))`. `note` holds what a reader must know to interpret the number.
    """

    per_image: NDArray[np.float64]
    value: float
    note: str = ""
    counts: NDArray[np.float64] | None = None
    combine: Any = None

    def resampled(self, indices: NDArray[np.int64]) -> float:
        """Return the value for the images at `indices` i64[N], which may repeat (a bootstrap sample)."""
        if self.counts is not None and self.combine is not None:
            return float(self.combine(self.counts[indices].sum(0)))
        return float(self.per_image[indices].mean())

    def part(self, indices: NDArray[np.int64]) -> Measured:
        """Return the result for the images at `indices` i64[M], with its value computed for them."""
        counts = None if self.counts is None else self.counts[indices]
        return replace(self, per_image=self.per_image[indices], counts=counts, value=self.resampled(indices))


def mean(per_image: Sequence[float] | NDArray[np.float64], note: str = "") -> Measured:
    """Return the result of a metric whose value is the mean over images."""
    values = np.asarray(per_image, np.float64)
    return Measured(values, float(values.mean()) if len(values) else 0.0, note)


@dataclass(frozen=True)
class MetricInputs:
    """What metrics need besides text: weights folders and plug-in commands by metric name, torch device, batch size."""

    weights: dict[str, Path] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    batch_size: int = 64


class Metric(Protocol):
    """A metric. `signature` can be called before `measure`, except that a plug-in returns its own only afterwards."""

    name: str

    def signature(self) -> str:
        """Return `name:value` pairs joined by `|`: model, layer, idf, preprocessing, library version."""
        ...

    def measure(self, items: Items) -> Measured:
        """Score every image. Raises UnavailableError if weights, images or a library are missing."""
        ...


def library(package: str) -> str:
    """Return `package:version` of an installed package."""
    return f"{package}:{version(package)}"


def settle_empty(items: Items, per_image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply the organisers' rule for empty captions and return the adjusted scores f64[N].

    An empty candidate scores 1 if one of its references is empty as well, else 0. The rule looks at the raw texts:
    "..." is not empty, although preprocessing leaves nothing of it. Non-empty candidates keep their score.
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
"""Name of the preprocessing in signatures."""


def preprocess(caption: str) -> str:
    """Lower-case a caption, replace every run of digits with "number" and delete ASCII punctuation.

    Punctuation is deleted without leaving a space; white space and Unicode punctuation stay. For example "T2-weighted,
    3.5 cm" becomes "tnumberweighted numbernumber cm". Source: the organisers' evaluators of 2023 to 2026.
    """
    return DIGITS.sub("number", caption.lower()).translate(NO_PUNCTUATION)


RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class Difference:
    """The second run's value minus the first's, with its 95 % interval and a two-sided p-value.

    `p` is 2 * (k + 1) / (resamples + 1), at most 1 (Davison and Hinkley 1997). k is the number of resamples with a
    difference <= 0 or with a difference >= 0, whichever is smaller. `wins`, `losses` and `ties` count the images on
    which the second run scores higher, lower or the same.
    """

    difference: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    ties: int


def interval(measured: Measured, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a score."""
    values = [measured.resampled(sample) for sample in _resamples(len(measured.per_image), resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(first: Measured, second: Measured, resamples: int = RESAMPLES) -> Difference:
    """Compare two runs by a paired bootstrap. Both must hold the same images in the same order (not checked)."""
    differences = np.array(
        [second.resampled(sample) - first.resampled(sample) for sample in _resamples(len(first.per_image), resamples)]
    )
    low, high = np.percentile(differences, [2.5, 97.5])
    opposite = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    gain = second.per_image - first.per_image
    return Difference(
        difference=second.value - first.value,
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (opposite + 1) / (resamples + 1)),
        wins=int((gain > 0).sum()),
        losses=int((gain < 0).sum()),
        ties=int((gain == 0).sum()),
    )


@dataclass(frozen=True)
class Curve:
    """The mean score of the surest captions, by the share of the images that they are (a risk-coverage curve).

    shares, values, low, high  f64[P]: shares of the images, the mean scores, and their 95 % bootstrap intervals
    """

    shares: NDArray[np.float64]
    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


SHARES = np.arange(1, 21) / 20
"""Points of a Curve: 5 %, 10 % and so on to all images."""


def coverage_curve(order: NDArray[np.int64], scores: NDArray[np.float64], resamples: int = RESAMPLES) -> Curve:
    """Return the curve of scores f64[N] of images that `order` i64[N] lists, the surest first.

    Each bootstrap sample keeps that order, and takes its own surest images.
    """
    ranked, ranks = scores[order], np.argsort(order)  # ranks: the same samples of images as in `interval`
    means = np.array([_top_means(ranked, ranks[sample]) for sample in _resamples(len(ranked), resamples)])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return Curve(SHARES, _top_means(ranked, np.arange(len(ranked))), low, high)


def _top_means(ranked: NDArray[np.float64], sample: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return f64[P], the mean score of the first images of a sample i64[N] for each of SHARES."""
    sums = np.cumsum(ranked[np.sort(sample)])
    counts = np.maximum(1, np.ceil(SHARES * len(ranked) - 1e-9)).astype(np.int64)  # 0.15 * 20 is above 3
    means: NDArray[np.float64] = sums[counts - 1] / counts
    return means


def _resamples(count: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(SEED)  # same samples in every call: this is what pairs two runs, and repeats a result
    for _ in range(resamples):
        yield rng.integers(0, count, count)
