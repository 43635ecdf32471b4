"""Commands that turn everything a user can cause into one line on stderr and an exit code: these of the engine, and
those of export, train and benchmarks.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from engine.cli.shared import say
from engine.cli.signals import INTERRUPTED, STOPPED, TERMINATED, Terminated, end, end_on_signals
from engine.errors import EngineError, UsageError

SYNONYMS = (
    ("--input", "--images", "--image", "--image-dir", "--data", "--folder"),
    ("--bundle", "--model", "--checkpoint", "--model-path", "--model-name-or-path"),
    ("--out", "--output", "--output-dir", "--output-file"),
    ("--rows", "--batch-size", "--device-batch"),
    ("--references", "--reference", "--refs", "--ground-truth"),
    ("--run", "--predictions", "--hypotheses", "--captions"),
    ("--backend", "--device"),
)
"""Names that other programs, or other commands of ours, give to one thing."""
WITHOUT_FLAG = {
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
    "bad_words_ids": "bad_words",
    "begin_suppress_tokens": "suppress_tokens",
}
"""Hugging Face's decoding options without an option on the command line, and what is closest to them there."""
LONGEST_SUMMARY = 1000
"""Characters: none is as long, so that none is cut off."""


class OneLine(click.Command):
    """A command whose errors are one line each, with help under -h and --help."""

    def __init__(self, *args: Any, **named: Any) -> None:
        named["context_settings"] = {"help_option_names": ["-h", "--help"]} | (named.get("context_settings") or {})
        super().__init__(*args, **named)

    def main(self, args: Any = None, *more: Any, **named: Any) -> Any:
        if args is None:  # it is what this process was started for
            end_on_signals()
        return super().main(args, *more, **named)

    def make_context(self, *given: Any, **extra: Any) -> click.Context:
        with _one_line_errors():  # those of the options of this command itself
            return super().make_context(*given, **extra)

    def invoke(self, context: click.Context) -> Any:
        with _one_line_errors():
            return super().invoke(context)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr for every error that a user can cause."""
    try:
        yield
    except (EngineError, ImportError) as error:
        _end_if_interrupted(error)
        if isinstance(error, ImportError):
            raise
        _stop(_one_line(error), error.exit_code)
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not an error but the help; click before 8.2 has no such class
            raise
        _stop(hinted(error), UsageError.exit_code)
    except KeyboardInterrupt as error:
        _end_if_interrupted(error)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        # our own files are named when they cannot be written: a full disk without a name is what we print to
        where = error.filename or ("standard output" if error.errno == errno.ENOSPC else None)
        _stop(f"{error.strerror or error}{f': {where}' if where else ''}", EngineError.exit_code)


def _end_if_interrupted(error: BaseException) -> None:
    """End the process if Ctrl-C or SIGTERM caused an error: a library written in C that is interrupted while it is
    imported (pybind11) raises ImportError from the KeyboardInterrupt, as if it were not installed.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            say(STOPPED)
            end(TERMINATED if isinstance(cause, Terminated) else INTERRUPTED)
        cause = cause.__cause__ or cause.__context__


class Group(click.Group):
    """A group whose list of commands shows their summaries whole."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(context)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(limit=LONGEST_SUMMARY)) for name, one in commands])


class OneLineGroup(OneLine, Group):
    """A group of commands whose errors are one line each."""


def _one_line(error: EngineError) -> str:
    """Return the words of an error; what a process of readers raises arrives with its traceback in front."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1] if "Traceback (most recent call last)" in text else text


def hinted(error: click.UsageError) -> str:
    """Return the words of a usage error, with what was probably meant: Hugging Face's names of options, names that
    differ between commands, a pattern that the shell has expanded.
    """
    message = error.format_message()
    options = [] if error.ctx is None else [one for one in error.ctx.command.params if isinstance(one, click.Option)]
    flags = {flag for one in options for flag in one.opts}
    if isinstance(error, click.NoSuchOption):
        name = error.option_name.replace("_", "-").lower()
        field = name.strip("-").replace("-", "_")
        fields = {str(one.name).removeprefix("decoding_"): one.opts[0] for one in options}
        meant = [fields.get(field), fields.get(WITHOUT_FLAG.get(field, ""))]
        meant += [flag for names in SYNONYMS if name in names for flag in names if flag in flags]
        flag = next((flag for flag in meant if flag is not None), None)
        if flag is not None:
            message = f"No such option: {error.option_name}: did you mean {flag}?"
        if flag == "--bundle" and "--checkpoint" not in flags:
            message += " (`python -m export` makes a bundle of a checkpoint)"
    elif message.startswith("Got unexpected extra argument") and "--input" in flags:
        message += ": put quotes around a pattern, as in --input 'folder/*.png', or write --input before each path"
    return message


def _stop(message: str, exit_code: int) -> NoReturn:
    say(f"error: {message}")
    sys.exit(exit_code)
