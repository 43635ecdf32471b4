"""Consensus of candidates: minimum Bayes risk over n-best lists (Kumar and Byrne 2004)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import DataError, UsageError
from engine.inputs.delimited import read_text
from engine.inputs.ids import join_some
from engine.scoring.base import Items, MetricInputs, UnavailableError
from engine.scoring.profiles import make_metric

NO_UTILITIES = ("cider", "clipscore", "refclipscore")
CHUNK = 200
"""Images whose candidates are compared at once: a run's pairs would fill the memory."""


@dataclass(frozen=True)
class Candidate:
    """A caption an image might get, and its share of the probability of all candidates of the image, 0 to 1."""

    text: str
    share: float


def read_n_best(files: Sequence[Path]) -> dict[str, list[Candidate]]:
    """Read n-best files; each file's candidates of an image share 1 / number of files between them.

    Found ones share by their probability; drawn ones, which come as often as they are probable, each alike. Equal texts
    become one candidate. Raises DataError naming file and line, or ids that are not in every file.
    """
    shares: dict[str, dict[str, float]] = {}
    first: set[str] = set()
    for file in files:
        seen: set[str] = set()
        for number, line in enumerate(read_text(file).split("\n"), 1):
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
                mine[text] = mine.get(text, 0.0) + weight / sum(weights) / len(files)
        first = first or seen
        if first != seen:
            others = sorted(first ^ seen)
            raise DataError(f"{file} and {files[0]} differ in {len(others)} ids: {join_some(others)}")
    if not shares:
        raise DataError(f"{files[0]} holds no candidates")
    return {name: [Candidate(text, share) for text, share in mine.items()] for name, mine in shares.items()}


def rerank_candidates(
    candidates: Mapping[str, Sequence[Candidate]],
    utility: str,
    setting: MetricInputs,
    *,
    uniform: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return for each image the candidate of the largest expected utility, the earliest of equal ones.

    The expectation is over the candidates as references, by their shares (all the same with `uniform`). Raises
    UnavailableError or UsageError as the metric does.
    """
    metric = make_metric(utility, setting, dict(options or {}))
    if utility in NO_UTILITIES:
        raise UsageError(f"{utility} looks at the image or at the whole run: rerank compares two captions")
    chosen = {name: several[0].text for name, several in candidates.items()}
    open_ = [name for name, several in candidates.items() if len(several) > 1]
    for start in range(0, len(open_), CHUNK):
        names = open_[start : start + CHUNK]
        pairs = [(one.text, other.text) for name in names for one in candidates[name] for other in candidates[name]]
        items = Items([str(i) for i in range(len(pairs))], [one for one, _ in pairs], [(other,) for _, other in pairs])
        try:
            values = iter(metric.measure(items).per_image)
        except UnavailableError as error:
            raise UnavailableError(f"{utility}: {error}") from error
        for name in names:
            several = candidates[name]
            weights = [1.0 if uniform else one.share for one in several]
            gains = [sum(weight * next(values) for weight in weights) for _ in several]
            chosen[name] = several[max(range(len(several)), key=gains.__getitem__)].text
    return chosen


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
