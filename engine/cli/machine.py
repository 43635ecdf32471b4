"""The commands that check a bundle or this machine: verify, bench, plan, info."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.shared import (
    PATH,
    SectionCommand,
    log,
    printable,
    rows_option,
    takes,
    takes_bundle,
)
from engine.errors import EngineError, counted
from engine.options import DecodeOptions
from engine.runtime import Runtime

if TYPE_CHECKING:  # avoids loading numpy for --help
    from engine.bundle.open import BundleRef
    from engine.checkpoints.cache import ModelRef


@click.command(cls=SectionCommand)
@click.option(
    "--input", "directory", type=PATH, help="Directory of images to measure with; synthetic images by default."
)
@click.option("--recursive", is_flag=True, help="Also look for images in subfolders.")
@click.option(
    "--images",
    type=click.IntRange(1),
    help="Number of images to caption; by default 64, or all of --input if it has fewer.",
)
@takes(decoding=DecodeOptions)
@takes_bundle(of_several=True, with_task=True)
@takes(runtime=Runtime)
@rows_option
def bench(
    directory: Path | None,
    recursive: bool,
    images: int | None,
    decoding: DecodeOptions,
    bundle: BundleRef | ModelRef,
    runtime: Runtime,
    rows: int | None,
) -> None:
    """Measure how many images/s this machine captions: a table on standard error, one JSON line on standard output."""
    from engine.machine.bench import images_to_measure, measure_speed

    pictures = images_to_measure(directory, images, recursive=recursive)
    speed = measure_speed(bundle, pictures, decoding, runtime, rows=rows, log=log)
    for line in speed.table():
        log(line)
    click.echo(json.dumps(asdict(speed)))


@click.command()
@takes_bundle(with_task=True)
@takes(runtime=Runtime, leaving_out=("cpu_precision",))
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON line.")
def verify(bundle: BundleRef | ModelRef, runtime: Runtime, as_json: bool) -> None:
    """Replay the PyTorch outputs recorded in the bundle; exit with 1 if any differs.

    Those of models with tasks are for several tasks; with --task, only one is replayed. The export left out images for
    which the graphs give another caption, because candidates tie or because of the bundle's precision.
    """
    from engine.backends import open_backend, require_backend
    from engine.machine.verify import verify as replay
    from engine.machine.verify import verify_halves

    require_backend(runtime.backend)  # before the bundle is hashed, so that a missing library is reported at once
    loaded = bundle.located(log).open()
    checks = []
    for task in [bundle.task] if bundle.task or not loaded.tasks else loaded.tasks:
        loaded = loaded.for_task(task)
        backend = open_backend(loaded, runtime)  # one at a time: each has the model's weights
        checks += replay(loaded, backend) + verify_halves(loaded, runtime)
    for check in checks:
        state = "ok  " if check.passed else "FAIL"
        click.echo(
            f"{state} {check.identical}/{check.images} identical, score difference {check.max_score_difference:.1e}"
            f"{f', {check.left_out} left out at export' if check.left_out else ''}: {printable(check.setting)}",
            err=as_json,
        )
    if as_json:
        click.echo(json.dumps({"backend": backend.name, "checks": [asdict(check) for check in checks]}))
    if not any(check.images for check in checks):
        raise EngineError(
            f"{loaded.path} has no recorded output to compare with: nothing was verified, export it again"
        )
    if not all(check.passed for check in checks):
        raise EngineError(
            f"{loaded.path} does not reproduce the PyTorch outputs recorded at export: export it again, or report a bug"
        )


@click.command()
@takes_bundle()
@click.option("--out", type=PATH, help="Folder for the plans; by default the one where `--backend trt` looks.")
@click.option("--beams", type=click.IntRange(1), help="Maximum number of beams; by default the bundle's.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Maximum number of new tokens; by default the bundle's.")
@click.option(
    "--rows", type=click.IntRange(1), default=1024, show_default=True, help="Maximum number of beams in flight."
)
@click.option(
    "--builder",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="Library that builds the plans; tensorrt-rtx needs no GPU.",
)
@click.option(
    "--compute-capability", help="GPU to build for with tensorrt-rtx, such as 8.0 or sm_80; by default this machine's."
)
def plan(
    bundle: BundleRef | ModelRef,
    out: Path | None,
    beams: int | None,
    max_new_tokens: int | None,
    rows: int,
    builder: str,
    compute_capability: str | None,
) -> None:
    """Build TensorRT plans of a bundle for `--backend trt`.

    TensorRT builds for the GPU that it runs on. TensorRT-RTX needs no GPU, and its plans run on any GPU of one
    compute capability.
    """
    from engine.backends.plans import build_plans, default_folder, target_for
    from engine.backends.shapes import Bounds

    target = target_for(builder, compute_capability)
    loaded = bundle.located(log).open()
    bounds = Bounds.of(loaded, beams=beams, max_new_tokens=max_new_tokens, rows=rows)
    folder = out or default_folder(loaded)
    build_plans(loaded, folder, bounds, target, log)
    log(
        f"up to {counted(bounds.slots, 'image')} of {counted(bounds.beams, 'beam')}; {target.builder} "
        f"{target.version}, compute capability {target.compute_capability}"
    )
    click.echo(folder)


@click.command()
@takes_bundle(bundle_help="Also show the origin and the settings of this bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def info(bundle: BundleRef | ModelRef, as_json: bool) -> None:
    """Show versions, available backends and what is missing."""
    from engine.machine.info import collect_info, describe_bundle

    facts = collect_info() | (describe_bundle(bundle.located(log).open()) if bundle.names else {})
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for key, entry in value.items():
                click.echo(printable(f"  {key}: {entry}"))
        else:
            click.echo(printable(f"{name}: {value}"))
