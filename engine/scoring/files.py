"""Read and write score files: scores.json with the organisers' keys, and the CSV of scores per image."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.files.atomic import file_sha256, write_atomically
from engine.scoring.base import Items, Measured
from engine.scoring.profiles import COMBINE
from engine.scoring.score import ScoreReport
from engine.version import __version__


def write_report(report: ScoreReport, out: Path | None, per_image: Path | None) -> None:
    """Write scores.json to `out` and the CSV of scores per image to `per_image`; None skips a file.

    Raises OutputError if a file cannot be written.
    """
    if out is not None:
        write_atomically(out, json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n")
    if per_image is not None:
        write_atomically(per_image, per_image_csv(report))


def as_json(report: ScoreReport) -> dict[str, Any]:
    """Return the report as a JSON object: the organisers' keys at the top level, everything else in `details`."""
    request = report.request
    details = {
        "engine": __version__,
        "run": {"file": request.run.name, "sha256": _file_hash(request.run)},
        "references": {"file": request.references.name, "sha256": _file_hash(request.references)},
        "profile": request.profile,
        "scores": {
            score.name: {
                key: value for key, value in asdict(score).items() if value not in ("", None) and key != "name"
            }
            for score in report.scores
        },
        "description": report.description,
        "constant_caption_baseline": report.baseline,
        "groups": report.groups,
        "notes": report.notes,
    }
    if report.without_twins is not None:
        details["without_twins"] = asdict(report.without_twins)
    return {**report.organisers, "details": details}


def per_image_csv(report: ScoreReport) -> str:
    """Return a CSV table with one row per image, which `score compare` can read.

    Columns: `ID`, `metric@how` for each metric, and `metric:0`, `metric:1`, ... for the counts of corpus metrics.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns: dict[str, NDArray[np.float64]] = {}
    how = {score.name: how_measured(score.signature, report.items) for score in report.scores}
    for name, measured in report.measured.items():
        columns[f"{name}@{how[name]}"] = measured.per_image
        if measured.counts is not None:
            columns |= {f"{name}:{i}": column for i, column in enumerate(measured.counts.T)}
    writer.writerow(["ID", *columns])
    for i, image_id in enumerate(report.items.ids):
        writer.writerow([image_id, *(repr(float(column[i])) for column in columns.values())])
    return stream.getvalue()


def how_measured(signature: str, items: Items) -> str:
    """Return a hash (8 hexadecimal digits) of a signature and the references; only equal hashes are comparable.

    `Items.how` is not part of it, so that a run whose prompts were removed compares with a run without prompts.
    """
    digest = hashlib.sha256(signature.removesuffix(items.how).encode())
    for name, references in sorted(zip(items.ids, items.references, strict=True)):
        digest.update(json.dumps([name, references]).encode())
    return digest.hexdigest()[:8]


def _file_hash(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None  # references may be a folder


def is_per_image(path: Path) -> bool:
    """Return whether a file begins like one of per_image_csv."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            header = next(csv.reader(stream), [])
    except (OSError, csv.Error):
        return False
    return header[:1] == ["ID"] and any("@" in column for column in header[1:])


def read_per_image(path: Path) -> tuple[list[str], dict[str, Measured]]:
    """Read a file of per_image_csv; return the ids and {`metric@how`: scores}. Raises EngineError if it is not one."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            header, *rows = csv.reader(stream)
        values = np.array([[float(cell) for cell in row[1:]] for row in rows])
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).all(1)))
            raise ValueError(f"{rows[row][0]} has a value that is not a number")
    except (OSError, ValueError, csv.Error) as error:
        raise EngineError(f"{path} is not a file of --per-image: {error}") from error
    if header[:1] != ["ID"] or values.shape != (len(rows), len(header) - 1) or not len(rows):
        raise EngineError(f"{path} is not a file of --per-image: write one with `engine score --per-image`")
    measured = {}
    for i, name_and_how in enumerate(header[1:]):
        name, at, _ = name_and_how.partition("@")
        if not at:
            continue
        counts = [j for j, column in enumerate(header[1:]) if column.startswith(name + ":")]
        combine = COMBINE.get(name)
        if counts:
            if combine is None:
                raise EngineError(
                    f"{path} has counts of {name}, which is not a known corpus metric: score the run again"
                )
            value = combine(values[:, counts].sum(0))
            measured[name_and_how] = Measured(values[:, i], value, counts=values[:, counts], combine=combine)
        else:
            measured[name_and_how] = Measured(values[:, i], float(values[:, i].mean()))
    ids = [row[0] for row in rows]
    return ids, measured


def in_order_of_ids(ids: Sequence[str], measured: Mapping[str, Measured]) -> tuple[list[str], dict[str, Measured]]:
    """Sort ids and scores by id, so that two runs can be compared."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [ids[i] for i in order], {
        name: replace(
            scores,
            per_image=scores.per_image[order],
            counts=None if scores.counts is None else scores.counts[order],
        )
        for name, scores in measured.items()
    }
