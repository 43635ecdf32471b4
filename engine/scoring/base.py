"""What a metric is: text in, numbers out, with a signature that says how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.scoring.preprocess import preprocess


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
