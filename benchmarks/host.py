"""Measure the cost of the host: the complete captioner around a device that answers at once, or after given times.

    python -m benchmarks.host                                   # time of the host alone, by stage
    python -m benchmarks.host --device a100 --images 17237      # does the device wait for the host?
    python -m benchmarks.host --against DIR                     # alternating with another checkout, same tokens

No model runs. Tokens follow from the image and the step, so that ids can be compared. The times of the presets are
estimates, because no GPU was available (benchmarks/A100.md). The record is written to build/benchmarks/ (with
--record: benchmarks/results/) and, as one JSON line, to stdout.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.host_worker import pictures
from benchmarks.workload import describe_machine, record_options, record_path

WORKER = Path(__file__).with_name("host_worker.py")
INSTANT = {"encode_s": 0.0, "step_s": 0.0, "row_s": 0.0, "regroup_row_s": 0.0}
DEVICES = {
    "instant": INSTANT,
    "a100": {"encode_s": 0.29e-3, "step_s": 2.0e-3, "row_s": 6.0e-3 / 1024, "regroup_row_s": 1.0e-3 / 256},
    "h100": {"encode_s": 0.16e-3, "step_s": 1.1e-3, "row_s": 3.3e-3 / 1024, "regroup_row_s": 0.5e-3 / 256},
}
"""Estimated seconds for BLIP-base in half precision. A step of 1,024 rows takes 8 ms (A100) or 4.4 ms (H100)."""
JPEG_SIDE = 224


@click.command()
@click.option(
    "--device",
    type=click.Choice(list(DEVICES)),
    default="instant",
    show_default=True,
    help="Simulated device; instant answers at once.",
)
@click.option("--beams", default="1,4,10", show_default=True, help="Numbers of beams, separated by commas.")
@click.option("--rows", default="1024", show_default=True, help="Beams in flight, separated by commas.")
@click.option("--images", type=click.IntRange(1), default=2048, show_default=True, help="Number of images.")
@click.option("--jpeg", is_flag=True, help="Read small JPEG files instead of images in memory.")
@click.option("--sets", type=click.IntRange(1), default=2, show_default=True, help="Sets of slots that alternate.")
@click.option("--encode-batch", type=click.IntRange(1), default=16, show_default=True, help="Images per encode.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs; the median counts.")
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="Another checkout to time alternately.")
@record_options
def main(
    device: str,
    beams: str,
    rows: str,
    images: int,
    jpeg: bool,
    sets: int,
    encode_batch: int,
    repeats: int,
    against: Path | None,
    out: Path | None,
    record: bool,
) -> None:
    """Measure the host."""
    here = Path(__file__).parents[1]
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        order = {"images": images, "sets": sets, "encode_batch": encode_batch, "pictures": ""}
        if jpeg:
            order["pictures"] = write_pictures(Path(folder), images)
        for number in map(int, beams.split(",")):
            for wide in map(int, rows.split(",")):
                setting = order | {"beams": number, "rows": wide}
                checkouts = {"here": here} | ({"there": against} if against else {})
                measured.append(measure(setting, device, checkouts, repeats))
                click.echo(line_of(measured[-1]), err=True)
    report = {"benchmark": "host", "device": device, "estimated_times": DEVICES[device], "order": order}
    report |= {"machine": describe_machine(), "measured": measured}
    path = record_path(f"host_{device}{'_jpeg' if jpeg else ''}{'_against' if against else ''}.json", out, record)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps({"record": str(path), "measured": measured}))


def write_pictures(folder: Path, count: int) -> str:
    """Write distinct small JPEGs into `folder`; return its path."""
    for number, picture in enumerate(pictures(count, JPEG_SIDE, JPEG_SIDE)):
        smooth = Image.fromarray(picture).reduce(16).resize((JPEG_SIDE, JPEG_SIDE))
        stamped = np.asarray(smooth).copy()
        stamped[: 16 * 8].reshape(-1)[: 3 * 16 * JPEG_SIDE * 8][number % 4096 :: 4096] ^= 255
        Image.fromarray(stamped).save(folder / f"{number:06d}.jpg", quality=90)
    return str(folder)


def measure(order: dict[str, Any], device: str, checkouts: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Time the checkouts alternately, then once by stage. With a device that takes time, also time the host alone."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    alone: list[dict[str, Any]] = []
    for _ in range(repeats):
        for name, checkout in checkouts.items():
            runs[name].append(work(checkout, order | {"times": DEVICES[device], "stages": False}))
        if device != "instant":
            alone.append(work(checkouts["here"], order | {"times": INSTANT, "stages": False}))
    if len(digests := {run["ids"] for of_checkout in runs.values() for run in of_checkout}) > 1:
        raise SystemExit(f"{order}: the captions differ ({', '.join(sorted(digests))}): the measurement is void")
    staged = work(checkouts["here"], order | {"times": INSTANT, "stages": True, "images": min(order["images"], 2048)})
    entry: dict[str, Any] = {name: order[name] for name in ("beams", "rows", "images", "sets")}
    for name, of_checkout in runs.items():
        median = sorted(of_checkout, key=lambda run: run["seconds"])[len(of_checkout) // 2]
        entry[name] = {key: median[key] for key in ("seconds", "cpu_s", "tokens", "steps", "shapes", "peak_mib", "ids")}
        entry[name]["images_per_s"] = round(order["images"] / median["seconds"], 1)
        entry[name]["host_ms"] = round(1000 * (median["seconds"] - median["own_s"]) / order["images"], 4)
        entry[name]["serial_ms"] = round(1000 * median["serial_s"] / order["images"], 4)
        entry[name] |= {"device_s": round(median["device_s"], 3), "asked_s": round(median["asked_s"], 3)}
    entry["stages_ms"] = staged["stages_ms"]
    if alone:
        entry["host_s"] = round(statistics.median(run["seconds"] - run["own_s"] for run in alone), 3)
        entry["over_slower"] = round(entry["here"]["seconds"] / max(entry["here"]["device_s"], entry["host_s"]), 3)
    if "there" in entry:
        entry["ratio"] = round(entry["there"]["seconds"] / entry["here"]["seconds"], 3)
    return entry


def work(checkout: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Run the worker with the engine of a checkout; return its report."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(order)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"the worker failed: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def line_of(entry: dict[str, Any]) -> str:
    """Return an entry as one line."""
    here = entry["here"]
    text = (
        f"{entry['beams']} beams, {entry['rows']} rows: {here['images_per_s']} images/s, {here['host_ms']} ms per image"
    )
    if "over_slower" in entry:
        text += f", device {here['device_s']} s, host {entry['host_s']} s, wall {here['seconds']:.2f} s = "
        text += f"{entry['over_slower']} x the slower"
    if "ratio" in entry:
        text += f"; {entry['ratio']} x as fast as there ({entry['there']['images_per_s']})"
    return text


if __name__ == "__main__":
    main()
