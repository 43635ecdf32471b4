"""Measure how fast this machine captions, for `engine bench`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from engine.backends import require_backend
from engine.bundle.open import BundleRef
from engine.bundle.signature import run_signature
from engine.captioner import Captioner, ImageSource
from engine.checkpoints.cache import ModelRef
from engine.errors import UsageError
from engine.host import available_cores
from engine.inputs.images import find_images
from engine.options import DecodeOptions
from engine.runtime import Runtime

WARM_UP = 64
"""Images captioned before the measurement: enough to fill every slot, so that memory is allocated and threads run."""


@dataclass(frozen=True)
class Speed:
    """One measurement. `seconds` covers reading, captioning and detokenising all images, but not loading the bundle."""

    images: int
    seconds: float
    images_per_s: float
    load_s: float
    new_tokens_mean: float
    new_tokens_most: int
    side_by_side: int
    peak_gib: float | None
    cores: int
    signature: str


def synthetic_images(count: int, size: int = 256) -> list[Image.Image]:
    """Return RGB images of smooth random colours, all different, the same on every machine."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return [Image.fromarray(block).resize((size, size), Image.Resampling.BICUBIC) for block in blocks]


def images_to_measure(directory: Path | None, count: int, *, recursive: bool = False) -> Sequence[ImageSource]:
    """Return the first `count` images of a directory (None: synthetic images). Raises UsageError if there are fewer."""
    if directory is None:
        return synthetic_images(count)
    images = find_images(directory, recursive=recursive).images
    if len(images) < count:
        raise UsageError(f"{directory} has {len(images)} images: set --images to {len(images)} or less")
    return images[:count]


def measure_speed(
    bundle: BundleRef | ModelRef,
    images: Sequence[ImageSource],
    requested: DecodeOptions,
    runtime: Runtime,
    *,
    rows: int | None = None,
    log: Callable[[str], None],
) -> Speed:
    """Load a bundle and time it on `images`; `requested` overrides the bundle's settings."""
    require_backend(runtime.backend, runtime.cpu_precision)  # before a conversion, which may take minutes
    bundle = bundle.located(log)  # not part of the time to load it
    start = time.perf_counter()
    captioner = Captioner.open(bundle, runtime, many_images=True)
    load_s = time.perf_counter() - start
    options = requested.over(captioner.bundle.generation)
    search = captioner.search(options)
    list(captioner.caption(images[:WARM_UP], options, rows=rows))
    start = time.perf_counter()
    captions = list(captioner.caption(images, options, rows=rows))
    seconds = time.perf_counter() - start
    lengths = [len(caption.ids) - len(search.prompt) for caption in captions]
    return Speed(
        images=len(images),
        seconds=seconds,
        images_per_s=len(images) / seconds,
        load_s=load_s,
        new_tokens_mean=statistics.mean(lengths),
        new_tokens_most=max(lengths),
        side_by_side=min(len(images), captioner.scheduler(search, rows).concurrency),
        peak_gib=peak_memory_gib(),
        cores=available_cores(),
        signature=run_signature(captioner.bundle, captioner.backend.name, options, cpu_precision=runtime.cpu_precision),
    )


def peak_memory_gib() -> float | None:
    """Return the peak memory of this process in GiB, or None if the system does not report it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
