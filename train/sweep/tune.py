"""Choose decoding settings on one half of the images of a split and report their effect on the other half."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import DataError, UsageError, counted
from engine.files.atomic import write_atomically
from engine.inputs.ids import join_some
from engine.options import DecodeOptions
from train.data.dataset import draw
from train.data.examples import Split
from train.sweep.runs import (
    Log,
    Part,
    Sweep,
    about,
    check_request,
    choose_images,
    choose_split,
    lock_output,
    prepare_bundle,
)
from train.sweep.settings import (
    GRIDS,
    Evaluator,
    Tuning,
    check_metric,
    difference,
    effect,
    flags_of,
    run_file,
    settings_of,
    with_settings,
)
from train.sweep.sweep import TITLES, markdown_rows

MIN_IMAGES = 2
"""Smallest number of images in a half. With fewer, a difference has no confidence interval."""


def halve(ids: Sequence[str], seed: int, group: str | None = None) -> tuple[list[str], list[str]]:
    """Divide ids into two halves (tuning, held back), each in the given order.

    The halves depend on the ids and the seed, not on the order of the ids. `group` is a regular expression. Ids in
    which it matches the same text (its first capture group, if it has one) stay in the same half. For example,
    `^[^_]+` keeps p1_slice1 and p1_slice2 together. The halves are as equal in size as the groups allow. Raises
    UsageError for an invalid pattern, and DataError if it does not match an id or a half would have fewer than
    MIN_IMAGES images.
    """
    members: dict[str, list[str]] = {}
    for name, key in zip(ids, _groups(ids, group), strict=True):
        members.setdefault(key, []).append(name)
    drawn = sorted(members, key=lambda key: (draw(key, seed), key))
    sizes = [sum(len(members[key]) for key in drawn[:cut]) for cut in range(len(drawn) + 1)]
    cut = min(range(len(sizes)), key=lambda cut: abs(2 * sizes[cut] - len(ids)))
    if min(sizes[cut], len(ids) - sizes[cut]) < MIN_IMAGES:
        groups = "" if group is None else f" in {counted(len(drawn), 'group')}"
        raise DataError(
            f"{counted(len(ids), 'image')}{groups} cannot be divided into two halves of at least {MIN_IMAGES}: use "
            "more images"
        )
    tuning = {name for key in drawn[:cut] for name in members[key]}
    return [name for name in ids if name in tuning], [name for name in ids if name not in tuning]


def _groups(ids: Sequence[str], group: str | None) -> list[str]:
    """Return the group of each id."""
    if group is None:
        return list(ids)
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UsageError(f"--tune-group {group} is not a valid regular expression: {error}") from error
    matches = [pattern.search(name) for name in ids]
    parts = [match and match[1 if pattern.groups else 0] for match in matches]
    without = [name for name, part in zip(ids, parts, strict=True) if not part]
    if without:
        raise DataError(
            f"--tune-group {group} matches nothing in {len(without)} of {len(ids)} ids ({join_some(without, 3)}): "
            "it must match in every id"
        )
    return [str(part) for part in parts]


MAX_ROUNDS = 5
"""Limit on the rounds of a search. With small grids it converges after two or three."""


@dataclass(frozen=True)
class Trial:
    """Settings by name and their score. A higher score is better."""

    settings: dict[str, Any]
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: all trials in order, the start first, and the best one (the earliest of equal ones).

    `settled` is True if the last of the `rounds` changed nothing, and False if the limit of rounds was reached.
    """

    trials: list[Trial]
    best: Trial
    rounds: int
    settled: bool


def search(
    score: Callable[[dict[str, Any]], float],
    start: Mapping[str, Any],
    grids: Mapping[str, Sequence[Any]],
    effect: Callable[[Mapping[str, Any]], Hashable] = lambda settings: tuple(settings.values()),
    max_rounds: int = MAX_ROUNDS,
) -> SearchResult:
    """Search for the settings with the highest score by coordinate ascent from `start`.

    Each setting of `grids` in turn takes the best of its values while the others stay fixed. Rounds repeat until one
    changes nothing. Only a higher score changes a setting. Settings with the same `effect` are scored once.
    """
    trials: dict[Hashable, Trial] = {}

    def run_trial(settings: dict[str, Any]) -> Trial:
        key = effect(settings)
        if key not in trials:
            trials[key] = Trial(settings, score(settings))
        return trials[key]

    best, rounds, settled = run_trial(dict(start)), 0, False
    while not settled and rounds < max_rounds:
        rounds, before = rounds + 1, best
        for name, values in grids.items():
            for trial in [run_trial({**best.settings, name: value}) for value in values]:
                if trial.score > best.score:
                    best = trial
        settled = best is before
    return SearchResult(list(trials.values()), best, rounds, settled)


