"""Which captions of a training set are near to the candidates of an image.

Captions of the nearest training pictures find a consensus in Devlin et al. 2015, "Exploring Nearest Neighbor Approaches
for Image Captioning"; here nearness is measured between captions, so that no picture is needed.
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

from engine.errors import DataError, UsageError
from engine.inputs.ids import join_some
from engine.inputs.readers import read_text
from engine.inputs.tables import Table
from engine.scoring.base import Items, Metric, MetricInputs, UnavailableError, preprocess
from engine.scoring.overlap import Rouge1
from engine.scoring.profiles import make_metric

POOL = 4
"""Captions that another utility than ROUGE-1 is computed with, for each that may vote: all of a training set would be
billions of pairs a run."""
WORD = re.compile(r"[a-z0-9]+")
"""A word, as ROUGE-1 has it."""


class SupportCaptions:
    """S distinct captions in the order of their file, to be searched by their words.

    A caption without a word, an empty one for example, is near to nothing and left out. Raises DataError where none is
    left.
    """

    def __init__(self, table: Table) -> None:
        ids_of: dict[str, set[str]] = {}
        for name, several in table.captions.items():
            for text in several:
                ids_of.setdefault(text, set()).add(name)
        words_of = {text: words for text in ids_of if (words := _words(text))}
        if not words_of:
            raise DataError(f"{table.path} holds no caption with a word of a to z or 0 to 9: nothing can be near")
        places: dict[tuple[str, int], list[int]] = {}
        self._own: dict[str, list[int]] = {}
        for place, (text, words) in enumerate(words_of.items()):
            for word in words:
                places.setdefault(word, []).append(place)
            if len(ids_of[text]) == 1:
                self._own.setdefault(next(iter(ids_of[text])), []).append(place)
        self._ids = table.ids
        self._texts = list(words_of)
        self._lengths = np.array([len(words) for words in words_of.values()], np.float64)
        self._places = {word: np.array(several, np.intp) for word, several in places.items()}

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
        """Return what may vote for each image that has several candidates.

        That is the `nearest` captions of the largest expected ROUGE-1 with the candidates, the earliest of equal ones;
        for another utility POOL times as many, among which it finds the `nearest`. Left out are captions that share no
        word with a candidate, and those that no picture but the image itself has, by its id. Raises UsageError for
        numbers that Support refuses.
        """
        support = Support({}, nearest, share)
        most = nearest if isinstance(utility, Rouge1) else POOL * nearest
        near = {
            name: self._find(name, several, weights_of(several, uniform=uniform), most)
            for name, several in candidates.items()
            if len(several) > 1 and share
        }
        return replace(support, near=near)

    def _find(self, name: str, candidates: Sequence[Candidate], weights: Sequence[float], most: int) -> list[str]:
        """Return the `most` captions of the largest expected ROUGE-1, in the order of the file."""
        expected = np.zeros(len(self._texts))
        for one, weight in zip(candidates, weights, strict=True):
            words = _words(one.text)
            found = [self._places[word] for word in words if word in self._places]
            if found:
                overlap = np.bincount(np.concatenate(found), minlength=len(expected))
                expected += weight * (2 * overlap / (len(words) + self._lengths))
        expected[self._own.get(self._ids.find(name) or "", [])] = 0.0
        places = np.flatnonzero(expected)
        if len(places) > most:
            least = np.partition(expected, -most)[-most]
            above, equal = np.flatnonzero(expected > least), np.flatnonzero(expected == least)
            places = np.sort(np.concatenate([above, equal[: most - len(above)]]))
        return [self._texts[place] for place in places]


def _words(text: str) -> list[tuple[str, int]]:
    """Return the words of a caption, each with how often it came before.

    As many of these as two captions share is their clipped overlap, which ROUGE-1 counts.
    """
    before: Counter[str] = Counter()
    words = []
    for word in WORD.findall(preprocess(text).lower()):
        words.append((word, before[word]))
        before[word] += 1
    return words


NO_UTILITIES = ("cider", "clipscore", "refclipscore")
CHUNK = 200
"""Images whose candidates are compared at once: a run's pairs would fill the memory."""


@dataclass(frozen=True)
class Candidate:
    """A caption an image might get, and its share of the probability of all candidates of the image, 0 to 1."""

    text: str
    share: float


