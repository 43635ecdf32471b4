"""The engine beside Hugging Face `generate` in one process, interleaved, on the same pixels.

    python -m benchmarks.throughput --checkpoint DIR --bundle DIR --images 8 --beams 4 --new-tokens 30
    python -m benchmarks.throughput --checkpoint DIR --bundle DIR --images 32 --spread --new-tokens 64 --pictures DIR

Both start from resized pixels in memory and end with token ids; the ids are compared, and a run with a difference that
is not a tie exits with 1 and is void.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.machine import describe_machine
from engine.captioner import Captioner, slots_for
from engine.decoding.beam import Hypothesis
from engine.decoding.scheduler import Scheduler
from engine.images import RESAMPLING, decode_image, find_images, read_image
from engine.options import DEFAULT_ROWS, DecodeOptions
from export.parity import judge
from export.reference import Reference

Ids = list[tuple[int, ...]]


def synthetic_pictures(count: int, size: int, seed: int = 0) -> list[Image.Image]:
    """Return RGB pictures of smooth random colours, each unlike the others."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return [Image.fromarray(block).resize((size, size), RESAMPLING["bicubic"]) for block in blocks]


def time_interleaved(programs: dict[str, Callable[[], Ids]], repeats: int) -> tuple[dict[str, list[float]], dict]:
    """Run every program once to warm up, then in turn `repeats` times; return seconds of each run, and the ids."""
    results = {name: program() for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            results[name] = program()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True)
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--images", type=click.IntRange(1), default=8, show_default=True)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--no-repeat-ngram", type=click.IntRange(0), default=3, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=30, show_default=True, help="Most new tokens.")
@click.option("--forced/--spread", default=True, help="Every caption that long, or as long as the model says.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Directory of pictures; synthetic ones when absent.")
@click.option("--hf-batch", type=click.IntRange(1), multiple=True, default=(8,), help="Batch sizes for generate.")
@click.option(
    "--rows", type=click.IntRange(1), default=DEFAULT_ROWS, show_default=True, help="Beams side by side in the engine."
)
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads for both; all cores when absent.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
def main(
    checkpoint, bundle, images, beams, no_repeat_ngram, new_tokens, forced, pictures, hf_batch, rows, threads, repeats
) -> None:
    """Measure images/s of the engine and of generate, and print one JSON line."""
    reference = Reference.load(checkpoint)
    captioner = Captioner.load(bundle, backend="cpu", threads=threads)
    if threads:
        torch.set_num_threads(threads)
    options = DecodeOptions(
        num_beams=beams,
        no_repeat_ngram_size=no_repeat_ngram,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens if forced else None,
    )
    spec = captioner.bundle.image
    if pictures is None:
        loaded = synthetic_pictures(images, spec.height)
    else:
        loaded = [decode_image(image.path) for image in find_images(pictures).images[:images]]
        images = len(loaded)
    pixels_u8 = np.stack([read_image(picture, spec.height, spec.width, spec.resample) for picture in loaded])
    pixel_values = reference.pixels(loaded)
    scheduler = Scheduler(captioner.backend, captioner.search(options), num_slots=slots_for(rows, beams))

    said: list[Hypothesis] = []

    def engine() -> Ids:
        results = dict(scheduler.decode(pixels_u8))
        said[:] = [results[i][0] for i in range(images)]
        return [hypothesis.ids for hypothesis in said]

    def generate(batch: int) -> Ids:
        captions = []
        for i in range(0, images, batch):
            captions += reference.generate(pixel_values[i : i + batch], options)
        return [best.ids for best, *_ in captions]

    programs: dict[str, Callable[[], Ids]] = {"engine": engine}
    for size in hf_batch:
        programs[f"generate, batch {size}"] = lambda size=size: generate(size)
    seconds, ids = time_interleaved(programs, repeats)
    per_image = {name: statistics.median(runs) / images for name, runs in seconds.items()}
    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(runs, seconds["engine"], strict=True))
        for name, runs in seconds.items()
        if name != "engine"
    }
    for name, runs in seconds.items():
        spread = f"{min(runs) / images:.3f}-{max(runs) / images:.3f}"
        click.echo(
            f"{name:24} {per_image[name]:.3f} s an image ({spread}), {ratios.get(name, 1):.2f} x engine", err=True
        )
    lengths = sorted(len(one) - 1 for one in ids["engine"])
    agreement = {
        name: _agreement(captioner, reference, loaded, options, said, found)
        for name, found in ids.items()
        if name != "engine"
    }
    summary = {
        "benchmark": "throughput",
        "machine": describe_machine(),
        "bundle": captioner.bundle.digest[:12],
        "setting": {"images": images, "beams": beams, "no_repeat_ngram": no_repeat_ngram, "new_tokens": new_tokens},
        "new_tokens": {"mean": statistics.mean(lengths), "median": lengths[images // 2], "most": lengths[-1]},
        "rows": rows,
        "repeats": repeats,
        "seconds_per_image": per_image,
        "times_engine": ratios,
        "agreement": agreement,
        "ids_sha256": hashlib.sha256(json.dumps(ids["engine"]).encode()).hexdigest()[:16],
    }
    click.echo(json.dumps(summary))
    if any(counts["real"] for counts in agreement.values()):
        click.echo("error: the programs gave different ids that no tie explains, the measurement is void", err=True)
        sys.exit(1)


def _agreement(
    captioner: Captioner,
    reference: Reference,
    pictures: list[Image.Image],
    options: DecodeOptions,
    ours: list[Hypothesis],
    theirs: Ids,
) -> dict[str, int]:
    """Count captions that are identical, and of the others each verdict of export.parity.judge."""
    counts = {"identical": 0, "tie": 0, "batch": 0, "real": 0}
    for picture, mine, expected in zip(pictures, ours, theirs, strict=True):
        verdict = "identical"
        if mine.ids != expected:
            verdict, _ = judge(reference, captioner, picture, options, mine)
        counts[verdict] += 1
    return counts


if __name__ == "__main__":
    main()
