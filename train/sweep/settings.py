"""The decoding settings that --tune chooses: grids, names in files, flags, and how one combination is scored."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.captioner import Captioner
from engine.errors import EngineError, UsageError
from engine.options import DECODE_OPTIONS, DecodeOptions, option
from engine.scoring.base import Items, MetricInputs, compare
from engine.scoring.files import in_order_of_ids
from engine.scoring.profiles import make_metric
from engine.scoring.score import ScoreReport, measure, score_run
from train.sweep.runs import Log, Part, caption_run, prefixed

GRIDS: dict[str, tuple[Any, ...]] = {
    "num_beams": (),
    "length_penalty": (0.6, 0.8, 1.0, 1.5, 2.0),
    "repetition_penalty": (1.0, 1.2, 1.5, 2.5),
    "min_new_tokens": (0, 4, 8),
}
"""Default values to try, in the order of the search. The numbers of beams come from --beams."""
IN_FILES = {
    "num_beams": "beams",
    "length_penalty": "length",
    "repetition_penalty": "repetition",
    "min_new_tokens": "min",
}


@dataclass(frozen=True)
class Tuning:
    """Options of `sweep --tune`. Checked on construction; raises UsageError."""

    tune: bool = option(
        False,
        "--tune",
        "Choose decoding settings on one half of the images by the first of --metrics, and compare them with the "
        "checkpoint's own settings on the other half. Tries the values of --beams; other given options stay fixed.",
    )
    grid: str | None = option(
        None,
        "--tune-grid",
        "Other values to try, in quotes: 'length_penalty=0.8,1,2 repetition_penalty=1,1.5 min_new_tokens=0,8'.",
        metavar="GRIDS",
    )
    group: str | None = option(
        None,
        "--tune-group",
        "Regular expression; ids in which it matches the same text, such as a patient number, stay in the same half.",
        metavar="REGEX",
    )
    seed: int = option(0, "--tune-seed", "Seed that divides the images into the two halves.", least=0)

    def __post_init__(self) -> None:
        if not self.tune and (self.grid is not None or self.group is not None or self.seed):
            raise UsageError("--tune-grid, --tune-group and --tune-seed need --tune: add it, or remove them")
        self.grids()

    def grids(self) -> dict[str, tuple[Any, ...]]:
        """Return the values of --tune-grid by setting. Settings that are missing here use GRIDS."""
        grids: dict[str, tuple[Any, ...]] = {}
        for text in (self.grid or "").split():
            name, _, listed = text.partition("=")
            if name not in GRIDS or name == "num_beams":
                known = ", ".join(setting for setting in GRIDS if setting != "num_beams")
                raise UsageError(f"--tune-grid {text}: expected SETTING=VALUE,VALUE with one of {known}")
            if name in grids:
                raise UsageError(f"--tune-grid contains {name} twice: list all of its values once, {name}=VALUE,VALUE")
            number, kind = (int, "whole numbers") if DECODE_OPTIONS[name][1].startswith("int") else (float, "numbers")
            try:
                grids[name] = tuple(dict.fromkeys(number(item) for item in listed.split(",")))
            except ValueError:
                raise UsageError(f"--tune-grid {name}={listed}: expected {kind}, separated by commas") from None
            for value in grids[name]:
                DecodeOptions(**{name: value})  # raises UsageError for a value out of range
        return grids


def settings_of(options: DecodeOptions) -> dict[str, Any]:
    """Return the tuned settings of options. min_new_tokens is None if the options set min_length instead."""
    settings = {name: getattr(options, name) for name in GRIDS}
    if settings["min_new_tokens"] is None and not options.min_length:
        settings["min_new_tokens"] = 0
    return settings


def with_settings(options: DecodeOptions, settings: Mapping[str, Any]) -> DecodeOptions:
    """Return options in which the settings are given as well."""
    return options.replace(**{name: value for name, value in settings.items() if value is not None})


def effect(settings: Mapping[str, Any]) -> Hashable:
    """Return a key that is equal for settings that give the same captions.

    With one beam, length_penalty has no effect: there is no second hypothesis to compare with.
    """
    unused = "length_penalty" if settings["num_beams"] == 1 else None
    return tuple(value for name, value in settings.items() if name != unused)


def in_file_name(settings: Mapping[str, Any]) -> str:
    """Return settings as part of a file name, such as beams4_length1_repetition1.5_min0."""
    return "_".join(f"{IN_FILES[name]}{_number(value)}" for name, value in settings.items() if value is not None)


def flags_of(options: DecodeOptions) -> list[str]:
    """Return the given options as arguments of `engine caption`. The file of --bad-words is written as FILE."""
    arguments = []
    for name, (declaration, _) in DECODE_OPTIONS.items():
        value = getattr(options, name)
        if name not in options.given or not declaration.flag or value is None:
            continue
        if declaration.choices is not None:
            text = next(word for word, meant in declaration.choices.items() if meant == value)
        elif name == "bad_words":
            text = "FILE"
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else _number(value)
        arguments += [declaration.flag, text]
    return arguments


def _number(value: Any) -> str:
    """Format a number as a user would type it: 2 instead of 2.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


