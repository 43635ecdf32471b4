"""What a benchmark runs on: the machine, and a directory of challenge size made of real voxels."""

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
"""Records in the repository: tables of the docs are made of them, and a test compares both."""
SCRATCH = Path("build/benchmarks")
"""Records of trials."""


def record_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --out and --record; see record_path."""
    out = click.option("--out", type=click.Path(path_type=Path), help=f"Record to write; in {SCRATCH}/ when absent.")
    record = click.option("--record", is_flag=True, help=f"Write into {RESULTS}/, over the record that is there.")
    return out(record(command))


def record_path(name: str, out: Path | None = None, record: bool = False) -> Path:
    """Return the path of a record, its folder made: `out`, else `name` in RESULTS with `record`, or in SCRATCH."""
    path = out or (RESULTS if record else SCRATCH) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def describe_machine() -> dict[str, object]:
    """Return the date, processor, cores, Python and the versions that decide a result."""
    versions = {}
    for name in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": _processor(), "cores": cores, "python": platform.python_version(), "versions": versions}
    return {"date": date.today().isoformat()} | found


def _processor() -> str:
    """Return the processor's name, with the numbers of its kind: virtual machines often give a maker's name alone."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        if {"model name", "cpu family", "model"} <= facts.keys():
            return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    return platform.processor() or platform.machine()


CHALLENGE_SIZE = 17_237
"""Test images of ImageCLEFmedical Caption 2024."""
LONGER_SIDE = 320
"""Pixels; most of ROCOv2's pictures are larger, a JPEG of this size already costs more to decode than to resize."""


def make_picture(number: int, bases: list[Image.Image]) -> Image.Image:
    """Return picture `number`: a base slice turned by up to 12 degrees, zoomed, shifted, gamma 0.7 to 1.4."""
    rng = np.random.default_rng(number)
    base = bases[number % len(bases)].convert("L")
    scale = LONGER_SIDE / max(base.size)
    base = base.resize((round(base.width * scale), round(base.height * scale)), Image.Resampling.BICUBIC)
    angle, zoom = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.88, 1.12)
    shift = rng.uniform(-0.05, 0.05, 2) * base.size
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    x, y = base.width / 2, base.height / 2
    affine = (cos, sin, x - cos * x - sin * y + shift[0], -sin, cos, y + sin * x - cos * y + shift[1])
    turned = base.transform(base.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    contrast = (np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.4) * 255).astype(np.uint8)
    return turned.point(contrast.tolist())


def write_corpus(out: Path, count: int, pictures: Path) -> Path:
    """Write `count` JPEGs made from the pictures of a directory into `out`; those already there are kept."""
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
