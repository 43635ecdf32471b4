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

from engine.backends import resolve_runtime
from engine.bundle.open import BundleRef
from engine.bundle.signature import run_signature
from engine.captioner import Captioner, ImageSource
from engine.checkpoints.cache import ModelRef
from engine.errors import UsageError, counted
from engine.host import available_cores, processor
from engine.inputs.images import find_images
from engine.options import DecodeOptions
from engine.runtime import Runtime

MOST_IMAGES = 64
"""Images measured by default; of a folder with fewer, all."""
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
    processor: str
    signature: str

    def table(self) -> list[str]:
        """Return the measurement as lines of text for people, the name of a value in front."""
        rows = {
            "speed": f"{self.images_per_s:.2f} images/s ({1 / self.images_per_s:.3f} s per image)",
            "images": f"{self.images}, {self.side_by_side} in parallel",
            "new tokens": f"{self.new_tokens_mean:.1f} per caption, at most {self.new_tokens_most}; time grows with it",
            "loading": f"{self.load_s:.1f} s",
            "peak memory": "unknown" if self.peak_gib is None else f"{self.peak_gib:.2f} GiB",
            "machine": f"{counted(self.cores, 'core')} of {self.processor}",
        }
        return [f"{name:13}{value}" for name, value in rows.items()]


def synthetic_images(count: int, size: int = 256) -> list[Image.Image]:
    """Return RGB images of smooth random colours, all different, the same on every machine."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return [Image.fromarray(block).resize((size, size), Image.Resampling.BICUBIC) for block in blocks]


def images_to_measure(directory: Path | None, count: int | None, *, recursive: bool = False) -> Sequence[ImageSource]:
    """Return the first `count` images of a directory (None: synthetic images).

    With None for `count` there are MOST_IMAGES, or all of a directory that has fewer. Raises UsageError if there are
    fewer than `count`.
    """
    if directory is None:
        return synthetic_images(count or MOST_IMAGES)
    images = find_images(directory, recursive=recursive).images
    if count is None:
        return images[:MOST_IMAGES]
    if len(images) < count:
        raise UsageError(f"{directory} has {counted(len(images), 'image')}: set --images to {len(images)} or less")
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
    runtime = resolve_runtime(runtime)  # before a conversion, which may take minutes
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
        processor=processor().full_name,
        signature=run_signature(captioner.bundle, captioner.backend.name, options, runtime=runtime),
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
