"""Shared by all commands: click options built from declarations, parameter types, log lines and one-line errors."""

from __future__ import annotations

import errno
import functools
import re
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from engine.cli.signals import INTERRUPTED, STOPPED, TERMINATED, Terminated, end, end_on_signals
from engine.errors import EngineError, UsageError
from engine.options import (
    CAPTION_HELP,
    DECODE_OPTIONS,
    ID_HELP,
    PRECISIONS,
    PROMPT_HELP,
    DecodeOptions,
    Option,
    declared,
)
from engine.runtime import divide_precision

if TYPE_CHECKING:  # for a quick --help, functions import what only they need
    from engine.inputs.remote import Location

ESCAPED = ("Cc", "Cs")
"""Unicode categories that are escaped: control characters, and surrogates for bytes that are not UTF-8."""
BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that reverse the direction of text: `gpj.exe` would be shown as `exe.jpg`."""


HELP_OPTIONS = ["-h", "--help"]


class PathType(click.Path):
    """A path. An empty one is refused: from an unset shell variable it would mean the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_refuse_empty(value, param), param, ctx)


PATH = PathType(path_type=Path)


class NameType(click.ParamType):  # type: ignore[type-arg]
    """A non-empty name, such as that of a checkpoint or a recipe."""

    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:  # noqa: ARG002
        return _refuse_empty(value, param)


NAME = NameType()


