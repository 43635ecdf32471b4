"""Score a run: match it with references, compute the metrics, and describe the result.

The report also holds statistics of the captions, the scores of a constant caption as a baseline, and scores per group
of images. `score_run` is the entry point.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.captions import after_prompt
from engine.errors import DataError, EngineError, UsageError, counted
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.ids import join_some, shown
from engine.inputs.images import find_images_of
from engine.inputs.tables import Table, by_reference_id, own_by_reference_id, read_columns, read_prompts, read_table
from engine.inputs.twins import read_twins
from engine.options import CLIP, window_of
from engine.scoring.base import Items, Measured, Metric, MetricInputs, interval, preprocess
from engine.scoring.neural import check_weights
from engine.scoring.profiles import BUILT_IN, CHEAP, PROFILES, Profile, make_metric, organisers_names

LEAST_GROUP = 5
"""Smallest number of images for which a group is listed."""


def describe(items: Items) -> dict[str, Any]:
    """Return statistics of a run and its references: distinct captions, empty captions, lengths in words."""
    references = [reference for texts in items.references for reference in texts]
    return {
        "images": len(items),
        "empty_captions": sum(not caption.strip() for caption in items.candidates),
        "unique_ratio": round(len(set(items.candidates)) / len(items), 4),
        "unique_ratio_of_references": round(len(set(references)) / len(references), 4),
        "words": _lengths(items.candidates),
        "words_of_references": _lengths(references),
    }


def constant_caption(items: Items) -> str:
    """Return one caption for all images: the most frequent words of the references, as many as their median length.

    It ignores the images, so its scores show how much of a metric frequent words alone reach. Among words of the same
    frequency the alphabet decides, so that it does not depend on the order of the images.
    """
    references = [preprocess(reference) for texts in items.references for reference in texts]
    words = Counter(word for reference in references for word in dict.fromkeys(reference.split()))
    length = max(1, int(np.median([len(reference.split()) for reference in references])))
    return " ".join(sorted(words, key=lambda word: (-words[word], word))[:length])


def baseline_scores(items: Items, names: Sequence[str]) -> dict[str, Any]:
    """Return the constant caption and its scores by the metrics `names`."""
    caption = constant_caption(items)
    constant = Items(items.ids, [caption] * len(items), items.references)
    values = {name: round(make_metric(name, MetricInputs(), {}).measure(constant).value, 6) for name in names}
    return {"caption": caption, **values}


def _lengths(captions: Sequence[str]) -> dict[str, float]:
    lengths = np.array([len(caption.split()) for caption in captions])
    shares = dict(zip(("p5", "median", "p95"), np.percentile(lengths, [5, 50, 95]), strict=True))
    stats = {"least": lengths.min(), **shares, "mean": lengths.mean(), "most": lengths.max()}
    return {name: round(float(value), 1) for name, value in stats.items()}


def group_places(
    group_by: str | None, labels: Path | None, references: Table, items: Items, named: Columns = USUAL
) -> dict[str, list[int]]:
    """Return {value of the column: indices of its images}. A cell may hold several values, separated by `;`.

    Raises DataError if the references of an image have different values.
    """
    if group_by is None:
        return {}
    columns = read_columns(labels, named) if labels else references.columns
    where = labels or references.path
    if group_by not in columns:
        raise UsageError(
            f"{where} has no column {group_by!r}: it has {', '.join(sorted(columns)) or 'no further columns'}"
        )
    if labels is None and group_by in references.varying:
        name = shown(references.varying[group_by])
        raise DataError(f"{where}: the rows of {name} differ in {group_by!r}: give one value per image with --labels")
    cells = by_reference_id(references, columns[group_by], labels) if labels else columns[group_by]
    if not set(cells) & set(items.ids):
        raise UsageError(f"{where} labels none of the images: are these the labels of another split?")
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(items.ids):
        values = dict.fromkeys(filter(None, map(str.strip, cells.get(name, "").split(";"))))
        for value in values or ("(none)",):
            groups.setdefault(value, []).append(index)
    return dict(sorted(groups.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def scores_by_group(groups: Mapping[str, Sequence[int]], measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the size and scores of every group with at least LEAST_GROUP images, and the number of smaller groups."""
    shown: dict[str, Any] = {}
    for value, indices in groups.items():
        if len(indices) < LEAST_GROUP:
            continue
        members = np.array(indices)
        shown[value] = {"images": len(indices)} | {
            name: round(result.resampled(members), 6) for name, result in measured.items()
        }
    small = sum(len(indices) < LEAST_GROUP for indices in groups.values())
    return shown | ({"(smaller groups)": {"groups": small}} if small else {})


