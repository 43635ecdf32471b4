"""Score a run, top to bottom: match ids, measure, describe. files.py writes what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError, EngineError, UsageError
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.depth import CLIP, window_of
from engine.inputs.ids import join_some, shown
from engine.inputs.images import find_images_of
from engine.inputs.prompts import read_prompts
from engine.inputs.tables import Table, by_reference_id, read_table
from engine.scoring.base import Items, Measured, Metric, MetricInputs
from engine.scoring.bootstrap import interval
from engine.scoring.describe import baseline_scores, describe, group_places, scores_by_group
from engine.scoring.neural import check_weights
from engine.scoring.profiles import BUILT_IN, CHEAP, PROFILES, Profile, make_metric, organisers_names
from engine.scoring.prompted import common_start, remove_prompts


@dataclass(frozen=True)
class ScoreRequest:
    """What is to be scored, as it was asked for. `group_by` is a column of `labels`, or of the references without
    them.

    Captions are scored without the prompts they begin with: `prompt` for all images, those of the table `prompts`, or
    the column `prompt` of the run or the references; with `keep_prompt` they are scored as they are. With `only_common`
    ids that only one file has are left out. Raises UsageError for a high bit depth that is not valid, and for options
    that exclude each other.
    """

    run: Path
    references: Path
    images: Path | None = None
    recursive: bool = False
    profile: str | None = None
    metrics: tuple[str, ...] = ()
    labels: Path | None = None
    group_by: str | None = None
    columns: Columns = USUAL
    bertscore_layer: int | None = None
    prompt: str | None = None
    prompts: Path | None = None
    keep_prompt: bool = False
    only_common: bool = False
    dicom_frame: int = 0
    high_bit_depth: str = CLIP
    setting: MetricInputs = field(default_factory=MetricInputs)

    def __post_init__(self) -> None:
        window_of(self.high_bit_depth)
        given = {"--prompt": self.prompt is not None, "--prompts": self.prompts, "--keep-prompt": self.keep_prompt}
        names = [name for name, is_given in given.items() if is_given]
        if len(names) > 1:
            raise UsageError(f"{' and '.join(names)}: give one of them")


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
class ScoreReport:
    """Everything a reader of a score should see. `measured` holds the values by image of the scores that are there."""

    request: ScoreRequest
    items: Items
    scores: list[Score]
    measured: Mapping[str, Measured]
    organisers: Mapping[str, float | None]
    description: Mapping[str, Any]
    baseline: Mapping[str, Any]
    groups: Mapping[str, Any]
    notes: list[str]


def score_run(request: ScoreRequest, say: Callable[[str], None]) -> ScoreReport:
    """Score a run file. Raises DataError where the files do not fit each other; an absent metric is reported, not
    raised.
    """
    profile = PROFILES[request.profile] if request.profile else Profile(request.metrics or CHEAP)
    names = request.metrics or profile.metrics
    options = dict(profile.options) | {
        "bertscore_layer": request.bertscore_layer,
        "dicom_frame": request.dicom_frame,
        "high_bit_depth": request.high_bit_depth,
    }
    references = read_table(request.references, request.columns)
    items, notes = match(read_table(request.run, request.columns), references, request)
    notes += _notes(references, items)
    groups_of = group_places(request.group_by, request.labels, references, items, request.columns)
    request.columns.require_found()

    refuse_unused(request.setting, names)
    for name, folder in request.setting.weights.items():
        if name in BUILT_IN and name not in request.setting.plugins:
            check_weights(name, folder)
    metrics = {name: make_metric(name, request.setting, options) for name in names}

    scores, measured = measure(metrics, items, say)
    values = {name: result.value for name, result in measured.items()}
    return ScoreReport(
        request=request,
        items=items,
        scores=scores,
        measured=measured,
        organisers=organisers_names(Profile(names, keys=profile.keys, averages=profile.averages), values),
        description=describe(items),
        baseline=baseline_scores(items, [name for name in CHEAP if name in measured]),
        groups=scores_by_group(groups_of, measured),
        notes=notes,
    )


def measure(
    metrics: Mapping[str, Metric], items: Items, say: Callable[[str], None]
) -> tuple[list[Score], dict[str, Measured]]:
    """Measure by every metric; return their answers, and the values by image of those that have one.

    A metric that fails, in whatever way, is unavailable: it takes no other one with it.
    """
    scores: list[Score] = []
    measured: dict[str, Measured] = {}
    for name, metric in metrics.items():
        start = time.perf_counter()
        try:
            result = metric.measure(items)
            if not np.isfinite(result.per_image).all():
                raise EngineError(f"gives no number for {items.ids[int(np.argmin(np.isfinite(result.per_image)))]}")
            signature, (low, high) = metric.signature() + items.how, interval(result)
        except Exception as error:  # libraries, weights and strangers' commands fail in ways of their own
            scores.append(Score(name, unavailable=(reason := _first_line(error))))
            say(f"{name}: unavailable: {reason}")
            continue
        seconds = time.perf_counter() - start
        measured[name] = result
        scores.append(Score(name, result.value, low, high, signature, result.note, seconds=seconds))
        say(f"{name}: {result.value:.4f} [{low:.4f}, {high:.4f}] in {seconds:.1f} s")
    return scores, measured


def _first_line(error: Exception) -> str:
    """Return an error in one line: our own words as they are, a library's with the kind of error in front."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    if isinstance(error, EngineError):
        return line
    return f"it failed: {type(error).__name__}{f': {line}' if line else ''}"


