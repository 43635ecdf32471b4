"""Soak test of challenge size: constant speed, constant memory, and survival of kills, full disks and unreadable files.

    python -m benchmarks.soak --images 17237

First, 500 images and then all images are captioned undisturbed, each in a separate process. The last tenth must be as
fast as the second tenth, and the memory that of 500 images. Then the same corpus, with unreadable files mixed in, is
captioned while the run is killed, terminated and runs out of disk space (benchmarks/faults.py). The corpus is
generated. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.faults import compare_runs, engine_command, mix_in_unreadable, resident_bytes, run_disturbed
from benchmarks.workload import (
    BUILD,
    CHALLENGE_SIZE,
    EXAMPLES,
    describe_machine,
    record_options,
    record_path,
    write_corpus,
)
from engine.bundle.manifest import Bundle
from engine.machine.bench import peak_memory_gib
from engine.options import DecodeOptions
from engine.run.job import Inputs, Outputs
from engine.run.pipeline import caption_directory

FEW = 500
SPEED_BOUND, MEMORY_BOUND = 0.05, 0.10
"""How much slower the last tenth may be than the second, and how much more memory may be used than for FEW images."""
MAX_NEW_TOKENS, NGRAM = 40, 3
ENOUGH_SLOTS = 40
"""A disturbed run with fewer than four times this many images per fault uses fewer slots. Captions arrive in bursts of
about half the slots, and each fault needs a burst before and one after it."""
POINTS = 200
"""Number of samples that are kept for the plot."""

Samples = list[tuple[float, int, int]]


def caption_timed(corpus: Path, out: Path, beams: int) -> tuple[list[float], Samples, float]:
    """Caption a directory into `out`.

    Returns the seconds at which captions came out, samples (seconds, captions, resident bytes), and the peak memory in
    GiB.
    """
    stamps: list[float] = []
    samples: Samples = []

    @contextmanager
    def progress(length: int) -> Iterator[Callable[[int], None]]:
        def update(done: int) -> None:
            if done == len(stamps):
                return  # the last count is reported twice
            stamps.append(time.perf_counter())
            if len(stamps) % max(1, length // POINTS) == 0:
                samples.append((stamps[-1] - start, len(stamps), resident_bytes(os.getpid())))
            if len(stamps) % max(1, length // 20) == 0:
                speed = len(stamps) / (stamps[-1] - start)
                click.echo(f"{len(stamps)} of {length}, {speed:.2f} images/s", err=True)

        yield update

    start = time.perf_counter()
    options = DecodeOptions(num_beams=beams, no_repeat_ngram_size=NGRAM, max_new_tokens=MAX_NEW_TOKENS)
    inputs, outputs = Inputs((corpus,)), Outputs(out, resume=False)
    caption_directory(inputs, outputs, requested=options, log=lambda _: None, progress=progress)
    return [stamp - start for stamp in stamps], samples, peak_memory_gib() or 0.0


def tenth_speed(stamps: list[float], tenth: int) -> float:
    """Return the images/s of one tenth of a run, numbered 1 to 10."""
    edges = [0.0, *stamps]
    first, last = (tenth - 1) * len(stamps) // 10, tenth * len(stamps) // 10
    return (last - first) / (edges[last] - edges[first])


def in_own_process(corpus: Path, out: Path, beams: int) -> tuple[list[float], Samples, float]:
    """Run caption_timed in a new process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(caption_timed, (corpus, out, beams))


def _undisturbed(corpus: Path, out: Path, few: Path, beams: int) -> dict[str, Any]:
    _, _, few_gib = in_own_process(few, out.with_name("soak_few.csv"), beams)
    stamps, samples, many_gib = in_own_process(corpus, out, beams)
    speeds = [tenth_speed(stamps, tenth) for tenth in range(1, 11)]
    is_long = len(stamps) >= 10 * FEW  # in a short run a tenth is mostly start or end
    return {
        "seconds": round(stamps[-1], 1),
        "images_per_s": round(len(stamps) / stamps[-1], 2),
        "images_per_s_by_tenth": [round(speed, 2) for speed in speeds],
        "last_over_second_tenth": round(speeds[9] / speeds[1], 3),
        "peak_gib": round(many_gib, 3),
        f"peak_gib_of_{FEW}": round(few_gib, 3),
        "samples": _thin(samples),
        "judged": is_long,
        "passed": not is_long
        or (speeds[9] >= (1 - SPEED_BOUND) * speeds[1] and many_gib <= (1 + MEMORY_BOUND) * few_gib),
    }


