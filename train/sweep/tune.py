"""Two halves of the images of a split: one to choose settings on, one to report them on. Knows nothing of captions."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import DataError, UsageError
from engine.files.atomic import write_atomically
from engine.inputs.ids import join_some
from engine.options import DecodeOptions
from train.data.dataset import Split, draw
from train.sweep.runs import choose_images, choose_split, prompts_of
from train.sweep.settings import (
    GRIDS,
    Bench,
    Half,
    Tuning,
    check_metric,
    difference,
    effect,
    flags_of,
    settings_of,
    with_settings,
)
from train.sweep.sweep import TITLES, Sweep, check_request, hold, markdown_rows, prepare_bundle, write_references

FEWEST = 2
"""Images of a half; a difference has no interval with fewer."""


def halve(ids: Sequence[str], seed: int, group: str | None = None) -> tuple[list[str], list[str]]:
    """Return (tuning, held back): all ids, each in one half, in the order given.

    Who is in which half depends on the ids and the seed, not on their order. Ids that share a group, the part that
    the regular expression `group` matches (its first group where it has one), stay together; without it each id is
    alone. The halves are as equal as the groups allow. Raises UsageError for a pattern that is none, DataError where
    ids lack a group or a half would have fewer than FEWEST images.
    """
    members: dict[str, list[str]] = {}
    for name, own in zip(ids, _groups(ids, group), strict=True):
        members.setdefault(own, []).append(name)
    drawn = sorted(members, key=lambda own: (draw(own, seed), own))
    sizes = [sum(len(members[own]) for own in drawn[:cut]) for cut in range(len(drawn) + 1)]
    cut = min(range(len(sizes)), key=lambda cut: abs(2 * sizes[cut] - len(ids)))
    if min(sizes[cut], len(ids) - sizes[cut]) < FEWEST:
        alone = "" if group is None else f" in {len(drawn)} groups"
        raise DataError(
            f"{len(ids)} images{alone} do not make two halves of at least {FEWEST} images: tune on more of them"
        )
    tuning = {name for own in drawn[:cut] for name in members[own]}
    return [name for name in ids if name in tuning], [name for name in ids if name not in tuning]


def _groups(ids: Sequence[str], group: str | None) -> list[str]:
    """Return the group of each id."""
    if group is None:
        return list(ids)
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UsageError(f"--tune-group {group} is no regular expression: {error}") from error
    found = [pattern.search(name) for name in ids]
    parts = [match and match[1 if pattern.groups else 0] for match in found]
    without = [name for name, part in zip(ids, parts, strict=True) if not part]
    if without:
        raise DataError(
            f"--tune-group {group} matches nothing in {len(without)} of {len(ids)} ids ({join_some(without, 3)}): "
            "it must find the group of every id"
        )
    return [str(part) for part in parts]


MOST_ROUNDS = 5
"""Small grids settle after two or three."""


@dataclass(frozen=True)
class Trial:
    """Settings by name, and their score: the higher, the better."""

    settings: dict[str, Any]
    score: float


@dataclass(frozen=True)
class Found:
    """How a search went: every trial in its order, the start first, and the best, of equal ones the earliest.

    `settled` says that the last of the `rounds` changed nothing; else they were used up.
    """

    trials: list[Trial]
    best: Trial
    rounds: int
    settled: bool


def all_of(settings: Mapping[str, Any]) -> Hashable:
    """Return what tells settings apart where each of them counts."""
    return tuple(sorted(settings.items()))


def search(
    score: Callable[[dict[str, Any]], float],
    start: Mapping[str, Any],
    grids: Mapping[str, Sequence[Any]],
    effect: Callable[[Mapping[str, Any]], Hashable] = all_of,
    most_rounds: int = MOST_ROUNDS,
) -> Found:
    """Search from `start` for the settings with the highest score: each setting of `grids` in turn takes the best of
    its values while the others stay, round after round, until a round changes nothing.

    `score` is asked once for settings with one `effect`. Only a higher score changes a setting.
    """
    trials: dict[Hashable, Trial] = {}

    def tried(settings: dict[str, Any]) -> Trial:
        key = effect(settings)
        if key not in trials:
            trials[key] = Trial(settings, score(settings))
        return trials[key]

    best, rounds, settled = tried(dict(start)), 0, False
    while not settled and rounds < most_rounds:
        rounds, before = rounds + 1, best
        for name, values in grids.items():
            for trial in [tried({**best.settings, name: value}) for value in values]:
                if trial.score > best.score:
                    best = trial
        settled = best is before
    return Found(list(trials.values()), best, rounds, settled)


VERDICTS = {"gain": "a gain", "loss": "a loss", "none": "no gain is shown"}


def verdict(shown: dict[str, Any]) -> str:
    """Return `gain` or `loss` where the interval of a difference lies on that side of zero, else `none`."""
    return "gain" if shown["low"] > 0 else "loss" if shown["high"] < 0 else "none"


def as_markdown(result: dict[str, Any]) -> str:
    """Return what tuned.json holds for people: what is shown on the images held back first, then how it came about."""
    name, images = result["checkpoint"].get("name", "a bundle"), result["images"]
    title = TITLES.get(result["metric"], result["metric"])
    lines = [
        f"# {name}, split {result['split']}: decoding settings chosen by {title}",
        "",
        f"Chosen on {images['tuning']} images, compared on {images['held_back']} others that the search has not seen.",
        "",
        *_settings(result),
        "",
        f"## The {images['held_back']} images held back",
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
        *_trials(result, title),
        "",
        "The chosen settings look better here than they are, for they were chosen by these scores.",
        "",
        *_notes(result),
    ]
    return "\n".join(lines) + "\n"


def _settings(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"`{name}`",
            _cell(value),
            _cell(result["chosen"][name]),
            ", ".join(map(_cell, result["grids"].get(name, ()))) or "given, not tuned",
        ]
        for name, value in result["own"].items()
    ]
    return markdown_rows(["setting", "the checkpoint's own", "chosen", "values tried"], rows)


def _cell(value: Any) -> str:
    return "its min_length" if value is None else f"{value:g}"


def _statement(result: dict[str, Any], title: str) -> str:
    """Return in a sentence what the images held back show of the metric that chose."""
    if result["own"] == result["chosen"]:
        return "No gain is shown: no other settings were better on the tuning half, so the checkpoint keeps its own."
    shown = result["held_back"][result["metric"]]
    if "unavailable" in shown:
        return f"{title} is unavailable here, so no gain is shown."
    return {
        "gain": f"A gain is shown: the interval of {title} lies above zero.",
        "loss": f"A loss is shown: the interval of {title} lies below zero. Keep the checkpoint's own settings.",
        "none": f"No gain is shown: the interval of {title} includes zero.",
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
                VERDICTS[verdict(shown)],
            ]
        )
    header = ["metric", "own", "chosen", "difference", "images better, worse, equal", "shown"]
    return markdown_rows(header, rows)


def _trials(result: dict[str, Any], title: str) -> list[str]:
    rows = []
    for trial in result["trials"]:
        marks = [word for word in ("own", "chosen") if trial["settings"] == result[word]]
        rows.append([*map(_cell, trial["settings"].values()), f"{trial['value']:.4f}", ", ".join(marks)])
    return markdown_rows([*(f"`{name}`" for name in result["own"]), title, ""], rows)


def _notes(result: dict[str, Any]) -> list[str]:
    """Return with what it was made."""
    halves, (height, width) = result["halves"], result["image_size"]
    end = "the last changed nothing" if result["settled"] else "more rounds might find better ones"
    grouped = f", ids grouped by `{halves['group']}`" if halves["group"] else ""
    lines = [
        f"* search: one setting after the other, runs: {len(result['trials'])}, rounds: {result['rounds']}; {end}",
        f"* data: {result['data']}, split {result['split']}, resized to {height} x {width} px; halves by id, seed "
        f"{halves['seed']}{grouped}",
        f"* checkpoint: {result['checkpoint'].get('name', 'a bundle')}, sha256 "
        f"{result['checkpoint'].get('sha256', 'unknown')}",
    ]
    if result["fixed"]:
        lines.append(f"* given, for both: `{' '.join(result['fixed'])}`")
    lines += [f"* not tried: `{name}` {', '.join(map(_cell, some))}" for name, some in result["left_out"].items()]
    for metric, shown in result["held_back"].items():
        how = f"unavailable: {shown['unavailable']}" if "unavailable" in shown else f"`{shown['signature']}`"
        lines.append(f"* {TITLES.get(metric, metric)}: {how}")
    return lines


Log = Callable[[str], None]


def tune(job: Sweep, tuning: Tuning, log: Log) -> dict[str, Any]:
    """Choose settings on one half of the images by the first metric, compare them with the checkpoint's own on the
    other half, write tuned.md and tuned.json and return what the latter holds.

    What `job.decoding` gives is not tuned, nor the number of beams where `job.beams` is one number. Goes on where the
    same job was cut off. Raises what a sweep raises, and UsageError where the first metric is unavailable; another
    one is reported as such.
    """
    inputs = check_request(job)
    given = job.decoding.replace(num_beams=job.beams[0]) if len(job.beams) == 1 else job.decoding
    if twice := [name for name in tuning.grids() if name in given.given]:
        raise UsageError(f"{twice[0]} is both fixed and tuned: leave out its option, or --tune-grid {twice[0]}=...")
    split = choose_split(job.data, job.split, job.unpack_into, log, job.named)
    halves = draw_halves(job, tuning, split)
    log(f"{len(halves[0].images)} images choose the settings, {len(halves[1].images)} are held back")
    metric = job.metrics[0]
    check_metric(metric, halves[0], inputs)
    with hold(job.out, log):
        bundle = prepare_bundle(job, log)
        bench = Bench(Captioner.load(bundle.path), given, inputs, log)
        start = settings_of(bench.options({}))
        grids, left_out = choose_grids(job, tuning, bench, start, halves)
        for half in halves:
            half.folder.mkdir(exist_ok=True)
            write_references(half.references_file, half.references)

        def score(settings: dict[str, Any]) -> float:
            return bench.value(settings, halves[0], metric)

        found = search(score, start, grids, effect)
        own, chosen = (bench.measure(one, halves[1], job.metrics) for one in (start, found.best.settings))
        result = _about(job, tuning, bundle, split, halves) | {
            "fixed": flags_of(given),
            "grids": grids,
            "left_out": left_out,
            **_search_as_json(found, halves[0]),
            "held_back": difference(own, chosen),
            "command": command(bundle, with_settings(given, found.best.settings), halves),
        }
        write_atomically(job.out / "tuned.md", as_markdown(result))
        write_atomically(job.out / "tuned.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def draw_halves(job: Sweep, tuning: Tuning, split: Split) -> tuple[Half, Half]:
    """Return the half that settings are chosen on and the one that is held back. Raises what choose_images and halve
    raise.
    """
    images, references = choose_images(split, job.limit)
    by_id = {image.id: image for image in images}
    drawn = halve(list(by_id), tuning.seed, tuning.group)
    chosen = [[by_id[name] for name in ids] for ids in drawn]
    tuning_half, held_back = (
        Half(name, some, {image.id: references[image.id] for image in some}, prompts_of(split, some), job.out / "tune")
        for name, some in zip(("tuning", "held_back"), chosen, strict=True)
    )
    return tuning_half, held_back


def choose_grids(
    job: Sweep, tuning: Tuning, bench: Bench, start: dict[str, Any], halves: tuple[Half, Half]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return {setting: values to try}, and the usual values that do not fit the bundle or what is given.

    Raises UsageError where values that were asked for do not fit, and where nothing is left to try.
    """
    grids: dict[str, list[Any]] = {}
    left_out: dict[str, list[Any]] = {}
    asked = tuning.grids() | {"num_beams": tuple(dict.fromkeys(job.beams))}
    for half in halves:
        bench.captioner.searches(bench.options(start), half.prompts)
    for name in (name for name in GRIDS if name not in bench.given.given):
        for value in asked.get(name, GRIDS[name]):
            try:
                for half in halves:
                    bench.captioner.searches(bench.options({**start, name: value}), half.prompts)
            except UsageError as error:
                if name in asked:
                    raise UsageError(f"{name} {value} cannot be tried: {error}") from error
                bench.log(f"{name} {value} is not tried: {error}")
                left_out.setdefault(name, []).append(value)
            else:
                grids.setdefault(name, []).append(value)
    if all(set(values) <= {start[name]} for name, values in grids.items()):
        raise UsageError("nothing is left to tune: leave out options that fix a setting, or add values to --tune-grid")
    return grids, left_out


