"""What benchmarks share: where records are written, the machine, and a corpus of challenge size from real slices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from engine.inputs.images import find_images
from engine.inputs.pixels import decode_image

RESULTS = Path("benchmarks/results")
"""Records in the repository. The tables of the docs are made from them, and a test compares both."""
SCRATCH = Path("build/benchmarks")
"""Records of trials, outside version control."""


def record_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --out and --record to a command; see record_path."""
    out = click.option(
        "--out", type=click.Path(path_type=Path), help=f"Record to write; the default is a file in {SCRATCH}/."
    )
    record = click.option("--record", is_flag=True, help=f"Write into {RESULTS}/ and replace the record there.")
    return out(record(command))


def record_path(name: str, out: Path | None = None, record: bool = False) -> Path:
    """Return the path of a record and create its folder: `out`, or `name` in RESULTS (with `record`) or SCRATCH."""
    path = out or (RESULTS if record else SCRATCH) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def describe_machine() -> dict[str, object]:
    """Return the date, processor, cores, Python version and the versions of packages that affect results."""
    versions = {}
    for name in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"processor": _processor(), "cores": cores, "python": platform.python_version(), "versions": versions}
    return {"date": date.today().isoformat()} | machine


def _processor() -> str:
    """Return the processor's name, family and model number: in virtual machines the name is often only the vendor's."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        if {"model name", "cpu family", "model"} <= facts.keys():
            return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    return platform.processor() or platform.machine()


CHALLENGE_SIZE = 17_237
"""Number of test images of ImageCLEFmedical Caption 2024."""
LONGER_SIDE = 320
"""Pixels. Most images of ROCOv2 are larger, but a JPEG of this size already costs more to decode than to resize."""


def make_picture(number: int, bases: list[Image.Image]) -> Image.Image:
    """Return image `number`: a base slice rotated by up to 12 degrees, zoomed, shifted, gamma 0.7 to 1.4."""
    rng = np.random.default_rng(number)
    base = bases[number % len(bases)].convert("L")
    scale = LONGER_SIDE / max(base.size)
    base = base.resize((round(base.width * scale), round(base.height * scale)), Image.Resampling.BICUBIC)
    angle, zoom = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.88, 1.12)
    shift = rng.uniform(-0.05, 0.05, 2) * base.size
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    x, y = base.width / 2, base.height / 2
    affine = (cos, sin, x - cos * x - sin * y + shift[0], -sin, cos, y + sin * x - cos * y + shift[1])
    rotated = base.transform(base.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    contrast = (np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.4) * 255).astype(np.uint8)
    return rotated.point(contrast.tolist())


def write_corpus(out: Path, count: int, pictures: Path) -> Path:
    """Write `count` JPEGs made from the images in the folder `pictures` into `out`; existing files are kept."""
    bases = [decode_image(image.path) for image in find_images(pictures).images]
    out.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        path = out / f"corpus_{number:06d}.jpg"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make_picture(number, bases).save(unfinished, "JPEG", quality=90)
            unfinished.rename(path)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    return out
