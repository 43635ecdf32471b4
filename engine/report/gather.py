"""Read all inputs of a report, align them with the ids of the run, and compare two runs by their scores."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.attention import attention_path
from engine.calibration import read_verdicts
from engine.captions import changed_words
from engine.errors import DataError, UsageError, counted
from engine.files.atomic import file_sha256
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import join_some
from engine.inputs.images import FindOptions, ImageFile, find_images_of
from engine.inputs.tables import Table, by_reference_id, own_by_reference_id, read_columns, read_table
from engine.options import CLIP
from engine.scoring import base
from engine.scoring.base import Measured
from engine.scoring.files import read_per_image
from engine.scoring.rerank import Candidate, read_n_best


@dataclass(frozen=True)
class ScoreColumn:
    """The scores of one metric for one run (`run` is 0 for the run, 1 for the other run).

    `measured` covers M images of the report, and `indices` i64[M] are their positions in it. The value and its interval
    `low`, `high` are for these images, not for the whole file. `how` differs if the signature or the references do.
    """

    name: str
    how: str
    run: int
    indices: NDArray[np.int64]
    measured: Measured
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The difference of a metric, run minus other run, over the `images` that both have (see base.Difference)."""

    name: str
    how: str
    images: int
    first: float
    second: float
    found: base.Difference


def read_scores(path: Path, ids: Sequence[str], run: int) -> tuple[list[ScoreColumn], list[str]]:
    """Return the metrics of a --per-image file for `ids`, and the ids of the file. Raises EngineError."""
    file_ids, measured = read_per_image(path)
    row_of = {name: row for row, name in enumerate(file_ids)}
    indices = np.array([i for i, name in enumerate(ids) if name in row_of], np.int64)
    if not len(indices):
        return [], file_ids
    rows = np.array([row_of[ids[i]] for i in indices], np.int64)
    columns = []
    for name_and_how, scores in measured.items():
        name, _, how = name_and_how.partition("@")
        part = scores.part(rows)
        columns.append(ScoreColumn(name, how, run, indices, part, *base.interval(part)))
    return columns, file_ids


def compare_scores(scores: Sequence[ScoreColumn]) -> tuple[list[Comparison], list[str]]:
    """Compare the metrics that both runs have with the same `how`; also return notes on those that differ in it."""
    ours, theirs = ({(column.name, column.how): column for column in scores if column.run == run} for run in (0, 1))
    if not ours or not theirs:
        return [], []
    comparisons, differing = [], {name for name, _ in ours} & {name for name, _ in theirs}
    for key, our_column in ours.items():
        their_column = theirs.get(key)
        if their_column is None:
            continue
        differing.discard(our_column.name)
        _, our_rows, their_rows = np.intersect1d(our_column.indices, their_column.indices, return_indices=True)
        if not len(our_rows):
            continue
        first, second = our_column.measured.part(our_rows), their_column.measured.part(their_rows)
        difference = base.compare(second, first)
        comparisons.append(Comparison(*key, len(our_rows), first.value, second.value, difference))
    notes = []
    if differing:
        notes.append(
            f"{', '.join(sorted(differing))}: not compared, because the two files of scores differ in the signature or "
            "the references"
        )
    return comparisons, notes


SUREST = ("expected_score", "mean_token_prob")
"""What orders captions by confidence: the second where the first is missing or equal."""


def coverage_curves(scores: Sequence[ScoreColumn], columns: Sequence[Column]) -> list[tuple[ScoreColumn, base.Curve]]:
    """Return the risk-coverage curve of each metric of the run that is a mean over images.

    Images whose confidence is unknown count as the least sure ones.
    """
    known = [column for name in SUREST for column in columns if (column.source, column.name) == (N_BEST, name)]
    if not known:
        return []
    keys = [np.array([-math.inf if value is None else value for value in column.values], float) for column in known]
    curves = []
    for column in (column for column in scores if column.run == 0 and column.measured.counts is None):
        order = np.lexsort([-key[column.indices] for key in reversed(keys)])  # its last key comes first
        curves.append((column, base.coverage_curve(order, column.measured.per_image)))
    return curves


T = TypeVar("T")


@dataclass(frozen=True)
class ReportRequest:
    """The options of `engine report`; `against` is the run to compare with."""

    run: Path
    images: Path
    out: Path
    references: Path | None = None
    scores: Path | None = None
    n_best: Path | None = None
    attention: Path | None = None
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
        """Return {role: path} of the input files that were given, without the images."""
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
    """An input file as the page lists it; `sha256` is None for a folder."""

    role: str
    name: str
    sha256: str | None


@dataclass(frozen=True)
class Column:
    """An additional column of a table: N values, all text or all numbers, and None for an id that the table lacks."""

    name: str
    source: str
    values: list[str | None] | list[float | None]
    is_number: bool


@dataclass(frozen=True)
class Content:
    """The content of a page: N images in the order of the run, with all data of each image.

    `captions` holds the captions of the run and, if there is one, of the other run. `curves` has the risk-coverage
    curves. `attention` has the files of --attention, None for an image without one. `notes` lists the ids that a file
    lacks.
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
    curves: list[tuple[ScoreColumn, base.Curve]]
    attention: list[Path | None] | None
    sources: list[InputFile]
    notes: list[str] = field(default_factory=list)


def _attention_of(folder: Path, name: str, run: Table) -> Path | None:
    """Return the file of an image's attention, which is named after the id or, with `--ids file`, the file name."""
    path = attention_path(folder, name)
    if not path.is_file() and name in run.files and not PurePath(run.files[name]).is_absolute():
        path = attention_path(folder, run.files[name])
    return path if path.is_file() else None


