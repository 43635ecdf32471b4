"""The command line: arguments in, one call, an exit code out; heavy imports live inside the commands."""

from __future__ import annotations

import errno
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import click

from engine.cli import machine, report, scoring
from engine.cli.shared import SectionCommand, bundle_option, rows_option, say, takes
from engine.errors import EngineError, UsageError
from engine.inputs.remote import Location
from engine.options import DecodeOptions, Runtime, Workers
from engine.run.job import Inputs, Outputs
from engine.version import __version__

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a program stopped by Ctrl-C (128 + SIGINT) and by a plain kill (128 + SIGTERM)."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as cleanly as Ctrl-C does."""


def _on_sigterm(signum: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise Terminated


class EngineGroup(click.Group):
    """Turns everything a user can cause into one line on stderr and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except EngineError as error:
            self._stop(str(error), error.exit_code)
        except click.UsageError as error:
            self._stop(error.format_message(), UsageError.exit_code)
        except KeyboardInterrupt as error:
            self._stop("stopped", TERMINATED if isinstance(error, Terminated) else INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            # our own files are named when they cannot be written: a full disk without a name is what we print to
            where = error.filename or ("standard output" if error.errno == errno.ENOSPC else None)
            self._stop(f"{error.strerror or error}{f': {where}' if where else ''}", EngineError.exit_code)

    @staticmethod
    def _stop(message: str, exit_code: int) -> NoReturn:
        say(f"error: {message}")
        sys.exit(exit_code)


@click.group(cls=EngineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Caption directories of images with BLIP: the words of Hugging Face, without torch."""


for _command in (
    *(machine.verify, machine.bench, machine.plan, machine.info),
    *(scoring.score, scoring.rerank, scoring.submit, scoring.check),
    report.report,
):
    main.add_command(_command)


@main.command(cls=SectionCommand)
@takes(inputs=Inputs, decoding=DecodeOptions)
@bundle_option
@takes(runtime=Runtime)
@rows_option
@takes(cluster=Workers, outputs=Outputs)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary as the last line.")
def caption(
    inputs: Inputs,
    decoding: DecodeOptions,
    bundle: Location | None,
    runtime: Runtime,
    rows: int | None,
    cluster: Workers,
    outputs: Outputs,
    as_json: bool,
) -> None:
    """Caption a directory of images into a CSV file.

    What is not given comes from the bundle's generation settings, then from Hugging Face's defaults.
    """
    from engine.run.pipeline import caption_directory

    if "num_return_sequences" in decoding.given and outputs.n_best_out is None:
        raise UsageError("--n-best needs --n-best-out, the file for the alternatives")
    signal.signal(signal.SIGTERM, _on_sigterm)
    summary = caption_directory(
        inputs,
        outputs,
        bundle,
        decoding,
        rows=rows,
        runtime=runtime,
        workers=cluster,
        say=say,
        progress=_progress_bar,
    )
    new = summary.captions - summary.resumed
    say(f"{new} captions in {summary.seconds:.1f} s ({summary.images_per_s:.2f} images/s) -> {outputs.out}")
    if summary.empty:
        say(
            f"{summary.empty} of all {summary.captions} captions are empty: the model ended at once, or no hypothesis "
            "was left by the options"
        )
    say(summary.signature)
    if as_json:
        click.echo(json.dumps(asdict(summary)))


@contextmanager
def _progress_bar(length: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with images/s and the time left."""
    start, shown = time.perf_counter(), 0

    def speed(_: object) -> str:
        return f"{shown / (time.perf_counter() - start):.2f} images/s"

    with click.progressbar(
        length=length, label="captioning", file=sys.stderr, show_pos=True, item_show_func=speed
    ) as bar:

        def tell(done: int) -> None:
            nonlocal shown
            bar.update(done - shown, done)
            shown = done

        yield tell
