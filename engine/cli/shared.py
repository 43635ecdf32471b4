"""What commands share: options made from their declarations, how a path is read, how a line reaches the user."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import click

from engine.declarations import Option, declared
from engine.errors import UsageError
from engine.inputs.columns import CAPTION_HELP, ID_HELP, PROMPT_HELP, Columns
from engine.inputs.delimited import read_text
from engine.inputs.remote import Location, location, without_secrets
from engine.options import DecodeOptions

ESCAPED = ("Cc", "Cs")
"""Unicode categories that a terminal would obey or cannot show: control characters and bytes that are not UTF-8."""
BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn text around: `gpj.exe` would be shown as `exe.jpg`."""


class PathType(click.Path):
    """A path. An empty one, such as an unset shell variable, would mean the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_refuse_empty(value, param), param, ctx)


PATH = PathType(path_type=Path)


class NameType(click.ParamType):  # type: ignore[type-arg]
    """A text that names something: a checkpoint, a recipe."""

    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:  # noqa: ARG002
        return _refuse_empty(value, param)


NAME = NameType()


class LocationType(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 takes no [Location]
    """A path, or the URI of a folder."""

    name = "path or URI"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Location:  # noqa: ARG002
        return location(_refuse_empty(value, param)) if isinstance(value, str) else value  # type: ignore[return-value]


LOCATION = LocationType()


class LinesType(click.ParamType):  # type: ignore[type-arg]
    """A text file of one entry a line, read at once; blank lines are none."""

    name = "file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:  # noqa: ARG002
        if not isinstance(value, str):
            return value  # type: ignore[return-value]
        lines = read_text(Path(_refuse_empty(value, param))).splitlines()
        return tuple(text for line in lines if (text := line.strip()))


class NumbersType(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers, separated by commas."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return value  # type: ignore[return-value]
        if not all(one.strip().isdecimal() for one in value.split(",")):
            self.fail(f"{value!r} is not a list of whole numbers, as in 101,2003", param, ctx)
        return tuple(int(one) for one in value.split(","))


def _refuse_empty(value: Any, parameter: click.Parameter | None) -> Any:
    """Return a value unless it is an empty text. Raises UsageError."""
    if value == "" and parameter is not None:
        name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
        raise UsageError(f"{name} is empty: give a path or a name (is a shell variable unset?)")
    return value


def say(line: str) -> None:
    """Print one line to stderr. Errors and notes of every command pass here: what file names and URIs in them hold
    neither controls the terminal nor shows a secret.
    """
    click.echo(printable(without_secrets(line)), err=True)


def printable(text: str) -> str:
    """Return a text on one line, with escapes such as `\\x1b` for characters that control a terminal."""
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(character) in ESCAPED or character in BIDI
        else character
        for character in " ".join(text.splitlines())
    )


class SectionOption(click.Option):
    """An option that `--help` shows under a heading of its own."""

    def __init__(self, *arguments: Any, section: str = "Other", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class SectionCommand(click.Command):
    """A command whose `--help` shows its options in sections."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def takes(*, leaving_out: Collection[str] = (), **parts: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of dataclasses: `takes(runtime=Runtime)` passes it `runtime=Runtime(...)`.

    Options whose fields are in `leaving_out` have no flag and keep their defaults. Of DecodeOptions only what was given
    is passed on, for a bundle has a say in the rest.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            for part, kind in parts.items():
                own = {name: values.pop(f"{part}_{name}", None) for name in declared(kind)}
                values[part] = kind(**{name: value for name, value in own.items() if value is not None})
            command(**values)

        for part, kind in reversed(parts.items()):
            for name, (declaration, written) in reversed(declared(kind).items()):
                if declaration.flag and name not in leaving_out:
                    settings = _click_settings(declaration, written, has_default=kind is not DecodeOptions)
                    add = click.option(
                        declaration.flag, f"{part}_{name}", cls=SectionOption, section=part.capitalize(), **settings
                    )
                    call = add(call)
        return call

    return decorate


def _click_settings(declaration: Option, written: str, *, has_default: bool) -> dict[str, Any]:
    """Return click's settings for an option whose type is annotated as `written`."""
    default = declaration.default if has_default else None
    if default is MISSING:
        settings: dict[str, Any] = {"required": True}
    else:
        settings = {"default": default, "show_default": not isinstance(default, bool | None)}
    kind = written.split(" | ")[0]
    if declaration.choices is not None:
        settings |= {"type": click.Choice(list(declaration.choices)), "callback": _choose(declaration.choices)}
    elif kind == "bool":
        settings |= {} if "/" in declaration.flag else {"is_flag": True}
    elif kind == "int":
        settings |= {"type": click.IntRange(declaration.least, declaration.most)}  # type: ignore[arg-type]  # int both
    else:
        settings |= {"type": _TYPES[kind], "multiple": kind == "tuple[Location, ...]"}
    if declaration.bare is not None:
        settings |= {"is_flag": False, "flag_value": declaration.bare}
    return settings | {"help": declaration.help, "metavar": declaration.metavar}


_TYPES = {
    "float": float,
    "str": str,
    "Path": PATH,
    "Location": LOCATION,
    "tuple[Location, ...]": LOCATION,
    "tuple[str, ...]": LinesType(),
    "tuple[int, ...]": NumbersType(),
}


def _choose(choices: Mapping[str, Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    return lambda _context, _parameter, name: None if name is None else choices[name]


def _parse_rows(context: click.Context, parameter: click.Parameter, rows: str) -> int | None:  # noqa: ARG001
    if rows == "auto":
        return None
    if not rows.isdecimal() or int(rows) < 1:
        raise UsageError(f"--rows takes a whole number of at least 1, or auto, not {rows!r}")
    return int(rows)


bundle_option = click.option(
    "--bundle",
    type=LOCATION,
    cls=SectionOption,
    section="Runtime",
    help="Exported bundle, or its URI; the embedded demo when absent.",
)


def bundles_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `bundle`, one or several that caption together."""

    @functools.wraps(command)
    def call(bundles: tuple[Location, ...], weights: tuple[float, ...], **values: Any) -> None:
        from engine.bundle.ensemble import place_of

        command(bundle=place_of(bundles, weights), **values)

    section: dict[str, Any] = {"cls": SectionOption, "section": "Runtime", "multiple": True}
    several = click.option(
        "--bundle",
        "bundles",
        type=LOCATION,
        help="Exported bundle, or its URI; the embedded demo when absent. Several bundles with one vocabulary caption "
        "together: in each step the mean of their log-probabilities counts.",
        **section,
    )
    weight = click.option(
        "--bundle-weight", "weights", type=float, help="Weight in that mean, one for each --bundle.", **section
    )
    return several(weight(call))


def column_options(*roles: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `named`, the columns of its tables that were chosen: of ids, and of each of `roles`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            chosen = {role: values.pop(f"{role}_column", None) for role in ("id", *roles)}
            command(named=Columns(**chosen), **values)

        helps = {"id": ID_HELP, "caption": CAPTION_HELP, "prompt": PROMPT_HELP}
        for role in reversed(("id", *roles)):
            call = click.option(f"--{role}-column", metavar="NAME", help=helps[role])(call)
        return call

    return decorate


rows_option = click.option(
    "--rows",
    default="auto",
    show_default=True,
    callback=_parse_rows,
    cls=SectionOption,
    section="Runtime",
    help="Beams decoded side by side, or auto.",
)