def gather(request: ReportRequest) -> Content:
    """Read all inputs. Raises EngineError if a file cannot be read or shares no id with the run."""
    notes: list[str] = []
    tables = {role: read_table(path, request.named) for role, path in request.files().items() if role in TABLES}
    run_table, references = tables["run"], tables.get("references")
    known = run_table if references is None else references

    def by_id(values: Mapping[str, T], source: Path, files: Mapping[str, str] | None = None) -> dict[str, T]:
        return by_reference_id(known, values, source, files)

    run_captions = own_by_reference_id(known, run_table)
    ids = list(run_captions)
    captions: list[list[str | None]] = [list(run_captions.values())]
    if "other run" in tables:
        against = tables["other run"]
        other = own_by_reference_id(known, against)
        notes += matched(request.run, ids, against.path, other)
        captions.append([other.get(name) for name in ids])
    if references is not None:
        notes += matched(request.run, ids, references.path, references.captions)
    candidates = None
    columns = []
    if request.n_best is not None:
        n_best = by_id(read_n_best([request.n_best]), request.n_best)
        notes += matched(request.run, ids, request.n_best, n_best)
        candidates = [n_best.get(name, []) for name in ids]
        verdicts = {name: by_id(cells, request.n_best) for name, cells in read_verdicts(request.n_best).items()}
        columns += further_columns(N_BEST, verdicts, ids)
    attention = None
    if request.attention is not None:
        paths = {name: _attention_of(request.attention, name, run_table) for name in run_table.captions}
        files = {name: path for name, path in paths.items() if path is not None}
        found = by_id(files, run_table.path, run_table.files)
        notes += matched(request.run, ids, request.attention, found)
        attention = [found.get(name) for name in ids]
    if not request.images.is_dir():
        raise UsageError(f"{request.images} is not a directory: --images takes the folder that holds the images")
    options = FindOptions(request.recursive, request.dicom_frame, depth=request.high_bit_depth)
    images = find_images_of(ids, request.images, options)
    notes += matched(request.run, ids, request.images, images)
    scores: list[ScoreColumn] = []
    for run, path in enumerate((request.scores, request.against_scores)):
        if path is not None:
            measured, file_ids = read_scores(path, ids, run)
            notes += matched(request.run, ids, path, file_ids)
            scores += measured
    for role, table in tables.items():
        columns += further_columns(
            role, {name: by_id(cells, table.path, table.files) for name, cells in table.columns.items()}, ids
        )
    for label, path in zip(labels(list(request.columns)), request.columns, strict=True):
        cells = {name: by_id(values, path) for name, values in read_columns(path, request.named).items()}
        notes += matched(request.run, ids, path, next(iter(cells.values())))
        columns += further_columns(label, cells, ids)
    if len(captions) == 2:
        both = zip(*captions, strict=True)
        changes = [None if None in (a, b) else round(changed_words(a, b), 4) for a, b in both]
        columns.append(Column(CHANGE, "both runs", changes, True))
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
        attention=attention,
        curves=coverage_curves(scores, columns),
        sources=[_source(role, path) for role, path in request.files().items()],
        notes=notes + remarks,
    )


N_BEST = "n-best"
CHANGE = "change"
"""Column of changed_words of the captions of two runs; assets/data.js knows it by this name."""
TABLES = ("run", "other run", "references")
NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
EXACT = 2.0**53
"""Integers below this are exact in float64, the only number type of JSON in a browser."""


def matched(run: Path, ids: Iterable[str], path: Path, file_ids: Iterable[str]) -> list[str]:
    """Return notes on the ids of the run that `path` lacks, and on those that only `path` has.

    Raises DataError if the two have no id in common.
    """
    expected, available = dict.fromkeys(ids), dict.fromkeys(file_ids)
    missing = [name for name in expected if name not in available]
    extra = [name for name in available if name not in expected]
    if len(missing) == len(expected):
        first = f"{next(iter(expected))} against {next(iter(available), 'none')}"
        raise DataError(f"{run} and {path} have no id in common ({first}): give files of the same images")
    lines = []
    if missing:
        lines.append(f"{path} lacks {len(missing)} of {len(expected)} ids of {run}: {join_some(missing)}")
    if extra:
        lines.append(f"{path} has {counted(len(extra), 'id')} that {run} lacks, not shown: {join_some(extra)}")
    return lines


def labels(paths: list[Path]) -> list[str]:
    """Return short, distinct names of files: without extension, with as many parent folders as needed."""
    names = [path.stem for path in paths]
    if len(set(names)) == len(names):
        return names
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def further_columns(source: str, table: Mapping[str, Mapping[str, str]], ids: list[str]) -> list[Column]:
    """Return the columns of a table {name: {id: value}}; a column is numeric if all its values are numbers."""
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
    """Return a text as a number, or None if it is not one.

    Identifiers stay text, because a number would not give them back: 00012, 1_000, a UID of twenty digits.
    """
    if not NUMBER.fullmatch(value.strip()):
        return None
    number = float(value)
    return number if math.isfinite(number) and (abs(number) < EXACT or not value.strip().isdecimal()) else None


def _source(role: str, path: Path) -> InputFile:
    return InputFile(role, path.name, file_sha256(path) if path.is_file() else None)
