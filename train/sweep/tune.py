"""Decoding settings for a checkpoint: chosen on one half of the images of a split, reported on the other half.

    OUT/bundle/                       the exported checkpoint, unless a bundle is given
    OUT/tune/tuning_SETTINGS.csv      captions of the half that settings are chosen on
    OUT/tune/held_back_SETTINGS.csv   captions of the other half: the checkpoint's own settings, and the chosen ones
    OUT/tune/HALF_references.jsonl    what these are scored against, by `engine score compare` too
    OUT/tuned.md, tuned.json

search.py knows how to search, halves.py which image is in which half, settings.py what is tried.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import UsageError
from engine.files.atomic import write_atomically
from engine.options import DecodeOptions
from train.data.dataset import Split
from train.sweep.bench import Bench, Half, check_metric, difference
from train.sweep.halves import halve
from train.sweep.images import choose_images, choose_split, prompts_of
from train.sweep.search import Found, search
from train.sweep.settings import GRIDS, Tuning, effect, flags_of, settings_of, with_settings
from train.sweep.sweep import Sweep, check_request, hold, prepare_bundle, write_references
from train.sweep.tuned import as_markdown

Say = Callable[[str], None]


def tune(job: Sweep, tuning: Tuning, say: Say) -> dict[str, Any]:
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
    split = choose_split(job.data, job.split, job.unpack_into, say, job.named)
    halves = draw_halves(job, tuning, split)
    say(f"{len(halves[0].images)} images choose the settings, {len(halves[1].images)} are held back")
    metric = job.metrics[0]
    check_metric(metric, halves[0], inputs)
    with hold(job.out, say):
        bundle = prepare_bundle(job, say)
        bench = Bench(Captioner.load(bundle.path), given, inputs, say)
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
                bench.say(f"{name} {value} is not tried: {error}")
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
