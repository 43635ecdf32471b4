"""Rerank candidate captions by minimum Bayes risk, optionally with the nearest training captions as support.

Each candidate is scored with the other candidates, and with support captions, as references. The candidate with the
highest expected score is chosen. Devlin et al. 2015, "Exploring Nearest Neighbor Approaches for Image Captioning", find
a consensus among the captions of the nearest training images. Here nearness is measured between captions, so that no
images are needed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError, UsageError, counted
from engine.inputs.ids import join_some
from engine.inputs.readers import numbered_lines
from engine.inputs.tables import SURROGATE, Table
from engine.scoring.base import Items, Metric, MetricInputs, UnavailableError, preprocess
from engine.scoring.overlap import Rouge1
from engine.scoring.profiles import make_metric

POOL = 4
"""Captions that ROUGE-1 preselects for each one that votes, if the utility is not ROUGE-1 itself. Computing the utility
on the whole training set would take billions of pairs per run."""
WORD = re.compile(r"[a-z0-9]+")
"""A word, as rouge-score tokenizes."""


class SupportCaptions:
    """An inverted index of the distinct captions of a table, in the order of the file.

    Captions without a word, for example empty ones, are skipped. Raises DataError if no caption remains.
    """

    def __init__(self, table: Table) -> None:
        ids_of: dict[str, set[str]] = {}
        for name, texts in table.captions.items():
            for text in texts:
                ids_of.setdefault(text, set()).add(name)
        words_of = {text: words for text in ids_of if (words := _words(text))}
        if not words_of:
            raise DataError(f"{table.path} holds no caption with a word of a to z or 0 to 9: give other captions")
        postings: dict[tuple[str, int], list[int]] = {}  # word -> indices of the captions that contain it
        self._own: dict[str, list[int]] = {}  # image id -> indices of the captions that only this image has
        for index, (text, words) in enumerate(words_of.items()):
            for word in words:
                postings.setdefault(word, []).append(index)
            if len(ids_of[text]) == 1:
                self._own.setdefault(next(iter(ids_of[text])), []).append(index)
        self._ids = table.ids
        self._texts = list(words_of)
        self._lengths = np.array([len(words) for words in words_of.values()], np.float64)
        self._postings = {word: np.array(indices, np.intp) for word, indices in postings.items()}

    def __len__(self) -> int:
        return len(self._texts)

    def near(
        self,
        candidates: Mapping[str, Sequence[Candidate]],
        utility: Metric,
        *,
        nearest: int,
        share: float,
        uniform: bool = False,
    ) -> Support:
        """Return the captions that may vote for each image with two or more candidates.

        These are the `nearest` captions with the highest expected ROUGE-1 against the candidates; ties go to the
        earlier caption. For any other utility they are POOL times as many, from which Support.join takes the `nearest`.
        Captions that share no word with a candidate are excluded, and so are captions that only the image itself has
        (by its id), which would give the answer away. Raises UsageError for an invalid `nearest` or `share`.
        """
        support = Support({}, nearest, share)
        limit = nearest if isinstance(utility, Rouge1) else POOL * nearest
        near = {
            name: self._find(name, texts, weights_of(texts, uniform=uniform), limit)
            for name, texts in candidates.items()
            if len(texts) > 1 and share
        }
        return replace(support, near=near)

    def _find(self, name: str, candidates: Sequence[Candidate], weights: Sequence[float], limit: int) -> list[str]:
        """Return the `limit` captions with the highest expected ROUGE-1, in the order of the file."""
        expected = np.zeros(len(self._texts))
        for candidate, weight in zip(candidates, weights, strict=True):
            words = _words(candidate.text)
            hits = [self._postings[word] for word in words if word in self._postings]
            if hits:
                overlap = np.bincount(np.concatenate(hits), minlength=len(expected))
                # ROUGE-1 F of all captions at once: 2 * overlap / (length of the candidate + length of the caption)
                expected += weight * (2 * overlap / (len(words) + self._lengths))
        expected[self._own.get(self._ids.find(name) or "", [])] = 0.0
        indices = np.flatnonzero(expected)
        if len(indices) > limit:
            # argpartition would break ties arbitrarily: the earlier caption must win
            least = np.partition(expected, -limit)[-limit]
            above, equal = np.flatnonzero(expected > least), np.flatnonzero(expected == least)
            indices = np.sort(np.concatenate([above, equal[: limit - len(above)]]))
        return [self._texts[index] for index in indices]


def _words(text: str) -> list[tuple[str, int]]:
    """Return the words of a caption, each with the number of its earlier occurrences.

    "a cat a" gives ("a", 0), ("cat", 0), ("a", 1). The number of pairs that two captions share is their clipped
    overlap, as ROUGE-1 counts it.
    """
    seen: Counter[str] = Counter()
    words = []
    for word in WORD.findall(preprocess(text).lower()):
        words.append((word, seen[word]))
        seen[word] += 1
    return words


NO_UTILITIES = ("cider", "clipscore", "refclipscore")
"""Metrics that need the image or the whole run, so that they cannot compare two captions."""
CHUNK = 200
"""Images whose pairs of captions are scored at once; the pairs of a whole run would fill the memory."""


@dataclass(frozen=True)
class Candidate:
    """A candidate caption and its share of the probability of all candidates of the image, 0 to 1."""

    text: str
    share: float


@dataclass(frozen=True)
class Support:
    """Captions that vote in addition to the candidates but cannot be chosen.

    `near` maps an image id to its captions. The `nearest` of them vote with equal weights, and `share` is their weight
    in the whole vote, from 0 (off) to below 1. Raises UsageError for an invalid `nearest` or `share`.
    """

    near: Mapping[str, Sequence[str]]
    nearest: int
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"--support-share {self.share:g}: takes a number from 0 to below 1")
        if self.nearest < 1:
            raise UsageError(f"--nearest {self.nearest}: takes a whole number of at least 1")

    def join(
        self, gains: Sequence[float], weights: Sequence[float], utilities: Sequence[Sequence[float]]
    ) -> list[float]:
        """Return the expected utilities of N candidates with the vote of the support captions.

        Args:
            gains: for each candidate, the weighted sum of its utilities with the candidates as references.
            weights: the weights of the candidates in those sums.
            utilities: for each candidate, its utility with each caption of `near`.
        """
        indices = range(len(utilities[0]))
        expected = [sum(weight * row[i] for weight, row in zip(weights, utilities, strict=True)) for i in indices]
        nearest = sorted(indices, key=lambda i: -expected[i])[: self.nearest]
        votes = [sum(row[i] for i in nearest) / len(nearest) for row in utilities]
        total = sum(weights)
        return [(1 - self.share) * gain / total + self.share * vote for gain, vote in zip(gains, votes, strict=True)]


def read_n_best(files: Sequence[Path], shares_of_files: Sequence[float] = ()) -> dict[str, list[Candidate]]:
    """Read n-best files and return the candidates of each image with their shares, which add up to 1.

    Each file gets an equal part of the shares, or a part proportional to its entry in `shares_of_files`. Within a file,
    candidates from beam search are weighted by their probability. Sampled candidates have equal weights, because a
    likely caption is sampled more often. Equal texts are merged into one candidate.

    Raises UsageError for invalid shares, and DataError with file and line for an invalid line, or if the files do not
    have the same ids.
    """
    shares: dict[str, dict[str, float]] = {}
    first: set[str] = set()
    for file, parts in zip(files, _parts(shares_of_files or [1.0] * len(files), len(files)), strict=True):
        seen: set[str] = set()
        for number, line in numbered_lines(file):
            name, hypotheses, is_drawn = _parse(file, number, line)
            if name in seen:
                raise DataError(f"{file}, line {number}: {name} occurs twice")
            seen.add(name)
            best = max(log_prob for _, log_prob in hypotheses)
            weights = [1.0 if is_drawn else math.exp(log_prob - best) for _, log_prob in hypotheses]
            shares_of = shares.setdefault(name, {})
            for (text, _), weight in zip(hypotheses, weights, strict=True):
                shares_of[text] = shares_of.get(text, 0.0) + weight / sum(weights) / parts
        first = first or seen
        if first != seen:
            differing = sorted(first ^ seen)
            raise DataError(f"{file} and {files[0]} differ in {counted(len(differing), 'id')}: {join_some(differing)}")
    if not shares:
        raise DataError(f"{files[0]} holds no candidates")
    return {name: [Candidate(text, share) for text, share in texts.items()] for name, texts in shares.items()}


def make_utility(name: str, setting: MetricInputs, options: Mapping[str, Any] | None = None) -> Metric:
    """Return the metric that compares two captions. Raises UsageError if it needs more than two captions."""
    metric = make_metric(name, setting, dict(options or {}))
    if name in NO_UTILITIES:
        raise UsageError(
            f"--utility {name} needs the image or the whole run: choose a metric that compares two captions"
        )
    return metric


def weights_of(candidates: Sequence[Candidate], *, uniform: bool) -> list[float]:
    """Return the weight of each candidate: its share, or 1 if `uniform`."""
    return [1.0 if uniform else candidate.share for candidate in candidates]


def rerank_candidates(
    candidates: Mapping[str, Sequence[Candidate]],
    utility: str,
    setting: MetricInputs,
    *,
    uniform: bool = False,
    options: Mapping[str, Any] | None = None,
    support: Support | None = None,
) -> dict[str, str]:
    """Return for each image the candidate with the highest expected utility; ties go to the earlier candidate.

    The expectation is over the candidates as references, weighted by their shares (equally if `uniform`), and over the
    captions of `support`, weighted by its share. Raises the metric's UnavailableError or UsageError.
    """
    metric = make_utility(utility, setting, options)
    near = support.near if support is not None and support.share else {}
    chosen = {name: texts[0].text for name, texts in candidates.items()}
    undecided = [name for name, texts in candidates.items() if len(texts) > 1]
    for start in range(0, len(undecided), CHUNK):
        names = undecided[start : start + CHUNK]
        references = {name: [*(c.text for c in candidates[name]), *near.get(name, ())] for name in names}
        pairs = [(c.text, reference) for name in names for c in candidates[name] for reference in references[name]]
        items = Items([str(i) for i in range(len(pairs))], [text for text, _ in pairs], [(ref,) for _, ref in pairs])
        try:
            values = iter(metric.measure(items).per_image)
        except UnavailableError as error:
            raise UnavailableError(f"{utility}: {error}") from error
        for name in names:
            texts = candidates[name]
            weights = weights_of(texts, uniform=uniform)
            rows = [list(islice(values, len(references[name]))) for _ in texts]
            # not strict: a row also holds the support captions, after the candidates
            gains = [sum(weight * value for weight, value in zip(weights, row, strict=False)) for row in rows]
            if support is not None and near.get(name):
                gains = support.join(gains, weights, [row[len(texts) :] for row in rows])
            chosen[name] = texts[max(range(len(texts)), key=gains.__getitem__)].text
    return chosen


def _parts(shares: Sequence[float], files: int) -> list[float]:
    """Return the divisor for the shares of each file: the sum of all shares divided by the share of the file."""
    listed = ", ".join(f"{share:g}" for share in shares)
    if len(shares) != files:
        raise UsageError(
            f"--share {listed}: {len(shares)} for {counted(files, 'file')} of --n-best: give one per file, in order"
        )
    if not all(share > 0 for share in shares) or not all(math.isfinite(sum(shares) / share) for share in shares):
        raise UsageError(f"--share {listed}: takes finite numbers above 0")
    return [sum(shares) / share for share in shares]


def _parse(file: Path, number: int, line: str) -> tuple[str, list[tuple[str, float]], bool]:
    try:
        entry = json.loads(line)
        hypotheses = [(str(item["text"]), float(item["sum_log_prob"])) for item in entry["hypotheses"]]
        name, is_drawn = str(entry["id"]), bool(entry.get("drawn"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}, line {number}: not a line of --n-best-out ({error!r})") from error
    if any(SURROGATE.search(text) for text, _ in hypotheses):
        raise DataError(f"{file}, line {number}: a caption with half a character (a lone surrogate)")
    if not hypotheses or not all(math.isfinite(log_prob) for _, log_prob in hypotheses):
        raise DataError(f"{file}, line {number}: no candidates, or one without a finite sum_log_prob")
    return name, hypotheses, is_drawn