def command(bundle: Bundle, options: DecodeOptions, halves: tuple[Half, Half]) -> str:
    """Return the command line that captions with these options; words in capitals are the user's."""
    prompts = ["--prompts", "PROMPTS"] if any(half.prompts for half in halves) else []
    words = ["engine", "caption", "--bundle", str(bundle.path), *flags_of(options), *prompts]
    return shlex.join([*words, "--input", "IMAGES", "--out", "run.csv"])


def _about(job: Sweep, tuning: Tuning, bundle: Bundle, split: Split, halves: tuple[Half, Half]) -> dict[str, Any]:
    return {
        "checkpoint": dict(bundle.checkpoint),
        "bundle": bundle.digest,
        "image_size": [bundle.image.height, bundle.image.width],
        "data": str(job.data),
        "split": split.name,
        "images": {half.name: len(half.images) for half in halves},
        "references": {half.name: sum(map(len, half.references.values())) for half in halves},
        "halves": {"seed": tuning.seed, "group": tuning.group},
        "metric": job.metrics[0],
        "metrics": list(dict.fromkeys(job.metrics)),
    }


def _search_as_json(found: Found, half: Half) -> dict[str, Any]:
    return {
        "trials": [
            {"settings": trial.settings, "value": trial.score, "run": half.run_file(trial.settings).name}
            for trial in found.trials
        ],
        "rounds": found.rounds,
        "settled": found.settled,
        "own": found.trials[0].settings,
        "chosen": found.best.settings,
        "tuning": {"own": found.trials[0].score, "chosen": found.best.score},
    }