def verdict(shown: dict[str, Any]) -> str:
    """Return whether the 95 % interval of a difference shows a gain or a loss: it must not include zero."""
    return "a gain" if shown["low"] > 0 else "a loss" if shown["high"] < 0 else "no gain is shown"


def as_markdown(result: dict[str, Any]) -> str:
    """Return the content of tuned.json as Markdown: the result on the held-back images first, then the search."""
    name, images = result["checkpoint"].get("name", "a bundle"), result["images"]
    title = TITLES.get(result["metric"], result["metric"])
    settings = [
        [
            f"`{name}`",
            _cell(value),
            _cell(result["chosen"][name]),
            ", ".join(map(_cell, result["grids"].get(name, ()))) or "fixed, not tuned",
        ]
        for name, value in result["own"].items()
    ]
    trials = []
    for trial in result["trials"]:
        marks = [word for word in ("own", "chosen") if trial["settings"] == result[word]]
        trials.append([*map(_cell, trial["settings"].values()), f"{trial['value']:.4f}", ", ".join(marks)])
    lines = [
        f"# {name}, split {result['split']}: decoding settings chosen by {title}",
        "",
        f"Chosen on {images['tuning']} images, compared on {images['held_back']} other images not used in the search.",
        "",
        *markdown_rows(["setting", "the checkpoint's own", "chosen", "values tried"], settings),
        "",
        f"## The {images['held_back']} held-back images",
        "",
        _statement(result, title),
        "",
        *_differences(result),
        "",
        "The difference is chosen minus own, with its 95 % interval (paired bootstrap over images).",
        "",
        "To caption with the chosen settings:",
        "",
        f"```sh\n{result['command']}\n```",
        "",
        f"## The {images['tuning']} images of the tuning half",
        "",
        *markdown_rows([*(f"`{name}`" for name in result["own"]), title, ""], trials),
        "",
        "The chosen settings look better here than they are, because they were chosen by these scores.",
        "",
        *_notes(result),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "its min_length" if value is None else f"{value:g}"


def _statement(result: dict[str, Any], title: str) -> str:
    """Return one sentence about the metric that chose the settings, on the held-back images."""
    if result["own"] == result["chosen"]:
        return "No gain is shown: no other settings were better on the tuning half. Keep the checkpoint's own settings."
    shown = result["held_back"][result["metric"]]
    if "unavailable" in shown:
        return f"{title} is unavailable here, so no gain is shown."
    return {
        "a gain": f"A gain is shown: the interval of {title} is above zero.",
        "a loss": f"A loss is shown: the interval of {title} is below zero. Keep the checkpoint's own settings.",
        "no gain is shown": f"No gain is shown: the interval of {title} includes zero.",
    }[verdict(shown)]


def _differences(result: dict[str, Any]) -> list[str]:
    rows = []
    for metric, shown in result["held_back"].items():
        title = TITLES.get(metric, metric)
        if "unavailable" in shown:
            rows.append([title, "unavailable", "unavailable", "-", "-", "-"])
            continue
        rows.append(
            [
                title,
                f"{shown['own']:.4f}",
                f"{shown['chosen']:.4f}",
                f"{shown['difference']:+.4f} [{shown['low']:+.4f}, {shown['high']:+.4f}]",
                f"{shown['wins']}, {shown['losses']}, {shown['ties']}",
                verdict(shown),
            ]
        )
    header = ["metric", "own", "chosen", "difference", "images better, worse, equal", "shown"]
    return markdown_rows(header, rows)


def _notes(result: dict[str, Any]) -> list[str]:
    """Return lines about the search, the data, the checkpoint and the metrics."""
    halves, (height, width) = result["halves"], result["image_size"]
    end = "the last round changed nothing" if result["settled"] else "more rounds might find better settings"
    grouped = f", ids grouped by `{halves['group']}`" if halves["group"] else ""
    lines = [
        f"* search: one setting after another, runs: {len(result['trials'])}, rounds: {result['rounds']}; {end}",
        f"* data: {result['data']}, split {result['split']}, resized to {height} x {width} px; halves by id, seed "
        f"{halves['seed']}{grouped}",
        f"* checkpoint: {result['checkpoint'].get('name', 'a bundle')}, sha256 "
        f"{result['checkpoint'].get('sha256', 'unknown')}",
    ]
    if result["fixed"]:
        lines.append(f"* fixed in both: `{' '.join(result['fixed'])}`")
    lines += [f"* not tried: `{name}` {', '.join(map(_cell, values))}" for name, values in result["left_out"].items()]
    for metric, shown in result["held_back"].items():
        how = f"unavailable: {shown['unavailable']}" if "unavailable" in shown else f"`{shown['signature']}`"
        lines.append(f"* {TITLES.get(metric, metric)}: {how}")
    return lines


def tune(job: Sweep, tuning: Tuning, log: Log) -> dict[str, Any]:
    """Choose settings on one half of the images by the first metric and compare them with the checkpoint's own settings
    on the other half. Write tuned.md and tuned.json and return the content of tuned.json.

    Options given in `job.decoding` are not tuned. Nor is the number of beams if `job.beams` is a single number. An
    interrupted run resumes when it is called again with the same job. Raises the errors of a sweep, and UsageError if
    the first metric is unavailable. Other unavailable metrics are reported in the result.
    """
    inputs = check_request(job)
    given = job.decoding.replace(num_beams=job.beams[0]) if len(job.beams) == 1 else job.decoding
    if both := [name for name in tuning.grids() if name in given.given]:
        raise UsageError(f"{both[0]} is both fixed and tuned: remove its option, or --tune-grid {both[0]}=...")
    split = choose_split(job, log)
    halves = draw_halves(job, tuning, split)
    log(f"images to choose the settings with: {len(halves[0].images)}, held back: {len(halves[1].images)}")
    metric = job.metrics[0]
    check_metric(metric, halves[0], inputs)
    with lock_output(job.out, log):
        bundle = prepare_bundle(job, log)
        evaluator = Evaluator(Captioner.load(bundle.path), given, inputs, log)
        start = settings_of(evaluator.options({}))
        grids, left_out = choose_grids(job, tuning, evaluator, start, halves)
        for half in halves:
            half.folder.mkdir(exist_ok=True)
            half.write_references()

        found = search(lambda settings: evaluator.value(settings, halves[0], metric), start, grids, effect)
        own, best = found.trials[0], found.best
        held_back = [evaluator.measure(trial.settings, halves[1], job.metrics) for trial in (own, best)]
        trials = [
            {"settings": trial.settings, "value": trial.score, "run": run_file(halves[0], trial.settings).name}
            for trial in found.trials
        ]
        result = about(job, bundle, split) | {
            "images": {half.name: len(half.images) for half in halves},
            "references": {half.name: sum(map(len, half.references.values())) for half in halves},
            "halves": {"seed": tuning.seed, "group": tuning.group},
            "metric": metric,
            "metrics": list(dict.fromkeys(job.metrics)),
            "fixed": flags_of(given),
            "grids": grids,
            "left_out": left_out,
            "trials": trials,
            "rounds": found.rounds,
            "settled": found.settled,
            "own": own.settings,
            "chosen": best.settings,
            "tuning": {"own": own.score, "chosen": best.score},
            "held_back": difference(*held_back),
            "command": command(bundle, with_settings(given, best.settings), halves),
        }
        write_atomically(job.out / "tuned.md", as_markdown(result))
        write_atomically(job.out / "tuned.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def draw_halves(job: Sweep, tuning: Tuning, split: Split) -> tuple[Part, Part]:
    """Return the half for choosing settings and the half that is held back. Raises as choose_images and halve do."""
    whole, folder = choose_images(split, job.limit, job.out), job.out / "tune"
    first, second = halve([image.id for image in whole.images], tuning.seed, tuning.group)
    return whole.select(first, folder, "tuning"), whole.select(second, folder, "held_back")


def choose_grids(
    job: Sweep, tuning: Tuning, evaluator: Evaluator, start: dict[str, Any], halves: tuple[Part, Part]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return {setting: values to try} and {setting: default values that are not valid with this bundle and options}.

    Raises UsageError if values of --tune-grid or --beams are not valid, and if there is nothing to try.
    """
    grids: dict[str, list[Any]] = {}
    left_out: dict[str, list[Any]] = {}
    requested = tuning.grids() | {"num_beams": tuple(dict.fromkeys(job.beams))}
    for half in halves:
        evaluator.captioner.decoding(evaluator.options(start), half.prompts)
    for name in (name for name in GRIDS if name not in evaluator.given.given):
        for value in requested.get(name, GRIDS[name]):
            try:
                for half in halves:
                    evaluator.captioner.decoding(evaluator.options({**start, name: value}), half.prompts)
            except UsageError as error:
                if name in requested:
                    raise UsageError(f"{name} {value} cannot be tried: {error}") from error
                evaluator.log(f"{name} {value} is not tried: {error}")
                left_out.setdefault(name, []).append(value)
            else:
                grids.setdefault(name, []).append(value)
    if all(set(values) <= {start[name]} for name, values in grids.items()):
        raise UsageError("there is nothing to tune: remove options that fix a setting, or add values to --tune-grid")
    return grids, left_out


def command(bundle: Bundle, options: DecodeOptions, halves: tuple[Part, Part]) -> str:
    """Return the command line that captions with these options. The user replaces the words in capitals."""
    prompts = ["--prompts", "PROMPTS"] if any(half.prompts for half in halves) else []
    words = ["engine", "caption", "--bundle", str(bundle.path), *flags_of(options), *prompts]
    return shlex.join([*words, "--input", "IMAGES", "--out", "run.csv"])
