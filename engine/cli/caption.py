"""`engine caption`: a directory of images in, run.csv out."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from engine.cli.shared import SectionCommand, bundles_option, log, rows_option, takes
from engine.cli.signals import BROKEN_PIPE, end
from engine.errors import UsageError
from engine.options import DecodeOptions
from engine.run.job import Inputs, Outputs
from engine.runtime import Runtime, Workers

if TYPE_CHECKING:  # avoids loading numpy for --help
    from engine.bundle.open import BundlePlace

LOG_EVERY_S = 120.0
"""Seconds between two progress lines if standard error is not a terminal."""


@click.command(cls=SectionCommand)
@takes(inputs=Inputs, decoding=DecodeOptions)
@bundles_option
@takes(runtime=Runtime)
@rows_option
@takes(workers=Workers, outputs=Outputs)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary as the last line.")
def caption(
    inputs: Inputs,
    decoding: DecodeOptions,
    bundle: BundlePlace | None,
    runtime: Runtime,
    rows: int | None,
    workers: Workers,
    outputs: Outputs,
    as_json: bool,
) -> None:
    """Caption a directory of images into a CSV file.

    Decoding options override the bundle's generation settings, which override Hugging Face's defaults.
    """
    from engine.run.pipeline import caption_directory
    from engine.run.record import ReaderGoneError

    if as_json and outputs.is_stream:
        raise UsageError("--json and --out - both write to standard output: remove one of them")
    if "num_return_sequences" in decoding.given and outputs.n_best_out is None:
        raise UsageError("--n-best needs --n-best-out, the file for the captions")
    progress = _progress if bundle is not None else _progress_of_demo
    if outputs.is_stream and sys.stdout is not None and sys.stdout.isatty():  # None if closed, an error later
        progress = _no_bar
    try:
        summary = caption_directory(
            inputs,
            outputs,
            bundle,
            decoding,
            rows=rows,
            runtime=runtime,
            workers=workers,
            log=log,
            progress=progress,
        )
    except ReaderGoneError:
        end(BROKEN_PIPE)
    where = "standard output" if outputs.is_stream else outputs.out
    new = summary.captions - summary.resumed
    log(f"{new} captions in {summary.seconds:.1f} s ({summary.images_per_s:.2f} images/s) -> {where}")
    if summary.empty:
        log(
            f"{summary.empty} of all {summary.captions} captions are empty: the model ended them at once, or the "
            "options ban every hypothesis"
        )
    log(summary.signature)
    if as_json:
        click.echo(json.dumps(asdict(summary)))


def _progress_of_demo(length: int) -> AbstractContextManager[Callable[[int], None]]:
    """Log the limits of the embedded demo, but only once captioning starts: errors of the inputs come first."""
    log("note: no --bundle is given: the embedded demo model is used, which only knows T1-weighted head MRI")
    return _progress(length)


@contextmanager
def _no_bar(length: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001
    """Show no progress: the captions themselves appear on the terminal."""
    yield lambda _: None


def _progress(length: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show a progress bar on a terminal, or lines in a log file."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return _progress_bar(length) if is_terminal else _progress_lines(length)


@contextmanager
def _progress_bar(length: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr with images/s and the time left, once these are known."""
    from engine.run.pipeline import Pace

    pace, shown = Pace(length), 0

    def speed(_: object) -> str:
        return str(pace)

    with click.progressbar(
        length=length,
        label="captioning",
        file=sys.stderr,
        show_pos=True,
        show_eta=False,  # click's estimate counts images in flight as not started; Pace has a better one
        item_show_func=speed,
    ) as bar:

        def update(done: int) -> None:
            nonlocal shown
            pace.update(done)
            bar.update(done - shown, done)
            shown = done

        yield update


@contextmanager
def _progress_lines(length: int) -> Iterator[Callable[[int], None]]:
    """Log a line to stderr at the start and every LOG_EVERY_S seconds, even while no image finishes."""
    from engine.run.pipeline import Pace

    pace, ended = Pace(length), threading.Event()

    def repeat() -> None:
        with suppress(OSError, ValueError):  # standard error may be closed
            while not ended.wait(LOG_EVERY_S):
                log(f"captioning: {pace.done} of {length} images{f', {pace}' if str(pace) else ''}")

    log(f"captioning {length} image{'' if length == 1 else 's'}")
    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield pace.update
    finally:
        ended.set()
        thread.join()