LEAST_WORDS, LEAST_IMAGES = 2, 5
"""Smallest number of shared first words, and of images, for which the note on a common start is printed."""


def remove_prompts(items: Items, prompts: Mapping[str, str], source: str) -> tuple[Items, str]:
    """Remove the prompt that each candidate begins with; return the items and a note, which names `source`.

    If no caption begins with its prompt, all are scored unchanged. Raises DataError if only some do: that may be
    chance, so that it is unknown which captions hold a prompt. Empty captions and empty prompts are ignored.
    """
    prompted = {
        i: after_prompt(caption, prompts[name])
        for i, (name, caption) in enumerate(zip(items.ids, items.candidates, strict=True))
        if caption.strip() and prompts.get(name, "").strip()
    }
    without = [items.ids[i] for i, rest in prompted.items() if rest is None]
    if len(without) == len(prompted):
        return items, f"no caption begins with its prompt (from {source}): captions are scored unchanged"
    if without:
        raise DataError(
            f"{counted(len(prompted) - len(without), 'caption begins with its', 'captions begin with their')} prompt "
            f"(from {source}), {counted(len(without), 'does', 'do')} not "
            f"({join_some(without, 3)}): give the run's prompts with --prompts, or --keep-prompt "
            "to score whole captions"
        )
    candidates = [caption if (rest := prompted.get(i)) is None else rest for i, caption in enumerate(items.candidates)]
    note = (
        f"{counted(len(prompted), 'caption begins with its', 'captions begin with their')} prompt (from {source}), "
        "which is not scored; --keep-prompt scores whole captions"
    )
    return replace(items, candidates=candidates, how=f"{items.how}|prompt:removed"), note


def common_start(items: Items) -> str:
    """Return the words that all captions, but fewer than half of the references, begin with, or an empty string.

    Such words are likely to be a prompt.
    """
    captions = [caption.split() for caption in items.candidates if caption.strip()]
    if len(captions) < LEAST_IMAGES:
        return ""
    first, last = min(captions), max(captions)  # in sort order: a start that these two share is shared by all
    count = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    start = " ".join(first[:count])
    references = [after_prompt(reference, start) is not None for texts in items.references for reference in texts]
    is_prompt = count >= LEAST_WORDS and first != last and sum(references) < len(references) / 2
    return start if is_prompt else ""


@dataclass(frozen=True)
class ScoreRequest:
    """The options of `engine score`.

    `training_captions` adds the metric `novelty`. `exclude_duplicates` is a file of `engine duplicates`: the scores are
    also given without the images that have a twin. `group_by` is a column of `labels`, or of the references if `labels`
    is None. Captions are scored without the prompts they begin with: `prompt` for all images, else the table `prompts`,
    else the column `prompt` of the run or of the references. `keep_prompt` scores whole captions. `only_common` skips
    ids that only one of the files has.

    Raises UsageError for an invalid `high_bit_depth` and for options that exclude each other.
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
    training_captions: Path | None = None
    exclude_duplicates: Path | None = None
    setting: MetricInputs = field(default_factory=MetricInputs)

    def __post_init__(self) -> None:
        window_of(self.high_bit_depth)
        given = {"--prompt": self.prompt is not None, "--prompts": self.prompts, "--keep-prompt": self.keep_prompt}
        names = [name for name, is_given in given.items() if is_given]
        if len(names) > 1:
            raise UsageError(f"{' and '.join(names)}: give only one")


@dataclass(frozen=True)
class Score:
    """One metric's score with its 95 % interval and signature, or the reason why it is unavailable."""

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
    """The result of `score_run`. `measured` holds the scores per image of the metrics that are available."""

    request: ScoreRequest
    items: Items
    scores: list[Score]
    measured: Mapping[str, Measured]
    organisers: Mapping[str, float | None]
    description: Mapping[str, Any]
    baseline: Mapping[str, Any]
    groups: Mapping[str, Any]
    notes: list[str]
    without_twins: WithoutTwins | None = None