Settings = Mapping[str, Any]


def run_file(half: Part, settings: Settings) -> Path:
    """Return the file for the captions of a half with these settings."""
    return half.file(f"{in_file_name(settings)}.csv")


@dataclass(frozen=True)
class Evaluator:
    """Captions and scores a half with given settings. Settings override `given`, which overrides the bundle's."""

    captioner: Captioner
    given: DecodeOptions
    inputs: MetricInputs
    log: Log

    def options(self, settings: Settings) -> DecodeOptions:
        """Return the full options of a run with these settings."""
        asked = with_settings(self.given, settings).replace(num_return_sequences=1)
        return asked.over(self.captioner.bundle.generation)

    def measure(self, settings: Settings, half: Part, metrics: tuple[str, ...]) -> ScoreReport:
        """Caption the half, unless its captions exist, and return the scores that `engine score` computes."""
        path = run_file(half, settings)
        log = prefixed(path.stem, self.log)
        caption_run(self.captioner, self.captioner.decoding(self.options(settings), half.prompts), half, path, log)
        return score_run(half.score_request(path, metrics, self.inputs), log)

    def value(self, settings: Settings, half: Part, metric: str) -> float:
        """Return the value of one metric. Raises EngineError if it is unavailable or not finite."""
        (score,) = self.measure(settings, half, (metric,)).scores
        if score.value is None or not math.isfinite(score.value):
            reason = score.unavailable or f"its value is {score.value}"
            raise EngineError(f"{metric} cannot be computed for {run_file(half, settings)}: {reason}")
        return score.value


def check_metric(metric: str, half: Part, inputs: MetricInputs) -> None:
    """Raise UsageError if the metric that chooses the settings is unavailable. Called before any image is captioned."""
    sample = half.images[:2]
    texts = [half.references[image.id] for image in sample]
    needs_images = half.score_request(Path(), (metric,), inputs).images is not None
    paths = [image.path for image in sample] if needs_images else None
    items = Items([image.id for image in sample], [references[0] for references in texts], texts, paths)
    (score,), _ = measure({metric: make_metric(metric, inputs, {})}, items, lambda _: None)
    if score.unavailable:
        raise UsageError(
            f"{metric}, the first of --metrics, is unavailable and cannot choose the settings: {score.unavailable}; or "
            "put another metric first"
        )


def difference(first: ScoreReport, second: ScoreReport) -> dict[str, dict[str, Any]]:
    """Return, by metric, the values of two runs on the same images and their paired difference, second minus first.

    The difference has a 95 % interval. The numbers are those of `engine score compare`.
    """
    measured = [in_order_of_ids(report.items.ids, report.measured)[1] for report in (first, second)]
    differences: dict[str, dict[str, Any]] = {}
    for own, chosen in zip(first.scores, second.scores, strict=True):
        if own.unavailable or chosen.unavailable:
            differences[own.name] = {"unavailable": own.unavailable or chosen.unavailable}
            continue
        paired = asdict(compare(measured[0][own.name], measured[1][own.name]))
        differences[own.name] = {"own": own.value, "chosen": chosen.value, **paired, "signature": chosen.signature}
    return differences
