"""The settings that are tuned: their grids, their names in files and their flags. Knows nothing of data and scores."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.declarations import option
from engine.errors import UsageError
from engine.options import DECODE_OPTIONS, DecodeOptions

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