@dataclass(frozen=True)
class WithoutTwins:
    """The scores of the images that have no twin: {metric: (value, low, high)}.

    twins, near  numbers of images with a twin, which are left out, and of those with only near images, which are not
    """

    images: int
    twins: int
    near: int
    scores: Mapping[str, tuple[float, float, float]]


def score_run(request: ScoreRequest, log: Callable[[str], None]) -> ScoreReport:
    """Score a run file; `log` gets a line for each metric.

    Raises DataError if the files do not match. An unavailable metric is reported, not raised.
    """
    profile = PROFILES[request.profile] if request.profile else Profile(request.metrics or CHEAP)
    names = request.metrics or profile.metrics
    if request.training_captions is not None and "novelty" not in names:
        names = (*names, "novelty")
    options = dict(profile.options) | {
        "bertscore_layer": request.bertscore_layer,
        "dicom_frame": request.dicom_frame,
        "high_bit_depth": request.high_bit_depth,
    }
    if request.training_captions is not None:
        options["training_captions"] = read_table(request.training_captions, request.columns)
    references = read_table(request.references, request.columns)
    items, notes = match(read_table(request.run, request.columns), references, request)
    notes += _notes(references, items)
    groups_of = group_places(request.group_by, request.labels, references, items, request.columns)
    request.columns.require_found()
    twins = read_twins(request.exclude_duplicates) if request.exclude_duplicates is not None else None
    has_twin = None if twins is None else find_has_twin(items, references, twins, request)

    refuse_unused(request.setting, names)
    for name, folder in request.setting.weights.items():
        if name in BUILT_IN and name not in request.setting.plugins:
            check_weights(name, folder)
    metrics = {name: make_metric(name, request.setting, options) for name in names}

    scores, measured = measure(metrics, items, log)
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
        without_twins=None if has_twin is None else score_without_twins(has_twin, measured),
    )


def find_has_twin(
    items: Items, references: Table, twins: Mapping[str, bool], request: ScoreRequest
) -> list[bool | None]:
    """Return for each image whether it has a twin; None if it is not in the file. Raises DataError if all have one."""
    assert request.exclude_duplicates is not None
    known = by_reference_id(references, twins, request.exclude_duplicates)
    has_twin = [known.get(name) for name in items.ids]
    if twins and not set(has_twin) & {True, False}:
        raise DataError(
            f"{request.exclude_duplicates} has no id of {request.run}, but {shown(next(iter(twins)))}: was it made of "
            "other images, or with --input and --against swapped?"
        )
    if all(has_twin):
        raise DataError(f"{request.exclude_duplicates}: every image of {request.run} has a twin: no image is left")
    return has_twin


def score_without_twins(has_twin: Sequence[bool | None], measured: Mapping[str, Measured]) -> WithoutTwins:
    """Return the scores of the images without a twin. Weights that depend on all references (idf) stay the same."""
    kept = np.flatnonzero([not value for value in has_twin])
    parts = {name: result.part(kept) for name, result in measured.items()}
    scores = {name: (part.value, *interval(part)) for name, part in parts.items()}
    return WithoutTwins(len(kept), has_twin.count(True), has_twin.count(False), scores)


def measure(
    metrics: Mapping[str, Metric], items: Items, log: Callable[[str], None]
) -> tuple[list[Score], dict[str, Measured]]:
    """Compute every metric; return its score, and the scores per image of the available ones.

    A metric that raises any exception is reported as unavailable and does not affect the others.
    """
    scores: list[Score] = []
    measured: dict[str, Measured] = {}
    for name, metric in metrics.items():
        start = time.perf_counter()
        try:
            result = metric.measure(items)
            if not np.isfinite(result.per_image).all():
                raise EngineError(
                    f"returned no finite number for {items.ids[int(np.argmin(np.isfinite(result.per_image)))]}"
                )
            signature, (low, high) = metric.signature() + items.how, interval(result)
        except Exception as error:  # libraries, weights and plug-ins may raise anything
            scores.append(Score(name, unavailable=(reason := _first_line(error))))
            log(f"{name}: unavailable: {reason}")
            continue
        seconds = time.perf_counter() - start
        measured[name] = result
        scores.append(Score(name, result.value, low, high, signature, result.note, seconds=seconds))
        log(f"{name}: computed in {seconds:.1f} s")
    return scores, measured


