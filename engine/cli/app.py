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
from pathlib import Path
from typing import Any, NoReturn

import click

from engine.cli import machine, report, scoring
from engine.cli.shared import LOCATION, PATH, bundle_options, decoding_options, say
from engine.errors import EngineError, UsageError
from engine.inputs.remote import Location
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


@main.command()
@click.option(
    "--input", "directory", type=LOCATION, required=True, help="Directory or URI of images (DICOM: extra `dicom`)."
)
@click.option("--out", type=PATH, required=True, help="CSV file to write: ID,Caption.")
@bundle_options
@decoding_options
@click.option("--n-best", "num_return_sequences", type=click.IntRange(1), help="Alternatives an image in --n-best-out.")
@click.option(
    "--sample", "do_sample", is_flag=True, default=None, help="Draw captions instead of searching (--beams 1)."
)
@click.option("--temperature", type=float, help="Of --sample; below 1 likelier words gain.")
@click.option("--top-k", type=click.IntRange(1), help="Of --sample: only so many of the likeliest words.")
@click.option("--top-p", type=float, help="Of --sample: only the likeliest words that reach this probability.")
@click.option("--seed", type=click.IntRange(0), help="Of --sample: the same seed draws the same captions.")
@click.option("--n-best-out", type=PATH, help="JSON lines file for the alternatives.")
@click.option("--timings-out", type=PATH, help="CSV file for the latency of every image: ID,latency_s.")
@click.option("--raw-text", is_flag=True, help="Write the text as Hugging Face decodes it, not detokenised.")
@click.option("--manifest", type=PATH, help="File of ids: caption only these, in this order.")
@click.option("--recursive", is_flag=True, help="Look for images in the folders of the directory, too.")
@click.option("--dicom-frame", type=click.IntRange(0), default=0, help="Frame of DICOM files, counted from 0.")
@click.option("--resume/--no-resume", default=True, help="Go on where the same command was cut off; on by default.")
@click.option("--allow-missing", is_flag=True, help="Write an empty caption for images that cannot be read.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Caption with the workers of a Ray cluster (extra `ray`); one on this machine without an address.",
)
@click.option("--ray-actors", type=click.IntRange(1), help="Workers of --ray; one a GPU, or one per --threads CPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary as the last line.")
def caption(
    directory: Location,
    out: Path,
    bundle: Location | None,
    backend: str,
    threads: int | None,
    plans: Path | None,
    cuda_graphs: bool,
    n_best_out: Path | None,
    timings_out: Path | None,
    raw_text: bool,
    manifest: Path | None,
    recursive: bool,
    dicom_frame: int,
    rows: int | None,
    allow_missing: bool,
    resume: bool,
    ray: str | None,
    ray_actors: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Caption a directory of images into a CSV file.

    What is not given comes from the bundle's generation settings, then from Hugging Face's defaults.
    """
    from engine.run.pipeline import Job, caption_directory

    if given["num_return_sequences"] is not None and n_best_out is None:
        raise UsageError("--n-best needs --n-best-out, the file for the alternatives")
    job = Job(
        directory=directory,
        out=out,
        recursive=recursive,
        dicom_frame=dicom_frame,
        bundle=bundle,
        backend=backend,
        threads=threads,
        plans=plans,
        cuda_graphs=cuda_graphs,
        rows=rows,
        manifest=manifest,
        n_best_out=n_best_out,
        timings_out=timings_out,
        raw_text=raw_text,
        allow_missing=allow_missing,
        resume=resume,
        ray=ray,
        ray_actors=ray_actors,
        options=given,
    )
    signal.signal(signal.SIGTERM, _on_sigterm)
    summary = caption_directory(job, say=say, progress=_progress_bar)
    new = summary.captions - summary.resumed
    say(f"{new} captions in {summary.seconds:.1f} s ({summary.images_per_s:.2f} images/s) -> {out}")
    if summary.empty:
        say(
            f"{summary.empty} of all {summary.captions} captions are empty: the model ended at once, or no hypothesis "
            "was left by the options"
        )
    say(summary.signature)
    if as_json:
        click.echo(json.dumps(asdict(summary)))


@contextmanager
def _progress_bar(length: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr with images/s and the time left."""
    start, done = time.perf_counter(), 0

    def speed(_: object) -> str:
        return f"{done / (time.perf_counter() - start):.2f} images/s"

    with click.progressbar(
        length=length, label="captioning", file=sys.stderr, show_pos=True, item_show_func=speed
    ) as bar:

        def advance() -> None:
            nonlocal done
            done += 1
            bar.update(1, done)

        yield advance
