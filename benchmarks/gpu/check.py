"""Check a machine with a GPU: which backends work, whether their captions are the CPU's, and how fast they are.

    python -m benchmarks.gpu.check --bundle BUNDLE --json out.json

First the machine itself is checked (parts.py): driver, memory, host, kernels. Then each backend captions 8 images,
greedily and with beams, which are compared with the CPU's captions of the same bundle. PyTorch's golden recordings are
replayed. The session is opened twice, as caches should make the second time fast. Images from memory are captioned with
increasing numbers of beams in flight. If a backend works, a profile, two concurrent processes and a run of challenge
size follow (runs.py), with the last bundle. Everything runs in separate processes, so that a crash is an entry in the
report. To check several precisions, give a --bundle for each.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.parts import FIRST
from benchmarks.gpu.runs import LAST
from benchmarks.roofline import DEVICES, Work, count_work, floor_s, model_work
from benchmarks.workload import describe_machine, make_picture
from engine.backends import open_backend
from engine.backends.plans import MODULES, build_plans, target_for
from engine.backends.providers import clashing_runtimes, find_gpu
from engine.backends.shapes import Bounds
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.cli.shared import OneLine
from engine.errors import EngineError
from engine.inputs.images import find_images
from engine.inputs.pixels import decode_image, read_image
from engine.machine.info import collect_info
from engine.machine.verify import verify
from engine.options import DecodeOptions
from engine.runtime import Runtime

EXAMPLES = Path("examples/images")
PARITY_IMAGES = 8
SEARCHES = {"greedy": {"num_beams": 1}, "4 beams, 3-gram ban": {"num_beams": 4, "no_repeat_ngram_size": 3}}
TIMED = "4 beams, 3-gram ban"
WITH_GRAPHS = "+graphs"
WAVES = 8
"""At least this many images are timed per slot. With two, most of the time would be start and end of the run."""
KEPT_BYTES = 8192
"""Number of characters that are kept of the stderr of a failed check."""
CHECKS = ("cuda", "tensorrt", "trt", "trt" + WITH_GRAPHS)
"""Backends to check, the last one with captured CUDA graphs."""
MOST_BEAMS = 4
"""Largest number of beams in SEARCHES and in the golden recordings."""


def make_pixels(bundle: Bundle, count: int) -> NDArray[np.uint8]:
    """Return images of the corpus as input of the bundle's encoder, u8[count,height,width,3]."""
    spec, bases = bundle.image, [decode_image(image.path) for image in find_images(EXAMPLES).images]
    return np.stack(
        [
            read_image(make_picture(i, bases), spec.height, spec.width, spec.resample, resize=spec.resize)
            for i in range(count)
        ]
    )


def options_of(bundle: Bundle, search: str) -> DecodeOptions:
    """Return the options of a search; they override the bundle's settings."""
    return bundle.options(**SEARCHES[search])


def caption_all(captioner: Captioner, pixels: NDArray[np.uint8], search: str, rows: int | None) -> list[dict[str, Any]]:
    """Return the ids and the score of the caption of each image."""
    scheduler = captioner.scheduler(captioner.search(options_of(captioner.bundle, search)), rows)
    best = {i: hypotheses[0] for i, hypotheses in scheduler.decode(pixels)}
    return [{"ids": list(best[i].ids), "score": float(best[i].score)} for i in range(len(pixels))]


