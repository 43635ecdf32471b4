"""Calibration: an isotonic map from how sure the model is of a caption to the score that the caption can expect.

`engine calibrate` fits it on captions with references, `engine caption --calibration` applies it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.captions import Caption, Confidence
from engine.errors import DataError, UsageError
from engine.files.atomic import write_atomically
from engine.inputs.readers import numbered_lines, read_text

FORMAT = 1
CONFIDENCES = tuple(field.name for field in fields(Confidence))
OF_SEVERAL = ("margin", "agreement")
"""Confidences that need several alternatives."""
DIGITS = 6
"""Decimals of an expected score, far below its uncertainty."""


@dataclass(frozen=True)
class Calibration:
    """A non-decreasing, piecewise linear map from a confidence to the expected score of a metric.

    confidence  which field of Confidence it starts from
    n_best      alternatives per image of the captions that it was fitted on, which agreement depends on
    metric      the metric, with its signature
    images      number of captions that it was fitted on
    knots       confidences in ascending order; beyond the first and the last the map is constant
    expected    the expected score at each knot
    """

    confidence: str
    n_best: int
    metric: str
    signature: str
    images: int
    knots: tuple[float, ...]
    expected: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a file that `write` wrote. Raises DataError if it is not one."""
        text = read_text(path)
        try:
            entry = json.loads(text)
            if entry.pop("calibration") != FORMAT:
                raise ValueError("of another version")
            found = cls(**{**entry, "knots": _numbers(entry["knots"]), "expected": _numbers(entry["expected"])})
            knots, expected = np.array(found.knots), np.array(found.expected)
            if found.confidence not in CONFIDENCES or not len(knots) == len(expected) > 0:
                raise ValueError("unknown confidence, or knots without values")
            if not np.isfinite([knots, expected]).all() or (np.diff(knots) <= 0).any() or (np.diff(expected) < 0).any():
                raise ValueError("not an increasing map")
            int(found.n_best)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is not a file of `engine calibrate` ({error}): fit it again") from error
        return found

    def write(self, path: Path) -> None:
        """Write the map as JSON. Raises OutputError."""
        write_atomically(path, json.dumps({"calibration": FORMAT, **asdict(self)}, indent=1) + "\n")

    def require(self, n_best: int) -> None:
        """Raise UsageError if captions with `n_best` alternatives do not have the confidence of this map."""
        if self.confidence == "agreement" and n_best != self.n_best:
            raise UsageError(
                f"--calibration was fitted on the agreement of {self.n_best} captions per image, not {n_best}: "
                f"set --n-best {self.n_best}, or fit it again"
            )
        if self.confidence in OF_SEVERAL and n_best < 2:
            raise UsageError(f"--calibration needs the {self.confidence} of several captions: set --n-best 2 or more")

    def expected_score(self, caption: Caption) -> float | None:
        """Return the score that a caption can expect; None if its confidence is unknown."""
        confidence = getattr(caption.confidence, self.confidence)
        return None if confidence is None else round(float(np.interp(confidence, self.knots, self.expected)), DIGITS)


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def isotonic(
    confidences: NDArray[np.float64], scores: NDArray[np.float64]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fit the non-decreasing map with the least squared error to N (confidence, score) pairs; return its knots.

    Pool adjacent violators (Ayer et al. 1955; Best and Chakravarti 1990): from left to right, a block whose mean is not
    above that of the block before it is merged with it. Equal confidences are one block from the start. A block has the
    same value at its first and last confidence, and the map is linear between blocks, as in scikit-learn.
    """
    values, inverse, counts = np.unique(confidences, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, scores) / counts
    blocks: list[tuple[float, int, float, float]] = []  # mean, weight, first and last confidence
    for value, mean, count in zip(values.tolist(), means.tolist(), counts.tolist(), strict=True):
        block = (mean, count, value, value)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            weight = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / weight, weight, before[2], block[3])
        blocks.append(block)
    knots = {x: mean for mean, _, first, last in blocks for x in (first, last)}
    return tuple(knots), tuple(knots.values())


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation of two f64[N], with mean ranks for ties; 0 if one of them is constant."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts + 1) / 2)[inverse])
    deviations = [rank - rank.mean() for rank in ranks]
    norm = np.sqrt(np.prod([deviation @ deviation for deviation in deviations]))
    return float(deviations[0] @ deviations[1] / norm) if norm else 0.0


VERDICTS = ("expected_score", "review", "mean_token_prob", "min_token_prob")


def read_verdicts(path: Path) -> dict[str, dict[str, str]]:
    """Return {name: {image id: text}} for the VERDICTS in a file of `engine caption --n-best-out` that are known.

    Lines without a confidence, from earlier versions, are skipped. The file must have been checked (read_n_best).
    """
    verdicts: dict[str, dict[str, str]] = {name: {} for name in VERDICTS}
    for _, line in numbered_lines(path):
        entry = json.loads(line)
        confidence = entry.get("confidence")
        for name, value in {**entry, **(confidence if isinstance(confidence, dict) else {})}.items():
            if name in verdicts and isinstance(value, bool | int | float):
                verdicts[name][str(entry["id"])] = ("no", "yes")[value] if isinstance(value, bool) else repr(value)
    return {name: cells for name, cells in verdicts.items() if cells}


@dataclass(frozen=True)
class KnownConfidences:
    """The confidences in a file of `engine caption --n-best-out`: {image id: {name: value}}, unknown ones left out.

    n_best  the largest number of alternatives of an image
    """

    by_id: Mapping[str, Mapping[str, float]]
    n_best: int

    @classmethod
    def read(cls, path: Path) -> KnownConfidences:
        """Raises DataError for a file without confidences."""
        by_id, n_best = {}, 0
        for number, line in numbered_lines(path):
            try:
                entry = json.loads(line)
                found = {name: float(value) for name, value in entry["confidence"].items() if value is not None}
                by_id[str(entry["id"])] = {name: value for name, value in found.items() if np.isfinite(value)}
                n_best = max(n_best, len(entry["hypotheses"]))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: no confidence ({error!r}): give a file of `engine caption --n-best-out` "
                    "of this version"
                ) from error
        return cls(by_id, n_best)

    def column(self, name: str, ids: Sequence[str]) -> NDArray[np.float64] | None:
        """Return one confidence of the images `ids` as f64[N], or None if an image lacks it."""
        values = [self.by_id[image_id].get(name) for image_id in ids]
        return None if None in values else np.array(values, np.float64)
