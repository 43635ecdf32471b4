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

from engine import __version__, cli_report, cli_scoring
from engine.console import LOCATION, PATH, say
from engine.errors import EngineError, UsageError
from engine.remote import Location

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
            self._stop(f"{error.strerror}: {error.filename or 'standard output'}", EngineError.exit_code)

    @staticmethod
    def _stop(message: str, exit_code: int) -> NoReturn:
        say(f"error: {message}")
        sys.exit(exit_code)


@click.group(cls=EngineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Caption directories of images with BLIP: the words of Hugging Face, without torch."""


for _command in (cli_scoring.score, cli_scoring.rerank, cli_scoring.submit, cli_scoring.check, cli_report.report):
    main.add_command(_command)


def bundle_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options every command that loads a bundle takes."""
    for option in (
        click.option("--cuda-graphs", is_flag=True, help="Of --backend trt: capture steps of one shape, replay them."),
        click.option("--plans", type=PATH, help="Of --backend trt: folder that `engine plan` wrote."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads; all cores when absent."),
        click.option("--backend", default="auto", show_default=True, help="auto, cpu, cuda, tensorrt or trt."),
        click.option("--bundle", type=LOCATION, help="Exported bundle, or its URI; the embedded demo when absent."),
    ):
        command = option(command)
    return command


def _parse_rows(context: click.Context, parameter: click.Parameter, rows: str) -> int | None:  # noqa: ARG001
    if rows == "auto":
        return None
    if not rows.isdecimal() or int(rows) < 1:
        raise UsageError(f"--rows takes a whole number of at least 1, or auto, not {rows!r}")
    return int(rows)


def _parse_early_stopping(context: click.Context, parameter: click.Parameter, value: str | None) -> bool | str | None:  # noqa: ARG001
    return {"false": False, "true": True}.get(value or "", value)


def decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options every command that decodes takes; None means not given, see Bundle.options."""
    for option in (
        click.option(
            "--rows",
            default="auto",
            show_default=True,
            callback=_parse_rows,
            help="Beams decoded side by side, or auto.",
        ),
        click.option("--prompt", help="Text every caption starts with."),
        click.option(
            "--early-stopping",
            type=click.Choice(["false", "true", "never"]),
            callback=_parse_early_stopping,
            help="When beam search may stop.",
        ),
        click.option("--length-penalty", type=float, help="Above 0 favours long captions, below 0 short ones."),
        click.option("--min-new-tokens", type=click.IntRange(0), help="Fewest tokens before a caption may end."),
        click.option("--max-new-tokens", type=click.IntRange(1), help="Most tokens a caption may add to the prompt."),
        click.option(
            "--no-repeat-ngram",
            "no_repeat_ngram_size",
            type=click.IntRange(0),
            help="Never repeat an n-gram of this size; 0: off.",
        ),
        click.option("--beams", "num_beams", type=click.IntRange(1), help="Beams; 1 is greedy."),
    ):
        command = option(command)
    return command


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
    from engine.pipeline import Job, caption_directory

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
        say(f"{summary.empty} of them are empty: the model ended at once, or no hypothesis was left by the options")
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


@main.command()
@click.option("--input", "directory", type=PATH, help="Directory of images; synthetic ones when absent.")
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="Images to caption.")
@bundle_options
@decoding_options
def bench(
    directory: Path | None,
    images: int,
    bundle: Location | None,
    backend: str,
    threads: int | None,
    plans: Path | None,
    cuda_graphs: bool,
    rows: int | None,
    **given: Any,
) -> None:
    """Measure this machine's images/s; the last line is JSON."""
    from engine.bench import images_to_measure, measure_speed

    pictures = images_to_measure(directory, images)
    loading = {"threads": threads, "plans": plans, "cuda_graphs": cuda_graphs}
    speed = measure_speed(bundle, pictures, given, backend=backend, rows=rows, **loading)
    say(
        f"{speed.images_per_s:.2f} images/s ({1 / speed.images_per_s:.3f} s an image) over {speed.images} images, "
        f"{speed.side_by_side} side by side on {speed.cores} cores; loaded in {speed.load_s:.1f} s"
    )
    say(f"{speed.new_tokens_mean:.1f} new tokens a caption, {speed.new_tokens_most} at most: time grows with them")
    click.echo(json.dumps(asdict(speed)))


@main.command()
@bundle_options
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON line.")
def verify(bundle: Location | None, backend: str, as_json: bool, **loading: Any) -> None:
    """Replay PyTorch's answers recorded in the bundle; exit 1 when one differs."""
    from engine.backends import open_backend, require_backend
    from engine.bundle import Bundle
    from engine.verify import verify as replay

    backend = require_backend(backend)
    loaded = Bundle.load(bundle)
    runtime = open_backend(loaded, backend, **loading)
    checks = replay(loaded, runtime)
    for check in checks:
        state = "ok  " if check.passed else "FAIL"
        click.echo(
            f"{state} {check.identical}/{check.images} identical, score difference {check.max_score_difference:.1e}: "
            f"{check.setting}",
            err=as_json,
        )
    if as_json:
        click.echo(json.dumps({"backend": runtime.name, "checks": [asdict(check) for check in checks]}))
    if not all(check.passed for check in checks):
        raise EngineError(f"{loaded.path} does not say what PyTorch said at export: export it again, or report a bug")


@main.command()
@click.option("--bundle", type=PATH, help="Exported bundle; the embedded demo when absent.")
@click.option("--out", type=PATH, help="Folder for the plans; where `--backend trt` looks by itself when absent.")
@click.option("--beams", type=click.IntRange(1), help="Most beams; the bundle's own when absent.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Most new tokens; the bundle's own when absent.")
@click.option("--rows", type=click.IntRange(1), default=1024, show_default=True, help="Most beams side by side.")
@click.option("--builder", type=click.Choice(["tensorrt", "tensorrt-rtx"]), default="tensorrt", show_default=True)
@click.option("--compute-capability", help="Of tensorrt-rtx: the GPU to build for, such as 8.0; this one when absent.")
def plan(
    bundle: Location | None,
    out: Path | None,
    beams: int | None,
    max_new_tokens: int | None,
    rows: int,
    builder: str,
    compute_capability: str | None,
) -> None:
    """Build TensorRT plans of a bundle for `--backend trt`.

    TensorRT builds for the GPU it runs on. TensorRT-RTX needs none, and its plans run on any GPU of one compute
    capability.
    """
    from engine.backends.plans import build_plans, default_folder, target_for
    from engine.backends.shapes import Bounds
    from engine.bundle import Bundle

    target = target_for(builder, compute_capability)
    loaded = Bundle.load(bundle)
    bounds = Bounds.of(loaded, beams=beams, max_new_tokens=max_new_tokens, rows=rows)
    folder = out or default_folder(loaded)
    build_plans(loaded, folder, bounds, target, say)
    say(
        f"up to {bounds.slots} images of {bounds.beams} beams; {target.builder} {target.version}, compute capability "
        f"{target.compute_capability}"
    )
    click.echo(folder)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def info(as_json: bool) -> None:
    """Show versions, backends and what is missing."""
    from engine.info import collect_info

    facts = collect_info()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, entry in value.items():
                click.echo(f"  {key}: {entry}")
        else:
            click.echo(f"{name}: {value}")