def match(run: Table, references: Table, request: ScoreRequest) -> tuple[Items, list[str]]:
    """Bring a run and references together in the run's order; also return notes on ids and prompts.

    Raises DataError naming the ids that are in one file only, unless these are to be left out, and those without an
    image where images are given.
    """
    said, expected = by_reference_id(references, run.single(), run.path, run.files), references.captions
    if not set(said) & set(expected):
        first = f"{shown(next(iter(said)))} against {shown(next(iter(expected)))}"
        raise DataError(
            f"{run.path} and {references.path} have no id in common ({first}): references of another split?"
        )
    missing = [name for name in expected if name not in said]
    extra = [name for name in said if name not in expected]
    remedy = "give --only-common to score the ids that both files have"
    if missing and not request.only_common:
        raise DataError(f"{run.path} lacks {len(missing)} ids of {references.path}: {join_some(missing)}; {remedy}")
    if extra and not request.only_common:
        raise DataError(f"{run.path} has {len(extra)} ids that {references.path} has not: {join_some(extra)}; {remedy}")
    ids, how, notes = [name for name in said if name in expected], "", []
    if missing or extra:
        how = f"|only-common:{len(ids)} of {len(expected)} references"
        notes.append(
            f"only the {len(ids)} ids that both files have are scored: {len(missing)} of {references.path} and "
            f"{len(extra)} of {run.path} are left out"
        )
    items = Items(ids, [said[name] for name in ids], [expected[name] for name in ids], _images(ids, request), how)
    run_ids = dict(zip(run.captions, said, strict=True))
    prompts, source = _prompts(run, run_ids, references, ids, request)
    if prompts is not None and request.keep_prompt:
        notes.append(f"captions are scored with their prompts (from {source}), as --keep-prompt asks")
    elif prompts is not None:
        items, note = remove_prompts(items, prompts, source)
        notes.append(note)
    elif start := common_start(items):
        notes.append(
            f"all captions begin with {start!r}, most references do not: a prompt? --prompt {start!r} removes it"
        )
    return items, notes


def _images(ids: Sequence[str], request: ScoreRequest) -> list[Path] | None:
    if request.images is None:
        return None
    found = find_images_of(ids, request.images, recursive=request.recursive)
    without = [name for name in ids if name not in found]
    if without:
        raise DataError(f"{request.images} lacks the images of {len(without)} ids: {join_some(without)}")
    return [found[name].path for name in ids]


def _prompts(
    run: Table, run_ids: Mapping[str, str], references: Table, ids: Sequence[str], request: ScoreRequest
) -> tuple[dict[str, str] | None, str]:
    """Return the prompts by id and where they are from, (None, "") where none are known.

    What was asked for overrides the run's column, and that the references'. `run_ids` are the ids by the run's names.
    """
    if request.prompt is not None:
        return dict.fromkeys(ids, request.prompt), "--prompt"
    if request.prompts is not None:
        return read_prompts(request.prompts, ids, request.columns), str(request.prompts)
    for table, names in ((run, run_ids), (references, {name: name for name in references.captions})):
        column = next((column for column in table.columns if column.lower() == PROMPT), None)
        if column is None:
            continue
        if column in table.varying and not request.keep_prompt:
            raise DataError(
                f"{table.path} has several prompts for {table.varying[column]}: give the run's with --prompts, or "
                "--keep-prompt to score captions as they are"
            )
        return {names[name]: prompt for name, prompt in table.columns[column].items()}, str(table.path)
    return None, ""


def refuse_unused(setting: MetricInputs, names: Sequence[str]) -> None:
    """Raise DataError for weights or a plug-in that no metric of this run takes: a typing mistake, most likely."""
    taken = {*names, *(["clipscore"] if "refclipscore" in names else [])}
    for option, given in (("--weights", setting.weights), ("--plugin", setting.plugins)):
        unused = sorted(set(given) - taken)
        if unused:
            raise DataError(f"{option} {unused[0]}=... is for no metric of this run: {', '.join(names)}")


def _notes(references: Table, items: Items) -> list[str]:
    notes = []
    several = sum(len(captions) > 1 for captions in references.captions.values())
    if several:
        how = "the best of them counts, for BLEU the nearest in length, for CIDEr their mean"
        notes.append(f"{several} images have several references: {how}")
    empty = sum(not any(one.strip() for one in several) for several in items.references)
    if empty:
        notes.append(f"{empty} references are empty: an empty caption scores 1 there in most metrics, any other 0")
    return notes