@dataclass(frozen=True)
class Support:
    """Captions that vote beside the candidates and cannot be chosen: for each image the `nearest` of those in `near`,
    all alike, with `share` of the whole vote, 0 (off) up to, and without, 1. Raises UsageError for other numbers.
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
        """Return the gains of N candidates with the vote of an image's support.

        `gains` and `weights` are the sums over the candidates as references and what these were weighted with;
        `utilities` holds for each candidate its utility with each caption of `near`.
        """
        places = range(len(utilities[0]))
        expected = [sum(weight * row[i] for weight, row in zip(weights, utilities, strict=True)) for i in places]
        nearest = sorted(places, key=lambda i: -expected[i])[: self.nearest]
        votes = [sum(row[i] for i in nearest) / len(nearest) for row in utilities]
        total = sum(weights)
        return [(1 - self.share) * gain / total + self.share * vote for gain, vote in zip(gains, votes, strict=True)]


def read_n_best(files: Sequence[Path], shares_of_files: Sequence[float] = ()) -> dict[str, list[Candidate]]:
    """Read n-best files; each file's candidates of an image share 1 / number of files between them, or the file's part
    of the sum of `shares_of_files`, one number a file.

    Found ones share by their probability; drawn ones, which come as often as they are probable, each alike. Equal texts
    become one candidate. Raises UsageError for shares that are none, DataError naming file and line, or ids that are
    not in every file.
    """
    shares: dict[str, dict[str, float]] = {}
    first: set[str] = set()
    for file, parts in zip(files, _parts(shares_of_files or [1.0] * len(files), len(files)), strict=True):
        seen: set[str] = set()
        for number, line in enumerate(read_text(file, names=True).split("\n"), 1):
            if not line.strip():
                continue
            name, hypotheses, is_drawn = _parse(file, number, line)
            if name in seen:
                raise DataError(f"{file}, line {number}: {name} is there twice")
            seen.add(name)
            best = max(log_prob for _, log_prob in hypotheses)
            weights = [1.0 if is_drawn else math.exp(log_prob - best) for _, log_prob in hypotheses]
            mine = shares.setdefault(name, {})
            for (text, _), weight in zip(hypotheses, weights, strict=True):
                mine[text] = mine.get(text, 0.0) + weight / sum(weights) / parts
        first = first or seen
        if first != seen:
            others = sorted(first ^ seen)
            raise DataError(f"{file} and {files[0]} differ in {len(others)} ids: {join_some(others)}")
    if not shares:
        raise DataError(f"{files[0]} holds no candidates")
    return {name: [Candidate(text, share) for text, share in mine.items()] for name, mine in shares.items()}


def make_utility(name: str, setting: MetricInputs, options: Mapping[str, Any] | None = None) -> Metric:
    """Return the metric that two captions are compared with. Raises UsageError for one that cannot do that."""
    metric = make_metric(name, setting, dict(options or {}))
    if name in NO_UTILITIES:
        raise UsageError(f"{name} looks at the image or at the whole run: rerank compares two captions")
    return metric


def weights_of(candidates: Sequence[Candidate], *, uniform: bool) -> list[float]:
    """Return what each candidate of an image counts: its share, or 1."""
    return [1.0 if uniform else one.share for one in candidates]


def rerank_candidates(
    candidates: Mapping[str, Sequence[Candidate]],
    utility: str,
    setting: MetricInputs,
    *,
    uniform: bool = False,
    options: Mapping[str, Any] | None = None,
    support: Support | None = None,
) -> dict[str, str]:
    """Return for each image the candidate of the largest expected utility, the earliest of equal ones.

    The expectation is over the candidates as references, by their shares (all the same with `uniform`), and over the
    captions of `support` by its share. Raises UnavailableError or UsageError as the metric does.
    """
    metric = make_utility(utility, setting, options)
    near = support.near if support is not None and support.share else {}
    chosen = {name: several[0].text for name, several in candidates.items()}
    open_ = [name for name, several in candidates.items() if len(several) > 1]
    for start in range(0, len(open_), CHUNK):
        names = open_[start : start + CHUNK]
        references = {name: [*(one.text for one in candidates[name]), *near.get(name, ())] for name in names}
        pairs = [(one.text, other) for name in names for one in candidates[name] for other in references[name]]
        items = Items([str(i) for i in range(len(pairs))], [one for one, _ in pairs], [(other,) for _, other in pairs])
        try:
            values = iter(metric.measure(items).per_image)
        except UnavailableError as error:
            raise UnavailableError(f"{utility}: {error}") from error
        for name in names:
            several = candidates[name]
            weights = weights_of(several, uniform=uniform)
            rows = [list(islice(values, len(references[name]))) for _ in several]
            gains = [sum(weight * value for weight, value in zip(weights, row, strict=False)) for row in rows]
            if support is not None and near.get(name):
                gains = support.join(gains, weights, [row[len(several) :] for row in rows])
            chosen[name] = several[max(range(len(several)), key=gains.__getitem__)].text
    return chosen


def _parts(shares: Sequence[float], files: int) -> list[float]:
    """Return by what the candidates of each file are divided: the sum of all shares over the file's own."""
    listed = ", ".join(f"{share:g}" for share in shares)
    if len(shares) != files:
        raise UsageError(f"--share {listed}: {len(shares)} for {files} files of --n-best: give one a file, in order")
    if not all(share > 0 for share in shares) or not all(math.isfinite(sum(shares) / share) for share in shares):
        raise UsageError(f"--share {listed}: takes finite numbers above 0")
    return [sum(shares) / share for share in shares]


def _parse(file: Path, number: int, line: str) -> tuple[str, list[tuple[str, float]], bool]:
    try:
        entry = json.loads(line)
        found = [(str(one["text"]), float(one["sum_log_prob"])) for one in entry["hypotheses"]]
        name, is_drawn = str(entry["id"]), bool(entry.get("drawn"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}, line {number}: not a line of --n-best-out ({error!r})") from error
    if not found or not all(math.isfinite(log_prob) for _, log_prob in found):
        raise DataError(f"{file}, line {number}: no candidates, or one without a finite sum_log_prob")
    return name, found, is_drawn
