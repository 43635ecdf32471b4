"""`engine caption`: a directory of images in, run.csv out. Also `engine merge` for shards, and `engine explain`."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.shared import FILES_READ, PATH, SectionCommand, log, rows_option, takes, takes_bundle, verbosity
from engine.cli.signals import BROKEN_PIPE, INTERRUPTED, TERMINATED, Terminated, end
from engine.errors import OutputError, UsageError, counted
from engine.options import CLIP, DEPTH_HELP, DecodeOptions
from engine.run.job import Inputs, Outputs
from engine.runtime import Runtime, Workers

if TYPE_CHECKING:  # for a quick --help
    from engine.bundle.open import BundleRef
    from engine.checkpoints.cache import ModelRef
    from engine.run.pipeline import RunSummary

EXAMPLE = "Salesforce/blip-image-captioning-base"
"""A model for photos."""
LOG_EVERY_S = 120.0
"""Seconds between two progress lines if standard error is not a terminal."""


@click.command(cls=SectionCommand)
@takes(inputs=Inputs, decoding=DecodeOptions)
@takes_bundle(of_several=True, with_task=True)
@takes(runtime=Runtime)
@rows_option
@takes(workers=Workers, outputs=Outputs)
@click.option(
    "--progress",
    "progress_form",
    type=click.Choice(["auto", "json"]),
    default="auto",
    show_default=True,
    help="How to show progress: a bar on a terminal, else lines; json: one line per second on standard error.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary as the last line.")
def caption(
    inputs: Inputs,
    decoding: DecodeOptions,
    bundle: BundleRef | ModelRef,
    runtime: Runtime,
    rows: int | None,
    workers: Workers,
    outputs: Outputs,
    progress_form: str,
    as_json: bool,
) -> None:
    """Caption a directory of images into a CSV file.

    Decoding options override the bundle's generation settings, which override Hugging Face's defaults.
    """
    from engine.files.atomic import check_outputs
    from engine.run.pipeline import caption_directory
    from engine.run.record import ReaderGoneError

    if lists := click.get_current_context().meta.get(FILES_READ):
        check_outputs(outputs.files(), lists)
    if as_json and inputs.watch:
        raise UsageError("--watch ends without a summary: remove --json, or use --progress json")
    if as_json and outputs.is_stream:
        raise UsageError("--json and --out - both write to standard output: remove one of them")
    if "num_return_sequences" in decoding.given and (outputs.n_best_out, outputs.calibration) == (None, None):
        raise UsageError("--n-best needs --n-best-out, the file for the captions, or --calibration")
    show = _progress
    if progress_form == "json":
        show = _progress_json
    elif verbosity.quiet or (outputs.is_stream and sys.stdout is not None and sys.stdout.isatty()):  # None if closed
        show = _no_bar
    run: Callable[..., RunSummary] = caption_directory
    if inputs.watch:
        from engine.run.watch import watch_directory as run
    try:
        summary = run(
            inputs,
            outputs,
            bundle,
            decoding,
            rows=rows,
            runtime=runtime,
            workers=workers,
            log=log,
            progress=show if bundle.names else _after_demo_note(show),
        )
    except ReaderGoneError:
        end(BROKEN_PIPE)
    except KeyboardInterrupt as stopped:
        if not inputs.watch:
            raise
        end(TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED)  # its usual end, not an error
    where = "standard output" if outputs.is_stream else outputs.out
    new = summary.captions - summary.resumed
    kept = f", {summary.resumed} of an earlier run" if summary.resumed else ""
    log(f"{counted(new, 'caption')} in {summary.seconds:.1f} s ({summary.images_per_s:.2f} images/s){kept} -> {where}")
    if summary.unreadable:
        log(f"{counted(summary.unreadable, 'image has', 'images have')} an empty caption: unreadable")
    if summary.empty:
        log(
            f"{counted(summary.empty, 'caption is', 'captions are')} empty, of {summary.captions}: the model ended at "
            "once, or the options ban every hypothesis"
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

    log(f"{counted(merge_shards(files, out), 'line')} of {counted(len(files), 'shard')} -> {out}")


DEMO_NOTE = (
    "note: no --model and no --bundle is given: the embedded demo model is used, which only knows T1-weighted head "
    f"MRI: for other images add --model {EXAMPLE}"
)

Shown = AbstractContextManager[Callable[[int], None]]


def _after_demo_note(show: Callable[[int], Shown]) -> Callable[[int], Shown]:
    """Log the limits of the embedded demo once captioning starts, and only once: errors of the inputs come first."""
    notes = [DEMO_NOTE]

    def shown(length: int) -> Shown:
        while notes:
            log(notes.pop())
        return show(length)

    return shown


@contextmanager
def _no_bar(length: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG001
    """Show no progress: with --quiet, and if the captions themselves appear on the terminal."""
    yield lambda _: None


def _progress(length: int) -> Shown:
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

    pace = Pace(length)

    def report() -> None:
        log(f"captioning: {pace.done} of {counted(length, 'image')}{f', {pace}' if str(pace) else ''}")

    log(f"captioning {counted(length, 'image')}")
    with _repeated(report, LOG_EVERY_S):
        yield pace.update


@contextmanager
def _progress_json(length: int) -> Iterator[Callable[[int], None]]:
    """Print one JSON line per second to stderr, and one at the end; values are null until they are known."""
    pace, start = Pace(length), time.perf_counter()

    def report() -> None:
        speed, left = pace.images_per_s, pace.left_s
        if pace.done == length:
            speed, left = length / (time.perf_counter() - start), 0.0
        values = {"images_per_s": speed and round(speed, 3), "seconds_left": None if left is None else round(left, 1)}
        click.echo(json.dumps({"done": pace.done, "total": length} | values), err=True)

    with _repeated(report, JSON_EVERY_S):
        yield pace.update
    report()


JSON_EVERY_S = 1.0
"""Seconds between two lines of --progress json."""


@contextmanager
def _repeated(report: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `report` every `every_s` seconds, even while no image finishes."""
    ended = threading.Event()

    def repeat() -> None:
        with suppress(OSError, ValueError):  # standard error may be closed
            while not ended.wait(every_s):
                report()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
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


