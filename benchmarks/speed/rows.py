"""How many rows side by side are worth it: the engine's images/s as --rows grows.

python -m benchmarks.rows --workload demo
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click

from benchmarks.setting.machine import describe_machine, record_options, record_path
from benchmarks.setting.workload import MAX_NEW_TOKENS, prepare, read_pixels
from engine.captioner import Captioner


@click.command()
@click.option("--workload", "name", type=click.Choice(sorted(MAX_NEW_TOKENS)), default="demo", show_default=True)
@click.option("--images", type=click.IntRange(1), default=256, show_default=True)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rows", type=click.IntRange(1), multiple=True, default=(16, 32, 64, 128, 256, 512), show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@record_options
def main(
    name: str, images: int, beams: int, rows: tuple[int, ...], repeats: int, out: Path | None, record: bool
) -> None:
    """Time each number of rows in turn and keep the record."""
    workload = prepare(name, images)
    captioner = Captioner.load(workload.bundle, backend="cpu")
    pixels = read_pixels(workload, captioner.bundle)
    search = captioner.search(workload.options(beams))
    seconds: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(repeats):
        for count in rows:
            start = time.perf_counter()
            list(captioner.scheduler(search, count).decode(pixels))
            seconds[count].append(time.perf_counter() - start)
            click.echo(f"{count} rows: {images / seconds[count][-1]:.2f} images/s", err=True)
    speeds = {count: round(images / statistics.median(taken), 2) for count, taken in seconds.items()}
    report = {
        "benchmark": "rows",
        "workload": name,
        "machine": describe_machine(),
        "bundle": captioner.bundle.digest[:12],
        "beams": beams,
        "images": images,
        "repeats": repeats,
        "images_per_s": speeds,
    }
    record_path(f"rows_{name}_{beams}beams.json", out, record).write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
