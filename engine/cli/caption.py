"""`engine caption`: a directory of images in, run.csv out."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.shared import PATH, SectionCommand, log, rows_option, takes, takes_bundle
from engine.cli.signals import BROKEN_PIPE, end
from engine.errors import UsageError
from engine.options import DecodeOptions
from engine.run.job import Inputs, Outputs
from engine.runtime import Runtime, Workers

if TYPE_CHECKING:  # avoids loading numpy for --help
    from engine.bundle.open import BundleRef
    from engine.checkpoints.cache import ModelRef

EXAMPLE = "Salesforce/blip-image-captioning-base"
"""A model for photos."""
LOG_EVERY_S = 120.0
"""Seconds between two progress lines if standard error is not a terminal."""


@click.command(cls=SectionCommand)
@takes(inputs=Inputs, decoding=DecodeOptions)
@takes_bundle(of_several=True)
@takes(runtime=Runtime)
@rows_option
@takes(workers=Workers, outputs=Outputs)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary as the last line.")
def caption(
    inputs: Inputs,
    decoding: DecodeOptions,
    bundle: BundleRef | ModelRef,
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
    if "num_return_sequences" in decoding.given and (outputs.n_best_out, outputs.calibration) == (None, None):
        raise UsageError("--n-best needs --n-best-out, the file for the captions, or --calibration")
    progress = _progress if bundle.names else _progress_of_demo
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


@click.command()
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, required=True, help="File to write: the file that one run would write.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Merge the outputs of all shards of a run (`engine caption --shard I/N`).

    The files are those of --out, in any order, or of --n-best-out, --timings-out or --review-out.
    """
    from engine.run.shards import merge as merge_shards

    log(f"{merge_shards(files, out)} lines of {len(files)} shards -> {out}")


def _progress_of_demo(length: int) -> AbstractContextManager[Callable[[int], None]]:
    """Log the limits of the embedded demo, but only once captioning starts: errors of the inputs come first."""
    log(
        "note: no --model and no --bundle is given: the embedded demo model is used, which only knows T1-weighted head "
        f"MRI: for other images add --model {EXAMPLE}"
    )
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


FIRST_WAVE = 2.0
"""The first wave ends after this many times the seconds of the first image: 20 tokens may follow a caption of 8."""
WAVE_END = 0.25
"""Fraction of the first image's seconds in which the last images of that wave finish."""


class Pace:
    """Estimate the speed of a run and the time left; `done` of `length` images are finished.

    Images that are decoded in parallel finish in waves: none at first, then many at about the same time. The number of
    images divided by the time since the start is therefore too low, by up to the number of images in parallel. So the
    speed is measured from the end of the first wave, and is None until two more waves have passed.
    """

    def __init__(self, length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.length, self.done = length, 0
        self._clock, self._start = clock, clock()
        self._first_s: float | None = None
        self._since: tuple[float, int] | None = None
        self._latest_s = 0.0

    def update(self, done: int) -> None:
        """Record that `done` images are finished."""
        if done == self.done:
            return
        self.done, self._latest_s = done, self._clock() - self._start
        if self._first_s is None:
            self._first_s = self._latest_s
        # time in units of the first image's: a wave takes about one; a coarse clock may give 0
        waves = self._latest_s / max(self._first_s, 1e-9)
        if waves >= FIRST_WAVE and (self._since is None or waves < FIRST_WAVE + WAVE_END):
            self._since = self._latest_s, done

    @property
    def images_per_s(self) -> float | None:
        """Images per second, or None before it is known."""
        if self._first_s is None or self._since is None:
            return None
        seconds = self._latest_s - self._since[0]
        # a shorter span would count a whole wave, or none, by chance
        return (self.done - self._since[1]) / seconds if seconds > FIRST_WAVE * self._first_s else None

    @property
    def left_s(self) -> float | None:
        """Seconds until all images are finished, or None before it is known."""
        if (speed := self.images_per_s) is None:
            return None
        # counted from the last finished image, so that it decreases while no image finishes
        return max(0.0, (self.length - self.done) / speed - (self._clock() - self._start - self._latest_s))

    def __str__(self) -> str:
        """Return `2.50 images/s, about 12 min left`, or an empty string before that is known."""
        speed, left = self.images_per_s, self.left_s
        return "" if speed is None or left is None else f"{speed:.2f} images/s, about {in_words(left)} left"


def in_words(seconds: float) -> str:
    """Format a duration: `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
