"""What a score means: how the run looks, what a caption that knows nothing reaches, and scores by group of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UsageError
from engine.inputs.columns import USUAL, Columns
from engine.inputs.delimited import read_columns
from engine.inputs.tables import Table
from engine.scoring.base import Items, Measured, MetricInputs
from engine.scoring.preprocess import preprocess
from engine.scoring.profiles import make_metric

LEAST_GROUP = 5
"""Images a group must have to be a line of the breakdown."""


def describe(items: Items) -> dict[str, Any]:
    """Return how a run looks beside its references: distinct captions, empty ones, lengths in words."""
    references = [reference for several in items.references for reference in several]
    return {
        "images": len(items),
        "empty_captions": sum(not caption.strip() for caption in items.candidates),
        "unique_ratio": round(len(set(items.candidates)) / len(items), 4),
        "unique_ratio_of_references": round(len(set(references)) / len(references), 4),
        "words": _lengths(items.candidates),
        "words_of_references": _lengths(references),
    }


def constant_caption(items: Items) -> str:
    """Return the caption that knows nothing: the most frequent words of the references, as many as their median
    length.
    """
    references = [preprocess(reference) for several in items.references for reference in several]
    words = Counter(word for reference in references for word in dict.fromkeys(reference.split()))
    length = max(1, int(np.median([len(reference.split()) for reference in references])))
    return " ".join(word for word, _ in words.most_common(length))


def baseline_scores(items: Items, names: Sequence[str]) -> dict[str, Any]:
    """Return the constant caption and what the metrics `names` give it."""
    caption = constant_caption(items)
    constant = Items(items.ids, [caption] * len(items), items.references)
    values = {name: round(make_metric(name, MetricInputs(), {}).measure(constant).value, 6) for name in names}
    return {"caption": caption, **values}


def _lengths(captions: Sequence[str]) -> dict[str, float]:
    lengths = np.array([len(caption.split()) for caption in captions])
    shares = dict(zip(("p5", "median", "p95"), np.percentile(lengths, [5, 50, 95]), strict=True))
    found = {"least": lengths.min(), **shares, "mean": lengths.mean(), "most": lengths.max()}
    return {name: round(float(value), 1) for name, value in found.items()}


def group_places(
    group_by: str | None, labels: Path | None, references: Table, items: Items, named: Columns = USUAL
) -> dict[str, list[int]]:
    """Return {value of the column: places of its images}; a cell may hold several values separated by `;`."""
    if group_by is None:
        return {}
    columns = read_columns(labels, named) if labels else references.columns
    where = labels or references.path
    if group_by not in columns:
        raise UsageError(f"{where} has no column {group_by!r} but {', '.join(sorted(columns)) or 'none'}")
    cells = columns[group_by]
    if not set(cells) & set(items.ids):
        raise UsageError(f"{where} labels none of the images: labels of another split?")
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(items.ids):
        for value in cells.get(name, "").split(";"):
            groups.setdefault(value.strip() or "(none)", []).append(place)
    return dict(sorted(groups.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def scores_by_group(groups: Mapping[str, Sequence[int]], measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return images and scores of every group of LEAST_GROUP images or more; the rest is counted."""
    shown: dict[str, Any] = {}
    for value, places in groups.items():
        if len(places) < LEAST_GROUP:
            continue
        at = np.array(places)
        shown[value] = {"images": len(places)} | {
            name: round(result.resampled(at), 6) for name, result in measured.items()
        }
    small = sum(len(places) < LEAST_GROUP for places in groups.values())
    return shown | ({"(smaller groups)": {"groups": small}} if small else {})
