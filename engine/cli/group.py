"""Commands that turn everything a user can cause into one line on stderr and an exit code: these of the engine, and
those of export, train and benchmarks.
"""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

import click

from engine.cli.shared import say
from engine.cli.signals import INTERRUPTED, STOPPED, TERMINATED, Terminated, end, end_on_signals
from engine.errors import EngineError, UsageError

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

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (EngineError, ImportError) as error:
            _end_if_interrupted(error)
            if isinstance(error, ImportError):
                raise
            _stop(_one_line(error), error.exit_code)
        except click.UsageError as error:
            _stop(error.format_message(), UsageError.exit_code)
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


def _stop(message: str, exit_code: int) -> NoReturn:
    say(f"error: {message}")
    sys.exit(exit_code)
