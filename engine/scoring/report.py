"""Score a run, top to bottom: match ids, measure, describe, write."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import __version__
from engine.errors import EngineError, UsageError
from engine.images import find_images
from engine.output.run import write_atomically
from engine.scoring.base import Items, Measured, Setting, UnavailableError
from engine.scoring.bootstrap import interval
from engine.scoring.preprocess import preprocess
from engine.scoring.profiles import CHEAP, PROFILES, Profile, make_metric, organisers_names
from engine.tables import Table, read_table, shorten

LEAST_GROUP = 5
"""Images a group must have to be a line of the breakdown."""


@dataclass(frozen=True)
class Request:
    """What is to be scored, as it was asked for. `group_by` is a column of `labels`, or of the references without
    them.
    """

    run: Path
    references: Path
    images: Path | None = None
    profile: str | None = None
    metrics: tuple[str, ...] = ()
    labels: Path | None = None
    group_by: str | None = None
    bertscore_layer: int | None = None
    setting: Setting = field(default_factory=Setting)


@dataclass(frozen=True)
class Score:
    """One metric's answer: a value with its 95 % interval and signature, or what it needs."""

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    signature: str = ""
    note: str = ""
    unavailable: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """Everything a reader of a score should see. `measured` holds the values by image of the scores that are there."""

    request: Request
    items: Items
    scores: list[Score]
    measured: Mapping[str, Measured]
    organisers: Mapping[str, float | None]
    description: Mapping[str, Any]
    baseline: Mapping[str, Any]
    groups: Mapping[str, Any]
    notes: list[str]


def score_run(request: Request, say: Callable[[str], None]) -> Report:
    """Score a run file. Raises UsageError where the files do not fit each other; an absent metric is reported, not
    raised.
    """
    profile = PROFILES[request.profile] if request.profile else Profile(request.metrics or CHEAP)
    names = request.metrics or profile.metrics
    options = dict(profile.options) | {"bertscore_layer": request.bertscore_layer}
    references = read_table(request.references)
    items = match(read_table(request.run), references, request.images)
    notes = _notes(references)
    groups_of = _groups(request, references, items)

    _refuse_unused(request.setting, names)
    metrics = {name: make_metric(name, request.setting, options) for name in names}

    scores: list[Score] = []
    measured: dict[str, Measured] = {}
    for name, metric in metrics.items():
        start = time.perf_counter()
        try:
            result = metric.measure(items)
        except UnavailableError as error:
            scores.append(Score(name, unavailable=str(error)))
            say(f"{name}: unavailable: {error}")
            continue
        seconds = time.perf_counter() - start
        low, high = interval(result)
        measured[name] = result
        scores.append(Score(name, result.value, low, high, metric.signature(), result.note, seconds=seconds))
        say(f"{name}: {result.value:.4f} [{low:.4f}, {high:.4f}] in {seconds:.1f} s")
    values = {name: result.value for name, result in measured.items()}
    return Report(
        request=request,
        items=items,
        scores=scores,
        measured=measured,
        organisers=organisers_names(Profile(names, keys=profile.keys, averages=profile.averages), values),
        description=describe(items),
        baseline=_baseline(items, [name for name in CHEAP if name in measured]),
        groups=_by_group(groups_of, measured),
        notes=notes,
    )


def match(run: Table, references: Table, images: Path | None = None) -> Items:
    """Bring a run and references together in the run's order.

    Raises UsageError naming the ids that are in one file only, or without an image where images are given.
    """
    said, expected = run.single(), references.captions
    if not set(said) & set(expected) and set(said) & set(references.aliases):
        said = {references.aliases.get(name, name): caption for name, caption in said.items()}
    if not set(said) & set(expected):
        first = f"{next(iter(said))} against {next(iter(expected))}"
        raise UsageError(
            f"{run.path} and {references.path} have no id in common ({first}): references of another split?"
        )
    missing = [name for name in expected if name not in said]
    if missing:
        raise UsageError(f"{run.path} lacks {len(missing)} ids of {references.path}: {shorten(missing)}")
    extra = [name for name in said if name not in expected]
    if extra:
        raise UsageError(f"{run.path} has {len(extra)} ids that {references.path} has not: {shorten(extra)}")
    ids = list(said)
    paths = None
    if images is not None:
        files = {image.id: image.path for image in find_images(images).images}
        without = [name for name in ids if name not in files]
        if without:
            raise UsageError(f"{images} lacks the images of {len(without)} ids: {shorten(without)}")
        paths = [files[name] for name in ids]
    return Items(ids, [said[name] for name in ids], [expected[name] for name in ids], paths)


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