OVERVIEW = "overview.png"
EXPLAIN_FILES = re.compile(r"overview\.png|word_\d{2,}(_[a-z0-9-]+)?\.png|attention\.npz|\.[a-z0-9_.-]+\.tmp")
"""Names of the files in a folder that `engine explain` has written."""
LONGEST_WORD = 40
"""Most characters of a word in a file name."""


@click.command()
@click.argument("image", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder to write: a new or empty one, or an earlier explanation.")
@click.option(
    "--attention-layers",
    metavar="N,N,...",
    help="Decoder layers to average over, counted from 0; by default all.",
)
@click.option(
    "--dicom-frame", type=click.IntRange(0), default=0, show_default=True, help="Frame of DICOM files, counted from 0."
)
@click.option("--high-bit-depth", default=CLIP, show_default=True, help=DEPTH_HELP)
@takes(decoding=DecodeOptions)
@takes_bundle()
def explain(
    image: Path,
    out: Path,
    attention_layers: str | None,
    dicom_frame: int,
    high_bit_depth: str,
    decoding: DecodeOptions,
    bundle: BundleRef | ModelRef,
) -> None:
    """Caption one image and draw where each word looks: a PNG per word, overview.png for papers and attention.npz.

    The caption is printed. docs/attention.md says what such a map shows and what it does not.
    """
    from engine.attention import overview, word_pictures, write_attention
    from engine.captioner import Captioner
    from engine.files.atomic import replace_file
    from engine.inputs.images import ImageFile
    from engine.inputs.pixels import decode_image
    from engine.options import window_of
    from engine.run.job import parse_layers
    from engine.runtime import Runtime

    window_of(high_bit_depth)  # raises UsageError for an invalid value
    layers = parse_layers(attention_layers)
    if not image.is_file():
        raise UsageError(f"{image} is not a file: give one image")
    if out.exists() and (not out.is_dir() or any(EXPLAIN_FILES.fullmatch(path.name) is None for path in out.iterdir())):
        raise UsageError(f"--out {out} is a file or contains other files: name a new folder")
    if image.resolve().parent == out.resolve():  # an earlier overview.png as the image would be replaced
        raise UsageError(f"{image} is inside --out {out}: name another folder")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} does not exist, create it first")
    source = ImageFile(image.stem, image, dicom_frame, None, high_bit_depth)
    if not bundle.names:
        log(DEMO_NOTE)
    with Captioner.open(bundle, Runtime("cpu"), log) as captioner:
        wanted = True if layers is None else layers
        (caption,) = captioner.caption([source], decoding, attention=wanted)
    attention = caption.attention
    assert attention is not None, "it was asked for"
    decoded = decode_image(image, frame=dicom_frame, depth=high_bit_depth)
    pictures = {OVERVIEW: overview(decoded, attention)}
    for number, (word, picture) in enumerate(word_pictures(decoded, attention), 1):
        pictures[_file_name(number, word)] = picture
    try:
        out.mkdir(exist_ok=True)
        for path in out.iterdir():  # those of an earlier caption, which may have had more words
            path.unlink()
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}: choose another --out") from error
    for name, picture in pictures.items():
        content = io.BytesIO()
        picture.save(content, "PNG")
        replace_file(out / name, content.getvalue())
    write_attention(out / "attention.npz", attention)
    click.echo(caption.text)
    log(f"{len(pictures) - 1} words and {OVERVIEW} -> {out}")


def _file_name(number: int, word: str) -> str:
    """Return `word_03_chest.png`: words are untrusted, so only letters, digits and hyphens are kept."""
    plain = re.sub("[^a-z0-9]+", "-", word.lower()).strip("-")[:LONGEST_WORD]
    return f"word_{number:02}_{plain}.png" if plain else f"word_{number:02}.png"