def _first_line(error: Exception) -> str:
    """Return an error in one line; an error that is not ours is prefixed with its type."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    if isinstance(error, EngineError):
        return line
    return f"failed with {type(error).__name__}{f': {line}' if line else ''}"


def match(run: Table, references: Table, request: ScoreRequest) -> tuple[Items, list[str]]:
    """Match a run with references by id, in the order of the run; also return notes on ids and prompts.

    Raises DataError with the ids that only one file has, unless `request.only_common` is set, and with the ids that
    have no image in `request.images`.
    """
    captions, expected = own_by_reference_id(references, run), references.captions
    if not set(captions) & set(expected):
        first = f"{shown(next(iter(captions)))} against {shown(next(iter(expected)))}"
        raise DataError(
            f"{run.path} and {references.path} have no id in common ({first}): are these references of another split?"
        )
    missing = [name for name in expected if name not in captions]
    extra = [name for name in captions if name not in expected]
    remedy = "give --only-common to score the ids that both files have"
    if missing and not request.only_common:
        raise DataError(
            f"{run.path} lacks {counted(len(missing), 'id')} of {references.path}: {join_some(missing)}; {remedy}"
        )
    if extra and not request.only_common:
        raise DataError(
            f"{run.path} has {counted(len(extra), 'id')} that {references.path} lacks: {join_some(extra)}; {remedy}"
        )
    ids, how, notes = [name for name in captions if name in expected], "", []
    if missing or extra:
        how = f"|only-common:{len(ids)} of {len(expected)} references"
        notes.append(
            f"only the {counted(len(ids), 'id that both files have is', 'ids that both files have are')} scored: "
            f"{len(missing)} of {references.path} and {len(extra)} of {run.path} are skipped"
        )
    items = Items(ids, [captions[name] for name in ids], [expected[name] for name in ids], _images(ids, request), how)
    run_ids = dict(zip(run.captions, captions, strict=True))
    prompts, source = _prompts(run, run_ids, references, ids, request)
    if prompts is not None and request.keep_prompt:
        notes.append(f"--keep-prompt: captions are scored with their prompts (from {source})")
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
    images = find_images_of(ids, request.images, recursive=request.recursive)
    without = [name for name in ids if name not in images]
    if without:
        raise DataError(f"{request.images} lacks the images of {counted(len(without), 'id')}: {join_some(without)}")
    return [images[name].path for name in ids]


def _prompts(
    run: Table, run_ids: Mapping[str, str], references: Table, ids: Sequence[str], request: ScoreRequest
) -> tuple[dict[str, str] | None, str]:
    """Return {id: prompt} and the source of the prompts, or (None, "") if there are no prompts.

    `request.prompt` and `request.prompts` override the column of the run, which overrides that of the references.
    `run_ids` maps the names in the run to ids.
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
                "--keep-prompt to score whole captions"
            )
        return {names[name]: prompt for name, prompt in table.columns[column].items()}, str(table.path)
    return None, ""


def refuse_unused(setting: MetricInputs, names: Sequence[str]) -> None:
    """Raise DataError for weights or a plug-in that no metric of this run uses, most likely a typing error."""
    used = {*names, *(["clipscore"] if "refclipscore" in names else [])}
    for option, given in (("--weights", setting.weights), ("--plugin", setting.plugins)):
        unused = sorted(set(given) - used)
        if unused:
            raise DataError(f"{option} {unused[0]}=... is not used by the metrics of this run: {', '.join(names)}")


def _notes(references: Table, items: Items) -> list[str]:
    notes = []
    multiple = sum(len(captions) > 1 for captions in references.captions.values())
    if multiple:
        how = "most metrics take the best one, BLEU the nearest in length, CIDEr their mean"
        notes.append(f"{counted(multiple, 'image has', 'images have')} several references: {how}")
    empty = sum(not any(reference.strip() for reference in texts) for texts in items.references)
    if empty:
        notes.append(
            f"{counted(empty, 'reference is', 'references are')} empty: most metrics score an empty caption 1 there, "
            "any other 0"
        )
    return notes