def write_report(report: Report, out: Path, per_image: Path | None) -> None:
    """Write scores.json, and the values of every image with what compare needs as CSV. Raises OutputError."""
    write_atomically(out, json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n")
    if per_image is not None:
        write_atomically(per_image, per_image_csv(report))


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON: the organisers' keys on top, everything else under `details`."""
    request = report.request
    details = {
        "engine": __version__,
        "run": {"file": request.run.name, "sha256": _sha256(request.run)},
        "references": {"file": request.references.name, "sha256": _sha256(request.references)},
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


def per_image_csv(report: Report) -> str:
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
    """Return eight hexadecimal digits that differ where signature or references do: other numbers are not compared."""
    digest = hashlib.sha256(signature.encode())
    for name, references in sorted(zip(items.ids, items.references, strict=True)):
        digest.update(json.dumps([name, references]).encode())
    return digest.hexdigest()[:8]


def _refuse_unused(setting: Setting, names: Sequence[str]) -> None:
    """Raise UsageError for weights or a plug-in that no metric of this run takes: a typing mistake, most likely."""
    taken = {*names, *(["clipscore"] if "refclipscore" in names else [])}
    for option, given in (("--weights", setting.weights), ("--plugin", setting.plugins)):
        unused = sorted(set(given) - taken)
        if unused:
            raise UsageError(f"{option} {unused[0]}=... is for no metric of this run: {', '.join(names)}")


def _baseline(items: Items, names: Sequence[str]) -> dict[str, Any]:
    caption = constant_caption(items)
    constant = Items(items.ids, [caption] * len(items), items.references)
    values = {name: round(make_metric(name, Setting(), {}).measure(constant).value, 6) for name in names}
    return {"caption": caption, **values}


def _lengths(captions: Sequence[str]) -> dict[str, float]:
    lengths = np.array([len(caption.split()) for caption in captions])
    shares = dict(zip(("p5", "median", "p95"), np.percentile(lengths, [5, 50, 95]), strict=True))
    found = {"least": lengths.min(), **shares, "mean": lengths.mean(), "most": lengths.max()}
    return {name: round(float(value), 1) for name, value in found.items()}


def _groups(request: Request, references: Table, items: Items) -> dict[str, list[int]]:
    """Return {value of the column: places of its images}; a cell may hold several values separated by `;`."""
    if request.group_by is None:
        return {}
    columns = _label_columns(request.labels) if request.labels else references.columns
    if request.group_by not in columns:
        where = request.labels or request.references
        raise UsageError(f"{where} has no column {request.group_by!r} but {', '.join(sorted(columns)) or 'none'}")
    labels = columns[request.group_by]
    if not set(labels) & set(items.ids):
        raise UsageError(f"{request.labels} labels none of the images of {request.run}: labels of another split?")
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(items.ids):
        for value in labels.get(name, "").split(";"):
            groups.setdefault(value.strip() or "(none)", []).append(place)
    return dict(sorted(groups.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def _label_columns(path: Path) -> dict[str, dict[str, str]]:
    """Read a table of labels by id, its first column."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header, *rows = csv.reader(stream)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a table of labels: {error}") from error
    return {column: {row[0]: row[i] for row in rows if len(row) > i} for i, column in enumerate(header) if i}


def _by_group(groups: Mapping[str, Sequence[int]], measured: Mapping[str, Measured]) -> dict[str, Any]:
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


def _notes(references: Table) -> list[str]:
    several = sum(len(captions) > 1 for captions in references.captions.values())
    how = "the best of them counts, for BLEU the nearest in length, for CIDEr their mean"
    return [f"{several} images have several references: {how}"] if several else []


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def read_per_image(path: Path) -> tuple[list[str], dict[str, Measured]]:
    """Read what per_image_csv wrote: ids, and what was measured, by `metric@how`. Raises EngineError."""
    from engine.scoring.overlap import COMBINE

    try:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        values = np.array([[float(cell) for cell in row[1:]] for row in rows])
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
        if counts and combine:
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
