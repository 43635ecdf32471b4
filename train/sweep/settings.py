"""The settings that are tuned: their grids, their names in files and their flags. Knows nothing of data and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.captioner import Captioner
from engine.errors import EngineError, UsageError
from engine.inputs.images import ImageFile
from engine.options import DECODE_OPTIONS, DecodeOptions, option
from engine.scoring.base import Items, MetricInputs, compare
from engine.scoring.files import in_order_of_ids
from engine.scoring.profiles import make_metric
from engine.scoring.score import ScoreReport, measure, score_run
from train.sweep.runs import PromptedSource, caption_run
from train.sweep.sweep import prefixed, score_request

GRIDS: dict[str, tuple[Any, ...]] = {
    "num_beams": (),
    "length_penalty": (0.6, 0.8, 1.0, 1.5, 2.0),
    "repetition_penalty": (1.0, 1.2, 1.5, 2.5),
    "min_new_tokens": (0, 4, 8),
}
"""What is tried where nothing else is asked for, in the order of the search. A sweep has its own numbers of beams."""
IN_FILES = {
    "num_beams": "beams",
    "length_penalty": "length",
    "repetition_penalty": "repetition",
    "min_new_tokens": "min",
}


@dataclass(frozen=True)
class Tuning:
    """Whether a sweep chooses settings, and how. Checked on construction (UsageError)."""

    tune: bool = option(
        False,
        "--tune",
        "Choose decoding settings on one half of the images by the first of --metrics, and compare them with the "
        "checkpoint's own on the other half. Tries --beams; options that are given stay as they are.",
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
        "Regular expression: ids in which it finds the same text, such as a patient's number, stay in one half.",
        metavar="REGEX",
    )
    seed: int = option(0, "--tune-seed", "Another number draws other halves.", least=0)

    def __post_init__(self) -> None:
        if not self.tune and (self.grid is not None or self.group is not None or self.seed):
            raise UsageError("--tune-grid, --tune-group and --tune-seed are for --tune: add it, or leave them out")
        self.grids()

    def grids(self) -> dict[str, tuple[Any, ...]]:
        """Return the values that were asked for, by setting; those of GRIDS are for the others."""
        grids: dict[str, tuple[Any, ...]] = {}
        for text in (self.grid or "").split():
            name, _, listed = text.partition("=")
            if name not in GRIDS or name == "num_beams":
                known = ", ".join(one for one in GRIDS if one != "num_beams")
                raise UsageError(f"--tune-grid {text}: wanted is SETTING=VALUE,VALUE, with one of {known}")
            if name in grids:
                raise UsageError(f"--tune-grid gives {name} twice: list all of its values behind one")
            grids[name] = _values(name, listed)
        return grids


def _values(name: str, listed: str) -> tuple[Any, ...]:
    number, kind = (int, "whole numbers") if DECODE_OPTIONS[name][1].startswith("int") else (float, "numbers")
    try:
        values = [number(one) for one in listed.split(",")]
    except ValueError:
        raise UsageError(f"--tune-grid {name}={listed}: give {kind}, separated by commas") from None
    for value in values:
        DecodeOptions(**{name: value})  # refuses what is out of range
    return tuple(dict.fromkeys(values))


def settings_of(options: DecodeOptions) -> dict[str, Any]:
    """Return the tuned settings of options; min_new_tokens is None where a min_length stands in its place."""
    settings = {name: getattr(options, name) for name in GRIDS}
    if settings["min_new_tokens"] is None and not options.min_length:
        settings["min_new_tokens"] = 0
    return settings


def with_settings(asked: DecodeOptions, settings: Mapping[str, Any]) -> DecodeOptions:
    """Return options in which the settings are given, too."""
    return asked.replace(**{name: value for name, value in settings.items() if value is not None})


def effect(settings: Mapping[str, Any]) -> Hashable:
    """Return what decides the captions: one beam has nothing whose length could be weighed."""
    idle = "length_penalty" if settings["num_beams"] == 1 else None
    return tuple(value for name, value in settings.items() if name != idle)


def in_file_name(settings: Mapping[str, Any]) -> str:
    """Return settings as a part of a file name: beams4_length1_repetition1.5_min0."""
    return "_".join(f"{IN_FILES[name]}{_number(value)}" for name, value in settings.items() if value is not None)


def flags_of(options: DecodeOptions) -> list[str]:
    """Return what is given in options as arguments of `engine caption`; FILE stands for that of --bad-words."""
    words = []
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
        words += [declaration.flag, text]
    return words


def _number(value: Any) -> str:
    """Return a value as it is typed, without the zeros that a float brings."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