def check_one(bundle: Bundle, check: str, images: int, rows: list[int], folder: Path) -> dict[str, Any]:
    """Run one of CHECKS in this process; return its captions and times. Plans are built into `folder`."""
    backend, graphs = check.removesuffix(WITH_GRAPHS), check.endswith(WITH_GRAPHS)
    report: dict[str, Any] = {"backend": check, "precision": bundle.precision}
    runtime = Runtime(backend)
    if backend == "trt":
        start = time.perf_counter()
        runtime = Runtime(backend, plans=build_for(bundle, rows, folder), cuda_graphs=graphs)
        report["build_s"] = time.perf_counter() - start
    start = time.perf_counter()
    captioner = Captioner(bundle, open_backend(bundle, runtime))
    report["first_load_s"] = time.perf_counter() - start
    report["used"] = captioner.backend.name
    pixels = make_pixels(bundle, images)
    report["said"] = {search: caption_all(captioner, pixels[:PARITY_IMAGES], search, None) for search in SEARCHES}
    report["speed"] = []
    for number in rows:
        slots = max(1, number // MOST_BEAMS)
        count = max(images, WAVES * slots)
        timed = pixels[np.arange(count) % len(pixels)]
        caption_all(captioner, timed[: 2 * slots], TIMED, number)  # warm up, including slots that are refilled
        start = time.perf_counter()
        captions = caption_all(captioner, timed, TIMED, number)
        seconds = time.perf_counter() - start
        tokens = sum(len(caption["ids"]) - 1 for caption in captions) / count
        report["speed"].append({"rows": number, "images": count, "images_per_s": count / seconds, "tokens": tokens})
    report["golden"] = [asdict(check) for check in verify(bundle, captioner.backend)]
    del captioner
    start = time.perf_counter()
    open_backend(bundle, runtime)
    report["second_load_s"] = time.perf_counter() - start
    return report


def build_for(bundle: Bundle, rows: list[int], folder: Path) -> Path:
    """Build plans for SEARCHES and the golden recordings, with TensorRT, or TensorRT-RTX if only that is installed."""
    builder = next((name for name, module in MODULES.items() if importlib.util.find_spec(module)), "tensorrt")
    bounds = Bounds.of(bundle, beams=MOST_BEAMS, rows=MOST_BEAMS * max(PARITY_IMAGES, *(row // 4 for row in rows), 1))
    build_plans(bundle, folder, bounds, target_for(builder), lambda _: None)
    return folder


def compare(mine: dict[str, Any], cpu: dict[str, Any]) -> dict[str, Any]:
    """Return for each search the number of captions identical to the CPU's and the largest difference of scores."""
    compared = {}
    for search, theirs in cpu["said"].items():
        pairs = list(zip(mine["said"][search], theirs, strict=True))
        compared[search] = {
            "images": len(pairs),
            "identical": sum(a["ids"] == b["ids"] for a, b in pairs),
            "max_score_difference": max(abs(a["score"] - b["score"]) for a, b in pairs),
        }
    return compared


def in_process(
    bundle: Path, backend: str, images: int, rows: list[int], timeout_s: float, plans: Path | None = None
) -> dict[str, Any]:
    """Run check_one in a separate process. A failure is returned as an entry of the report.

    `plans` is the folder where plans are built, unless it has them already.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "one.json"
        command = [sys.executable, "-m", "benchmarks.gpu.check", "--one", backend, "--bundle", str(bundle)]
        command += ["--json", str(out), "--images", str(images), "--rows", ",".join(map(str, rows))]
        command += ["--plans", str(plans or Path(folder) / "plans")]
        failed = {"backend": backend, "bundle": str(bundle)}
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return failed | {"error": f"timed out after {timeout_s:.0f} s"}
        if result.returncode or not out.exists():
            lines = result.stderr.strip().splitlines() or ["no message"]
            reason = {"error": lines[-1].removeprefix("error: "), "stderr": result.stderr[-KEPT_BYTES:]}
            return failed | reason | {"exit_code": result.returncode}
        return json.loads(out.read_text())


def run_part(name: str, timeout_s: float, *arguments: str) -> dict[str, Any]:
    """Run a part of parts.py, or with arguments one of runs.py, in a separate process. A failure is its result."""
    module = "benchmarks.gpu.runs" if arguments else "benchmarks.gpu.parts"
    command = [sys.executable, "-m", module, name, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"timed out after {timeout_s:.0f} s"}
    if done.returncode:
        return {"error": f"exit code {done.returncode}", "stderr": done.stderr[-KEPT_BYTES:]}
    return json.loads(done.stdout.splitlines()[-1])


def check_bundle(path: Path, checks: tuple[str, ...], images: int, rows: list[int], timeout_s: float) -> Iterator[Any]:
    """Yield an entry for every check of one bundle. The CPU's captions are made first, for comparison."""
    bundle = Bundle.load(path)
    named = {"bundle": bundle.digest[:12], "precision": bundle.precision}
    cpu = in_process(path, "cpu", PARITY_IMAGES, [], timeout_s)
    if "error" in cpu:
        yield named | cpu
        return
    captioner = Captioner(bundle, open_backend(bundle, Runtime("cpu")))
    work = count_work(captioner, make_pixels(bundle, 2 * PARITY_IMAGES), options_of(bundle, TIMED))
    with tempfile.TemporaryDirectory() as plans:  # built once, for all checks of the backend trt
        for check in checks:
            entry = named | in_process(path, check, images, rows, timeout_s, Path(plans))
            if "error" not in entry:
                entry["against_cpu"] = compare(entry, cpu)
                entry["share_of_paper_floor"] = share_of_floor(entry, bundle, work)
                del entry["said"]
            yield entry


def share_of_floor(entry: dict[str, Any], bundle: Bundle, work: Work) -> float | None:
    """Return the theoretical minimum time divided by the best time, or None if the GPU's data sheet is not known."""
    try:
        name = find_gpu().name
    except EngineError:
        return None
    known = next((device for device in DEVICES if device.upper() in name.upper()), None)
    if known is None or not entry["speed"] or bundle.precision not in DEVICES[known].flops:
        return None
    fastest = max(speed["images_per_s"] for speed in entry["speed"])
    return floor_s(work, model_work(bundle), DEVICES[known], 1, bundle.precision) * fastest


def summary(entry: dict[str, Any]) -> str:
    """Return the result of one backend as a line."""
    if "error" in entry:
        return f"failed: {entry['error']}"
    same = ", ".join(f"{c['identical']}/{c['images']} {search}" for search, c in entry["against_cpu"].items())
    golden = sum(check["identical"] for check in entry["golden"]), sum(check["images"] for check in entry["golden"])
    speeds = ", ".join(f"{speed['images_per_s']:.1f} at {speed['rows']} rows" for speed in entry["speed"])
    loads = f"loaded in {entry['first_load_s']:.1f} s, again in {entry['second_load_s']:.1f} s"
    return f"same as the CPU: {same}; as PyTorch: {golden[0]}/{golden[1]}; images/s: {speeds or 'not timed'}; {loads}"


@click.command(cls=OneLine)
@click.option("--bundle", "bundles", type=click.Path(path_type=Path), multiple=True, help="Bundle; may be repeated.")
@click.option("--json", "out", type=click.Path(path_type=Path), required=True, help="Report to write.")
@click.option("--backends", default=",".join(CHECKS), show_default=True, help="Backends, separated by commas.")
@click.option("--images", type=click.IntRange(PARITY_IMAGES), default=512, show_default=True, help="Images to time.")
@click.option("--rows", default="64,256,1024", show_default=True, help="Beams in flight to time.")
@click.option("--timeout", "timeout_s", type=float, default=900.0, show_default=True, help="Limit per check, s.")
@click.option("--one", hidden=True, help="Run only this check, in this process.")
@click.option("--plans", type=click.Path(path_type=Path), hidden=True, help="With --one: folder of plans.")
def main(
    bundles: tuple[Path, ...],
    out: Path,
    backends: str,
    images: int,
    rows: str,
    timeout_s: float,
    one: str | None,
    plans: Path | None,
) -> None:
    """Check backends, print the results and write a report."""
    chosen, numbers = tuple(backends.split(",")), [int(number) for number in rows.split(",") if number]
    paths = bundles or (Bundle.load().path,)
    if one is not None:
        entry = check_one(Bundle.load(paths[0]), one, images, numbers, plans or out.parent / "plans")
        out.write_text(json.dumps(entry) + "\n")
        return
    unknown = set(chosen) - {"cpu", *CHECKS}
    if unknown:
        raise EngineError(f"--backends: unknown {', '.join(sorted(unknown))}; choose from cpu, {', '.join(CHECKS)}")
    gpu = asdict(find_gpu("use --backends cpu")) if set(chosen) - {"cpu"} else None
    report: dict[str, Any] = {
        "benchmark": "gpu_check",
        "machine": describe_machine(),
        "gpu": gpu,
        "info": collect_info(),
        "warning": clashing_runtimes(),
        "parts": {},
        "entries": [],
    }

    def keep_part(part: str, *arguments: str) -> None:
        report["parts"][part] = run_part(part, timeout_s, *arguments)
        out.write_text(json.dumps(report, indent=1) + "\n")  # after each part, so that a later crash loses nothing
        click.echo(f"{part}: {report['parts'][part].get('error', 'done')}", err=True)

    for part in FIRST if gpu else ():
        keep_part(part)
    for path in paths:
        for entry in check_bundle(path, chosen, images, numbers, timeout_s):
            report["entries"].append(entry)
            out.write_text(json.dumps(report, indent=1) + "\n")
            click.echo(f"{entry['backend']}, {entry['precision']}: {summary(entry)}", err=True)
    working = [entry["backend"] for entry in report["entries"] if "error" not in entry and entry["backend"] != "cpu"]
    for part in LAST if gpu and working else ():
        keep_part(part, str(paths[-1]), working[0].removesuffix(WITH_GRAPHS))
    click.echo(out)
    if any("error" in entry for entry in report["entries"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
