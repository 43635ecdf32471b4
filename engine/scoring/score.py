"""What a score means: how the run looks, what a caption that knows nothing reaches, and scores by group of images."""

from __future__ import annotations

import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError, EngineError, UsageError
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.ids import join_some, shown
from engine.inputs.images import find_images_of
from engine.inputs.pixels import CLIP, window_of
from engine.inputs.readers import read_columns
from engine.inputs.tables import Table, by_reference_id, read_prompts, read_table
from engine.scoring.base import Items, Measured, Metric, MetricInputs, interval, preprocess
from engine.scoring.neural import check_weights
from engine.scoring.profiles import BUILT_IN, CHEAP, PROFILES, Profile, make_metric, organisers_names

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


LEAST_WORDS, LEAST_IMAGES = 2, 5
"""Words that all captions of a run have in common at the start, and images of the run, before the two are noted."""


def remove_prompts(items: Items, prompts: Mapping[str, str], source: str) -> tuple[Items, str]:
    """Return items whose candidates lack the prompts of their ids, and a note; `source` is where the prompts are from.

    Captions remain as they are where none begins with its prompt. Raises DataError where only some do, which may be
    chance: then it is unknown which of them hold a prompt. Empty captions and prompts do not count.
    """
    prompted = {
        i: after_prompt(caption, prompts[name])
        for i, (name, caption) in enumerate(zip(items.ids, items.candidates, strict=True))
        if caption.strip() and prompts.get(name, "").strip()
    }
    others = [items.ids[i] for i, rest in prompted.items() if rest is None]
    if len(others) == len(prompted):
        return items, f"no caption begins with its prompt (from {source}): captions are scored as they are"
    if others:
        raise DataError(
            f"{len(prompted) - len(others)} captions begin with their prompt (from {source}), {len(others)} do not "
            f"({join_some(others, 3)}): give the run's prompts with --prompts, or --keep-prompt to score whole captions"
        )
    candidates = [caption if (rest := prompted.get(i)) is None else rest for i, caption in enumerate(items.candidates)]
    note = (
        f"{len(prompted)} captions begin with their prompt (from {source}): what follows it is scored; --keep-prompt "
        "scores whole captions"
    )
    return replace(items, candidates=candidates, how=f"{items.how}|prompt:removed"), note


def after_prompt(caption: str, prompt: str) -> str | None:
    """Return what follows the prompt, None where the caption does not begin with it.

    Case, accents and white space may differ: a tokenizer changes them.
    """
    wanted, seen = _letters(prompt), ""
    for end, character in enumerate(caption):
        if seen == wanted:
            return caption[end:].strip()
        seen += _letters(character)
        if not wanted.startswith(seen):
            return None
    return "" if seen == wanted else None


def common_start(items: Items) -> str:
    """Return the words that all captions and less than half of the references begin with, empty where there are none.

    They are likely to be a prompt.
    """
    captions = [caption.split() for caption in items.candidates if caption.strip()]
    if len(captions) < LEAST_IMAGES:
        return ""
    first, last = min(captions), max(captions)  # in order, all others are between the two
    count = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    start = " ".join(first[:count])
    references = [after_prompt(one, start) is not None for several in items.references for one in several]
    is_told = count >= LEAST_WORDS and first != last and sum(references) < len(references) / 2
    return start if is_told else ""


def _letters(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(one for one in decomposed if not one.isspace() and not unicodedata.combining(one))


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


def score_run(request: ScoreRequest, log: Callable[[str], None]) -> ScoreReport:
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
    )


def measure(
    metrics: Mapping[str, Metric], items: Items, log: Callable[[str], None]
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
            log(f"{name}: unavailable: {reason}")
            continue
        seconds = time.perf_counter() - start
        measured[name] = result
        scores.append(Score(name, result.value, low, high, signature, result.note, seconds=seconds))
        log(f"{name}: {result.value:.4f} [{low:.4f}, {high:.4f}] in {seconds:.1f} s")
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