Log = Callable[[str], None]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Half:
    """Images of one half, their references by id, the prompts of their captions, and the folder of their files."""

    name: str
    images: list[ImageFile]
    references: dict[str, tuple[str, ...]]
    prompts: dict[str, str] | None
    folder: Path

    @property
    def references_file(self) -> Path:
        """What the half is scored against."""
        return self.folder / f"{self.name}_references.jsonl"

    def run_file(self, settings: Settings) -> Path:
        """Return where the captions with these settings are."""
        return self.folder / f"{self.name}_{in_file_name(settings)}.csv"


@dataclass(frozen=True)
class Bench:
    """What captions and scores. Settings lie over what is `given`, and that over the bundle's."""

    captioner: Captioner
    given: DecodeOptions
    inputs: MetricInputs
    log: Log

    def options(self, settings: Settings) -> DecodeOptions:
        """Return every option of a run with these settings."""
        asked = with_settings(self.given, settings).replace(num_return_sequences=1)
        return asked.over(self.captioner.bundle.generation)

    def measure(self, settings: Settings, half: Half, metrics: tuple[str, ...]) -> ScoreReport:
        """Caption the half, unless its captions are there; return what `engine score` says of them."""
        path = half.run_file(settings)
        log = prefixed(path.stem, self.log)
        source = PromptedSource(self.captioner)
        caption_run(source, self.options(settings), half.images, half.prompts, path, log)
        return score_run(score_request(path, half.references_file, half.images, metrics, self.inputs), log)

    def value(self, settings: Settings, half: Half, metric: str) -> float:
        """Return the value of one metric. Raises EngineError where it has none."""
        (score,) = self.measure(settings, half, (metric,)).scores
        if score.value is None or not math.isfinite(score.value):
            reason = score.unavailable or f"its value is {score.value}"
            raise EngineError(f"{metric} says nothing of {half.run_file(settings)}: {reason}")
        return score.value


def check_metric(metric: str, half: Half, inputs: MetricInputs) -> None:
    """Raise UsageError, before an image is captioned, where the metric that settings are chosen by is unavailable."""
    some = half.images[:2]
    texts = [half.references[image.id] for image in some]
    request = score_request(half.run_file({}), half.references_file, half.images, (metric,), inputs)
    paths = [image.path for image in some] if request.images else None
    items = Items([image.id for image in some], [several[0] for several in texts], texts, paths)
    (score,), _ = measure({metric: make_metric(metric, inputs, {})}, items, lambda _: None)
    if score.unavailable:
        raise UsageError(
            f"{metric} is to choose the settings and is unavailable: {score.unavailable}; or begin --metrics with "
            "another one"
        )


def difference(first: ScoreReport, second: ScoreReport) -> dict[str, dict[str, Any]]:
    """Return, by metric, the values of two runs on the same images, and their paired difference, second minus first,
    with its 95 % interval: what `engine score compare` says.
    """
    measured = [in_order_of_ids(report.items.ids, report.measured)[1] for report in (first, second)]
    found: dict[str, dict[str, Any]] = {}
    for one, other in zip(first.scores, second.scores, strict=True):
        if one.unavailable or other.unavailable:
            found[one.name] = {"unavailable": one.unavailable or other.unavailable}
            continue
        paired = asdict(compare(measured[0][one.name], measured[1][one.name]))
        found[one.name] = {"own": one.value, "chosen": other.value, **paired, "signature": other.signature}
    return found