def _disturbed(
    corpus: Path, undisturbed: Path, hostile: int, faults: Sequence[str], beams: int, seed: int
) -> dict[str, Any]:
    folder, out = undisturbed.with_name("soak_hostile"), undisturbed.with_name("soak_disturbed.csv")
    unreadable = mix_in_unreadable(corpus, hostile, folder, seed=seed)
    count = len(list(folder.glob("corpus_*")))
    options = ["--beams", beams, "--no-repeat-ngram", NGRAM, "--max-new-tokens", MAX_NEW_TOKENS]
    slots = count // (4 * max(1, len(faults)))
    if slots < ENOUGH_SLOTS:
        options += ["--rows", max(1, slots) * beams]
    result = run_disturbed(engine_command(folder, out, *options), count, out, unreadable, faults, seed=seed)
    problems = result.problems + compare_runs(undisturbed, out, unreadable)
    return {
        "images": count,
        "unreadable": len(unreadable),
        "skipped_faults": result.skipped,
        "seconds": round(result.seconds, 1),
        "faults": [(round(at, 1), kind, captions) for at, kind, captions in result.faults],
        "samples": _thin(result.samples),
        "problems": problems,
        "passed": not problems,
    }


def _thin(samples: Samples) -> list[tuple[float, int, float]]:
    """Return about POINTS of the samples, with memory in GiB."""
    every = max(1, len(samples) // POINTS)
    return [(round(at, 1), captions, round(size / 2**30, 3)) for at, captions, size in samples[::every]]


@click.command()
@click.option("--images", type=click.IntRange(10), default=CHALLENGE_SIZE, show_default=True, help="Images.")
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True, help="Number of beams.")
@click.option(
    "--kills", type=click.IntRange(0), default=20, show_default=True, help="Number of kill -9 at random moments."
)
@click.option(
    "--terms", type=click.IntRange(0), default=5, show_default=True, help="Number of SIGTERM at random moments."
)
@click.option("--full-disks", type=click.IntRange(0), default=3, show_default=True, help="Number of full disks.")
@click.option(
    "--hostile", type=click.FloatRange(0, 0.5), default=0.01, show_default=True, help="Share of unreadable files."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the faults.")
@record_options
def main(
    images: int,
    beams: int,
    kills: int,
    terms: int,
    full_disks: int,
    hostile: float,
    seed: int,
    out: Path | None,
    record: bool,
) -> None:
    """Caption the corpus with the demo bundle, undisturbed and disturbed, and check both runs."""
    few = write_corpus(BUILD / f"pictures_{FEW}", FEW, EXAMPLES)
    many = write_corpus(BUILD / f"pictures_{images}", images, EXAMPLES)
    faults = ["kill"] * kills + ["term"] * terms + ["full disk"] * full_disks
    random.Random(seed).shuffle(faults)
    undisturbed = _undisturbed(many, BUILD / "soak.csv", few, beams)
    disturbed = _disturbed(many, BUILD / "soak.csv", int(hostile * images), faults, beams, seed)
    report = {
        "benchmark": "soak",
        "machine": describe_machine(),
        "bundle": Bundle.load().digest[:12],
        "setting": {"images": images, "beams": beams, "no_repeat_ngram": NGRAM, "most_new_tokens": MAX_NEW_TOKENS}
        | {"workload": "demo", "kills": kills, "terms": terms, "full_disks": full_disks, "hostile": hostile},
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "passed": undisturbed["passed"] and disturbed["passed"],
    }
    record_path(f"soak_{images}.json", out, record).write_text(json.dumps(report) + "\n")
    shown = {key: value for key, value in report.items() if key not in ("undisturbed", "disturbed")}
    for part, values in (("undisturbed", undisturbed), ("disturbed", disturbed)):
        shown[part] = {key: value for key, value in values.items() if key not in ("samples", "faults")}
    click.echo(json.dumps(shown))
    if not report["passed"]:
        click.echo("error: the run slowed down, its memory grew, or it did not survive: see the record", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
