"""The files of a score: scores.json with the organisers' keys, and the values of every image, to be compared later."""

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
    """Write scores.json, and the values of every image with what compare needs as CSV, or either.

    Raises OutputError.
    """
    if out is not None:
        write_atomically(out, json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n")
    if per_image is not None:
        write_atomically(per_image, per_image_csv(report))


def as_json(report: ScoreReport) -> dict[str, Any]:
    """Return the report as JSON: the organisers' keys on top, everything else under `details`."""
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
    return {**report.organisers, "details": details}


def per_image_csv(report: ScoreReport) -> str:
    """Return one row an image: ID, a column `metric@how` a metric, and counts of corpus metrics as `metric:0`, ..."""
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
    """Return eight hexadecimal digits that differ where signature or references do: other numbers are not compared.

    A run scored without its prompts may be compared with one that has no prompts: `Items.how` does not count.
    """
    digest = hashlib.sha256(signature.removesuffix(items.how).encode())
    for name, references in sorted(zip(items.ids, items.references, strict=True)):
        digest.update(json.dumps([name, references]).encode())
    return digest.hexdigest()[:8]


def _file_hash(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None  # references may be a folder


def read_per_image(path: Path) -> tuple[list[str], dict[str, Measured]]:
    """Read what per_image_csv wrote: ids, and what was measured, by `metric@how`. Raises EngineError."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            header, *rows = csv.reader(stream)
        values = np.array([[float(cell) for cell in row[1:]] for row in rows])
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).all(1)))
            raise ValueError(f"{rows[row][0]} has a value that is not a number")
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} is no file of --per-image: {error}") from error
    if header[:1] != ["ID"] or values.shape != (len(rows), len(header) - 1) or not len(rows):
        raise EngineError(f"{path} is no file of --per-image: write one with `engine score --per-image`")
    measured = {}
    for i, name_and_how in enumerate(header[1:]):
        name, at, _ = name_and_how.partition("@")
        if not at:
            continue
        counts = [j for j, other in enumerate(header[1:]) if other.startswith(name + ":")]
        combine = COMBINE.get(name)
        if counts:
            if combine is None:
                raise EngineError(f"{path} holds counts of {name}, which nothing here adds up: score the run again")
            value = combine(values[:, counts].sum(0))
            measured[name_and_how] = Measured(values[:, i], value, counts=values[:, counts], combine=combine)
        else:
            measured[name_and_how] = Measured(values[:, i], float(values[:, i].mean()))
    ids = [row[0] for row in rows]
    return ids, measured


def in_order_of_ids(ids: Sequence[str], measured: Mapping[str, Measured]) -> tuple[list[str], dict[str, Measured]]:
    """Bring ids and what was measured into the order of the ids, so that two runs can be compared."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [ids[i] for i in order], {
        name: replace(
            found,
            per_image=found.per_image[order],
            counts=None if found.counts is None else found.counts[order],
        )
        for name, found in measured.items()
    }