class LocationType(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 is not generic
    """A path, or the URI of a folder."""

    name = "path or URI"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Location:  # noqa: ARG002
        from engine.inputs.remote import location

        return location(_refuse_empty(value, param)) if isinstance(value, str) else value  # type: ignore[return-value]


LOCATION = LocationType()


FILES_READ = "engine: files read"
"""Key of a context's `meta`: the files whose lines are values of options, which no output may replace."""


class LinesType(click.ParamType):  # type: ignore[type-arg]
    """A text file with one entry per line; blank lines are ignored."""

    name = "file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if not isinstance(value, str):
            return value  # type: ignore[return-value]
        from engine.inputs.readers import read_text

        path = Path(_refuse_empty(value, param))
        if ctx is not None:
            ctx.meta.setdefault(FILES_READ, []).append(path)
        lines = read_text(path).splitlines()
        return tuple(text for line in lines if (text := line.strip()))


class NumbersType(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers, separated by commas."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return value  # type: ignore[return-value]
        if not all(number.strip().isdecimal() for number in value.split(",")):
            self.fail(f"{value!r} is not a list of whole numbers such as 101,2003", param, ctx)
        return tuple(int(number) for number in value.split(","))


def _refuse_empty(value: Any, parameter: click.Parameter | None) -> Any:
    """Return a value. Raises UsageError if it is an empty string."""
    if value == "" and parameter is not None:
        name = flag_of(parameter) if isinstance(parameter, click.Option) else parameter.human_readable_name
        raise UsageError(f"{name} is empty: give a path or a name (is a shell variable unset?)")
    return value


SHOWN_IF_QUIET = ("error:", "warning:", "note:", "unreadable:", "skipped in ")
"""Beginnings of the lines that --quiet keeps: nothing is skipped silently."""
DETAIL = "detail: "
"""Beginning of the lines that only --verbose shows."""
_START = time.monotonic()


@dataclass
class Verbosity:
    """What --quiet and --verbose of the current command ask for."""

    quiet: bool = False
    verbose: bool = False


verbosity = Verbosity()


def log(line: str) -> None:
    """Print one line to stderr, for errors and notes of every command, unless --quiet or --verbose decides otherwise.

    Control characters in file names are escaped, and secrets in URIs are removed.
    """
    if line.startswith(DETAIL) and not verbosity.verbose:
        return
    if verbosity.quiet and not line.startswith(SHOWN_IF_QUIET):
        return
    if verbosity.verbose and not line.startswith("error:"):
        line = f"[{time.monotonic() - _START:6.1f} s] {line}"
    if "://" in line:
        from engine.inputs.remote import without_secrets

        line = without_secrets(line)
    click.echo(printable(line), err=True)


def printable(text: str) -> str:
    """Return a text on one line, with characters that control a terminal escaped, such as `\\x1b`."""
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(character) in ESCAPED or character in BIDI
        else character
        for character in " ".join(text.splitlines())
    )


class SectionOption(click.Option):
    """An option that `--help` shows under the heading `section`."""

    def __init__(self, *arguments: Any, section: str = "Other", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class SectionCommand(click.Command):
    """A command whose `--help` groups its options in sections."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def takes(*, leaving_out: Collection[str] = (), **parts: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of dataclasses to a command: `takes(runtime=Runtime)` passes it `runtime=Runtime(...)`.

    Fields in `leaving_out` get no flag and keep their defaults. Options of DecodeOptions have no default here, because
    a bundle may set them.
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
    """Return click's settings for an option with the type annotation `written`."""
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
        raise UsageError(f"--rows must be auto or a whole number of at least 1, not {rows!r}")
    return int(rows)


Decorator = Callable[[Callable[..., None]], Callable[..., None]]

MODEL_HELP = (
    "Checkpoint to use instead of a --bundle: a Hugging Face Hub id (owner/name or owner/name@revision), a folder or a "
    ".pth file. It is converted once and cached."
)
REPEAT_HELP = " Repeat it to average the log-probabilities of bundles with the same vocabulary in each step."


TASK_HELP = (
    "What Florence-2 writes: `caption` (default), `detailed-caption` or `more-detailed-caption`; `<CAPTION>` is "
    "accepted, too."
)


def takes_bundle(
    *,
    of_several: bool = False,
    with_task: bool = False,
    bundle_help: str = "Folder or URI of an exported bundle; by default the embedded demo.",
) -> Decorator:
    """Add --bundle, --model, --precision and --image-size to a command, which gets `bundle`: a BundleRef or a ModelRef.

    Without options it is BundleRef(). A command that captions sets `of_several`: --bundle or --model may be repeated,
    with --bundle-weight, and for --backend torch --precision is passed on as the runtime's. `with_task` adds --task.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(
            bundles: tuple[Location, ...] | Location | None,
            models: tuple[str, ...] | str | None,
            precision: str | None,
            image_size: int | None,
            weights: tuple[float, ...] = (),
            task: str | None = None,
            **values: Any,
        ) -> None:
            from engine.bundle.open import BundleRef
            from engine.checkpoints.cache import ModelRef

            locations: tuple[Location, ...] = _as_tuple(bundles)
            names: tuple[str, ...] = _as_tuple(models)
            if locations and names:
                raise UsageError("--model and --bundle exclude each other: --model also accepts the folder of a bundle")
            if of_several:
                precision, values["runtime_cpu_precision"] = divide_precision(
                    values["runtime_backend"], precision, values["runtime_cpu_precision"]
                )
            if not names and (precision, image_size) != (None, None):
                raise UsageError("--precision and --image-size convert a --model: add --model, or remove them")
            model = ModelRef(names, weights, precision, image_size, task) if names else None
            command(bundle=model or BundleRef(locations, weights, task), **values)

        settings: dict[str, Any] = {"cls": SectionOption, "section": "Runtime", "multiple": of_several}
        repeat = (REPEAT_HELP, " Repeat it to average models, as with --bundle.") if of_several else ("", "")
        options: list[Decorator] = [
            click.option("--bundle", "bundles", type=LOCATION, help=bundle_help + repeat[0], **settings),
            click.option("--model", "models", type=NAME, help=MODEL_HELP + repeat[1], **settings),
            takes_conversion("Runtime", is_run=of_several),
        ]
        if of_several:
            weight_help = "Weight of each --bundle or --model in the average, in their order; equal by default."
            options.append(click.option("--bundle-weight", "weights", type=float, help=weight_help, **settings))
        if with_task:
            options.append(click.option("--task", cls=SectionOption, section="Runtime", help=TASK_HELP))
        return _decorated(call, options)

    return decorate


def _decorated(command: Callable[..., None], options: Iterable[Decorator]) -> Callable[..., None]:
    """Return a command with options, which --help lists in this order."""
    return functools.reduce(lambda decorated, option: option(decorated), reversed([*options]), command)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


WITH_TORCH = " With --backend torch, fp32, fp16 or bf16 is the precision that a float32 bundle is run in."


def takes_conversion(section: str = "Other", *, is_run: bool = False) -> Decorator:
    """Add the options of a conversion to a command: --precision and --image-size. With `is_run` also for torch."""
    precision_help = (
        "Precision to convert a checkpoint to; fp32 by default, the only one with exactly PyTorch's captions."
    )
    options: list[Decorator] = [
        click.option(
            "--precision",
            type=click.Choice((*PRECISIONS, "bf16") if is_run else PRECISIONS),
            cls=SectionOption,
            section=section,
            help=precision_help + WITH_TORCH * is_run,
        ),
        click.option(
            "--image-size",
            type=click.IntRange(1),
            cls=SectionOption,
            section=section,
            help="Image height and width in pixels to convert a checkpoint for: its position table is resized. By "
            "default its own size.",
        ),
    ]
    return lambda command: _decorated(command, options)


def column_options(*roles: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add --id-column and an option for each of `roles` to a command, which gets the Columns `named`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**values: Any) -> None:
            from engine.inputs.columns import Columns

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
    help="Number of beams in flight (images x beams); auto is what suits device, bundle and memory.",
)


def _set_verbosity(_context: click.Context, parameter: click.Parameter, value: bool) -> None:
    setattr(verbosity, str(parameter.name), value)
    if verbosity.quiet and verbosity.verbose:
        verbosity.quiet = verbosity.verbose = False
        raise UsageError("--quiet and --verbose exclude each other: remove one of them")


def add_levels(command: click.Command) -> None:
    """Add -q and -v to a command, unless it has them."""
    helps = {
        ("-q", "--quiet"): "Print only warnings, notes and errors to standard error: no progress and no summary.",
        ("-v", "--verbose"): "Also print details, the seconds since the start, and the traceback of an error.",
    }
    if not any(parameter.name == "quiet" for parameter in command.params):
        for flags, text in helps.items():
            # not exposed: commands do not handle them; `log` does
            command.params.append(
                click.Option([*flags], is_flag=True, expose_value=False, callback=_set_verbosity, help=text)
            )


SYNONYMS = (
    ("--input", "--images", "--image", "--image-dir", "--data", "--folder"),
    ("--model", "--bundle", "--checkpoint", "--model-path", "--model-name-or-path"),
    ("--out", "--output", "--output-dir", "--output-file"),
    ("--rows", "--batch-size", "--device-batch"),
    ("--references", "--reference", "--refs", "--ground-truth"),
    ("--run", "--predictions", "--hypotheses", "--captions"),
    ("--backend", "--device"),
)
"""Names that other programs, or our other commands, use for the same option."""
WITHOUT_FLAG = {
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
    "bad_words_ids": "bad_words",
    "begin_suppress_tokens": "suppress_tokens",
}
"""Decoding options that have no flag, and the closest options that have one."""
LONGEST_SUMMARY = 1000
"""Maximum number of characters of a command's summary; longer than any, so that none is cut off."""


class OneLine(click.Command):
    """A command that reports errors in one line, with help under -h and --help."""

    def __init__(self, *args: Any, **named: Any) -> None:
        named["context_settings"] = {"help_option_names": HELP_OPTIONS} | (named.get("context_settings") or {})
        super().__init__(*args, **named)
        if not isinstance(self, click.Group):
            add_levels(self)

    def main(self, args: Any = None, *more: Any, **named: Any) -> Any:
        if args is None:  # the command owns this process: it is not called by another program
            end_on_signals()
        return super().main(args, *more, **named)

    def make_context(self, *given: Any, **extra: Any) -> click.Context:
        with _one_line_errors():  # errors of this command's options
            return super().make_context(*given, **extra)

    def invoke(self, context: click.Context) -> Any:
        with _one_line_errors():
            return super().invoke(context)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr if an error occurs that a user can cause."""
    try:
        yield
    except (EngineError, ImportError) as error:
        _end_if_interrupted(error)
        if isinstance(error, ImportError):
            raise
        if verbosity.verbose:
            traceback.print_exc()
        _stop(_one_line(error), error.exit_code)
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # shows the help; by name, as click before 8.2 lacks it
            raise
        _stop(hinted(error), UsageError.exit_code)
    except KeyboardInterrupt as error:
        _end_if_interrupted(error)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        # errors of our files have a file name: a full disk without one is that of redirected standard output
        where = error.filename or ("standard output" if error.errno == errno.ENOSPC else None)
        _stop(f"{error.strerror or error}{f': {where}' if where else ''}", EngineError.exit_code)


def _end_if_interrupted(error: BaseException) -> None:
    """End the process if Ctrl-C or SIGTERM caused an error.

    A pybind11 library that is interrupted while it is imported raises ImportError from the KeyboardInterrupt, as if it
    were not installed.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            log(STOPPED)
            end(TERMINATED if isinstance(cause, Terminated) else INTERRUPTED)
        cause = cause.__cause__ or cause.__context__


class Group(click.Group):
    """A group that lists its commands with their full summaries, and adds -h, -q and -v to each of them."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.context_settings.setdefault("help_option_names", HELP_OPTIONS)
        add_levels(cmd)
        super().add_command(cmd, name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(context)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(limit=LONGEST_SUMMARY)) for name, command in commands]
            )


class OneLineGroup(OneLine, Group):
    """A group of commands that report errors in one line."""


def _one_line(error: EngineError) -> str:
    """Return the message of an error, without the traceback that one from a reader process has in front."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1] if "Traceback (most recent call last)" in text else text


def hinted(error: click.UsageError) -> str:
    """Return the message of a usage error with a hint.

    It recognises Hugging Face's names of options, names that differ between commands, options in front of the command,
    patterns that the shell has expanded, and missing and wrong values.
    """
    message = " ".join(error.format_message().split())  # click lists choices in lines of their own
    command = None if error.ctx is None else error.ctx.command
    parameters = [] if command is None else command.params
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    flags = {flag for option in options for flag in option.opts}
    if isinstance(error, click.NoSuchOption):
        name = error.option_name.replace("_", "-").lower()
        field = name.strip("-").replace("-", "_")
        fields = {str(option.name).removeprefix("decoding_"): flag_of(option) for option in options}
        meant = [fields.get(field), fields.get(WITHOUT_FLAG.get(field, ""))]
        meant += [flag for names in SYNONYMS if name in names for flag in names if flag in flags]
        flag = next((flag for flag in meant if flag is not None), None)
        if flag is not None:
            message = f"No such option: {error.option_name}: did you mean {flag}?"
        elif isinstance(command, click.Group) and (owners := _commands_with(error.option_name, command)):
            message = f"No such option: {error.option_name}: give it after the command: {', '.join(owners)}"
        elif any(name in names for names in SYNONYMS) or field in DECODE_OPTIONS:  # click's guesses would mislead
            message = f"No such option: {error.option_name}: --help lists the options of this command"
        if flag == "--bundle" and "--checkpoint" not in flags:
            message += " (`python -m export` converts a checkpoint to a bundle)"
    elif (
        isinstance(error, click.BadParameter) and getattr(error.param, "name", None) == "images" and "--input" in flags
    ):
        message = "--images is the number of images: did you mean --input?"
    elif isinstance(error, click.MissingParameter) and isinstance(error.param, click.Option):
        wanted = _wanted(error.param)
        message = f"{flag_of(error.param)} is missing: " + (f"give {wanted}" if wanted else "this command needs it")
    elif isinstance(error, click.BadOptionUsage) and "requires an argument" in message:
        message = f"{error.option_name} has no value: give one after it"
    elif isinstance(error, click.BadParameter) and isinstance(error.param, click.Option):
        wanted, value = _wanted(error.param), WRONG_VALUE.fullmatch(error.message)
        if wanted and value:
            message = f"{flag_of(error.param)} must be {wanted}, not {value[1]}"
    elif message.startswith("Got unexpected extra argument") and "--input" in flags:
        message += ": put quotes around a pattern, as in --input 'folder/*.png', or write --input before each path"
    return message


WRONG_VALUE = re.compile(r"(.+) is not (?:a valid \w+(?: range)?|in the range .*|one of .*)\.", re.DOTALL)
"""Click's message for a value that an option does not accept."""


def flag_of(option: click.Parameter) -> str:
    """Return the flag by which messages name an option: `--out`, not `-o`."""
    return max(option.opts, key=len)


def _wanted(option: click.Option) -> str | None:
    """Return in words which values an option takes: numbers, or one of a list; None for other options."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    if isinstance(kind, click.IntRange | click.FloatRange):
        words = "a whole number" if isinstance(kind, click.IntRange) else "a number"
        bounds = [] if kind.min is None else [f"{'above' if kind.min_open else 'at least'} {kind.min}"]
        bounds += [] if kind.max is None else [f"{'below' if kind.max_open else 'at most'} {kind.max}"]
        return ", ".join((words, " and ".join(bounds))) if bounds else words
    names: dict[object, str] = {click.INT: "a whole number", click.FLOAT: "a number"}
    return names.get(kind)


def _commands_with(flag: str, group: click.Group) -> list[str]:
    """Return the names of the commands of a group that have an option."""
    return [name for name, command in group.commands.items() if any(flag in option.opts for option in command.params)]


def _stop(message: str, exit_code: int) -> NoReturn:
    log(f"error: {message}")
    sys.exit(exit_code)
