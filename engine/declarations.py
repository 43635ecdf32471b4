"""How an option is declared, once: its flag, help and limits; any dataclass may have such fields.

Command line, checks, signature and a bundle's generation settings all read the declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Option:
    """What is said of an option beside its type.

    `flag` is its name on the command line, empty where it has none. Numbers lie between `least` and `most`; `choices`
    are the values by their names on the command line. With `bare` the flag may stand without a value and means that;
    `metavar` is how help shows the value. With `sampling` the option only counts where captions are drawn; without
    `in_bundle` a bundle cannot carry it.
    """

    default: Any
    flag: str
    help: str
    least: int | float | None = None
    most: int | float | None = None
    choices: Mapping[str, Any] | None = None
    bare: str | None = None
    metavar: str | None = None
    sampling: bool = False
    in_bundle: bool = True

    def fits(self, value: Any, kind: str) -> bool:
        """Return whether a value is of the type `kind` (the annotation) and within the limits."""
        if value is None:
            return "None" in kind
        if self.choices is not None:
            return any(value is one or (isinstance(one, str) and value == one) for one in self.choices.values())
        if kind.startswith("tuple["):
            return isinstance(value, tuple) and all(_fits_entry(entry, kind) for entry in value)
        types = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}[kind.split(" | ")[0]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return False
        return not isinstance(value, int | float) or (
            (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        )

    def wanted(self, kind: str) -> str:
        """Return in words what fits."""
        if self.choices is not None:
            return " or ".join([", ".join(list(self.choices)[:-1]), list(self.choices)[-1]])
        if kind.startswith("tuple["):
            return LISTED[kind.split(" | ")[0]]
        words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
        limits = [f"of at least {self.least}"] if self.least is not None else []
        limits += [f"at most {self.most}"] if self.most is not None else []
        return f"{words[kind.split(' | ')[0]]} {' and '.join(limits)}".rstrip()


LISTED = {
    "tuple[str, ...]": "a list of texts",
    "tuple[int, ...]": "a list of token ids",
    "tuple[tuple[int, ...], ...]": "a list of lists of token ids",
}
"""Kinds of lists and what they are called."""


def as_tuples(value: Any) -> Any:
    """Return lists, those within lists too, as tuples; JSON has no tuples, and options must not change."""
    return tuple(as_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


def _fits_entry(entry: Any, kind: str) -> bool:
    """Return whether an entry fits the list `kind`: token ids are whole numbers of at least 0."""
    if kind.startswith("tuple[tuple"):
        return isinstance(entry, tuple) and bool(entry) and all(_fits_entry(one, "tuple[int, ...]") for one in entry)
    return isinstance(entry, str) if kind.startswith("tuple[str") else type(entry) is int and entry >= 0


def option(default: Any = MISSING, flag: str = "", help: str = "", **more: Any) -> Any:  # noqa: A002
    """Declare a field of a dataclass as an option; `more` are fields of Option. Without a default it is required."""
    return field(default=default, metadata={"option": Option(default, flag, help, **more)})


def declared(options: type) -> dict[str, tuple[Option, str]]:
    """Return the declared options of a dataclass and their types as written, by the names of their fields."""
    return {one.name: (one.metadata["option"], str(one.type)) for one in fields(options) if "option" in one.metadata}
