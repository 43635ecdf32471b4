"""Scores of every image from files of --per-image, and how two runs differ by them; knows nothing of pages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError, UsageError
from engine.files.atomic import file_sha256
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import join_some
from engine.inputs.images import ImageFile, find_images_of
from engine.inputs.pixels import CLIP
from engine.inputs.readers import read_columns
from engine.inputs.tables import by_reference_id, read_table
from engine.scoring import base
from engine.scoring.base import Measured
from engine.scoring.files import read_per_image
from engine.scoring.rerank import Candidate, read_n_best


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
    found: base.Difference


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
        columns.append(ScoreColumn(name, how, run, places, part, *base.interval(part)))
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
        found = base.compare(second, first)
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


T = TypeVar("T")


@dataclass(frozen=True)
class ReportRequest:
    """What a report is to show, as it was asked for; `against` is the run to compare with."""

    run: Path
    images: Path
    out: Path
    references: Path | None = None
    scores: Path | None = None
    n_best: Path | None = None
    against: Path | None = None
    against_scores: Path | None = None
    columns: tuple[Path, ...] = ()
    signatures: tuple[str, ...] = ()
    recursive: bool = False
    dicom_frame: int = 0
    high_bit_depth: str = CLIP
    thumbnail_px: int = 320
    named: Columns = USUAL

    def files(self) -> dict[str, Path]:
        """Return the inputs that were given, images apart, by what they are."""
        given = {
            "run": self.run,
            "references": self.references,
            "scores": self.scores,
            "n-best": self.n_best,
            "other run": self.against,
            "scores of the other run": self.against_scores,
        }
        given |= {f"columns {i}": path for i, path in enumerate(self.columns, 1)}
        return {role: path for role, path in given.items() if path is not None}


@dataclass(frozen=True)
class InputFile:
    """An input as the page names it; `sha256` is None for a folder."""

    role: str
    name: str
    sha256: str | None


@dataclass(frozen=True)
class Column:
    """A further column of a table, N values as text (None where the table lacks the id) or as numbers."""

    name: str
    source: str
    values: list[str | None] | list[float | None]
    is_number: bool


@dataclass(frozen=True)
class Content:
    """N images in the order of the run with everything known about each; `notes` says which ids a file lacks.

    `captions` holds the run's captions, then the other run's, where there is one.
    """

    ids: list[str]
    images: list[ImageFile | None]
    labels: list[str]
    captions: list[list[str | None]]
    references: list[tuple[str, ...]] | None
    candidates: list[list[Candidate]] | None
    columns: list[Column]
    scores: list[ScoreColumn]
    comparisons: list[Comparison]
    sources: list[InputFile]
    notes: list[str] = field(default_factory=list)


def gather(request: ReportRequest) -> Content:
    """Read all inputs. Raises EngineError for a file that cannot be read or shares no id with the run."""
    notes: list[str] = []
    tables = {role: read_table(path, request.named) for role, path in request.files().items() if role in TABLES}
    references = tables.get("references")

    def by_id(found: Mapping[str, T], source: Path, files: Mapping[str, str] | None = None) -> dict[str, T]:
        return dict(found) if references is None else by_reference_id(references, found, source, files)

    captioned = tables["run"]
    said = by_id(captioned.single(), captioned.path, captioned.files)
    ids = list(said)
    captions: list[list[str | None]] = [list(said.values())]
    if "other run" in tables:
        against = tables["other run"]
        other = by_id(against.single(), against.path, against.files)
        notes += matched(request.run, ids, against.path, other)
        captions.append([other.get(name) for name in ids])
    if references is not None:
        notes += matched(request.run, ids, references.path, references.captions)
    candidates = None
    if request.n_best is not None:
        found = by_id(read_n_best([request.n_best]), request.n_best)
        notes += matched(request.run, ids, request.n_best, found)
        candidates = [found.get(name, []) for name in ids]
    if not request.images.is_dir():
        raise UsageError(f"{request.images} is not a directory: --images takes the folder that holds the images")
    images = find_images_of(
        ids,
        request.images,
        recursive=request.recursive,
        dicom_frame=request.dicom_frame,
        depth=request.high_bit_depth,
    )
    notes += matched(request.run, ids, request.images, images)
    scores: list[ScoreColumn] = []
    for run, path in enumerate((request.scores, request.against_scores)):
        if path is not None:
            measured, known = read_scores(path, ids, run)
            notes += matched(request.run, ids, path, known)
            scores += measured
    columns = []
    for role, table in tables.items():
        columns += further_columns(
            role, {name: by_id(cells, table.path, table.files) for name, cells in table.columns.items()}, ids
        )
    for label, path in zip(labels(list(request.columns)), request.columns, strict=True):
        cells = {name: by_id(values, path) for name, values in read_columns(path, request.named).items()}
        notes += matched(request.run, ids, path, next(iter(cells.values())))
        columns += further_columns(label, cells, ids)
    request.named.require_found()
    comparisons, remarks = compare_scores(scores)
    return Content(
        ids=ids,
        images=[images.get(name) for name in ids],
        labels=labels([path for path in (request.run, request.against) if path is not None]),
        captions=captions,
        references=None if references is None else [references.captions.get(name, ()) for name in ids],
        candidates=candidates,
        columns=columns,
        scores=scores,
        comparisons=comparisons,
        sources=[_source(role, path) for role, path in request.files().items()],
        notes=notes + remarks,
    )


TABLES = ("run", "other run", "references")
NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
EXACT = 2.0**53
"""Whole numbers below it are exact in float64, which is all that a browser counts with."""


def matched(run: Path, ids: Iterable[str], path: Path, found: Iterable[str]) -> list[str]:
    """Return a line each for the run's ids that `path` lacks, and for those only `path` has.

    Raises DataError when the two have no id in common.
    """
    wanted, there = dict.fromkeys(ids), dict.fromkeys(found)
    missing = [name for name in wanted if name not in there]
    extra = [name for name in there if name not in wanted]
    if len(missing) == len(wanted):
        first = f"{next(iter(wanted))} against {next(iter(there), 'none')}"
        raise DataError(f"{run} and {path} have no id in common ({first}): give files of the same images")
    lines = []
    if missing:
        lines.append(f"{path} lacks {len(missing)} of {len(wanted)} ids of {run}: {join_some(missing)}")
    if extra:
        lines.append(f"{path} has {len(extra)} ids that {run} has not, which are not shown: {join_some(extra)}")
    return lines


def labels(paths: list[Path]) -> list[str]:
    """Return short names of files: without extension, with as many folders in front as tell them apart."""
    names = [path.stem for path in paths]
    if len(set(names)) == len(names):
        return names
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def further_columns(source: str, table: Mapping[str, Mapping[str, str]], ids: list[str]) -> list[Column]:
    """Return the columns {name: {id: value}} of a table; one whose every value is a number is one of numbers."""
    columns = []
    for name, by_id in table.items():
        values = [by_id.get(image_id) for image_id in ids]
        numbers = [_number(value) for value in values if value]
        if numbers and None not in numbers:
            columns.append(Column(name, source, [_number(value) if value else None for value in values], True))
        elif any(values):
            columns.append(Column(name, source, values, False))
    return columns


def _number(value: str) -> float | None:
    """Return the number that a text is, None for one that would not come back: 00012, 1_000, a UID of twenty digits."""
    if not NUMBER.fullmatch(value.strip()):
        return None
    number = float(value)
    return number if math.isfinite(number) and (abs(number) < EXACT or not value.strip().isdecimal()) else None


def _source(role: str, path: Path) -> InputFile:
    return InputFile(role, path.name, file_sha256(path) if path.is_file() else None)
