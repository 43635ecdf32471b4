"""A challenge-sized run of the real command's pipeline: is the last tenth as fast as the second, does memory stay?

    python -m benchmarks.soak --images 17237

The corpus is made on the spot (benchmarks.corpus). A run of 500 images in a process of its own gives the memory to
compare with. Exits with 1 when a bound is broken.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks.corpus import CHALLENGE_SIZE, write_corpus
from benchmarks.machine import describe_machine
from benchmarks.workload import BUILD, EXAMPLES
from engine.bench import peak_memory_gib
from engine.pipeline import Job, caption_directory

RESULTS = Path("benchmarks/results")
FEW = 500
SPEED_BOUND, MEMORY_BOUND = 0.05, 0.10
"""The last tenth may be this share slower than the second tenth, and memory this share above a run of FEW images."""


def caption_timed(corpus: Path, out: Path, beams: int) -> tuple[list[float], float]:
    """Caption a directory into `out`; return the seconds at which captions came out, and the peak memory in GiB."""
    stamps: list[float] = []

    @contextmanager
    def progress(length: int) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            stamps.append(time.perf_counter())
            if len(stamps) % max(1, length // 20) == 0:
                speed = len(stamps) / (stamps[-1] - start)
                click.echo(f"{len(stamps)} of {length}, {speed:.2f} images/s", err=True)

        yield advance

    start = time.perf_counter()
    options = {"num_beams": beams, "no_repeat_ngram_size": 3, "max_new_tokens": 40}
    caption_directory(Job(corpus, out, resume=False, options=options), say=lambda _: None, progress=progress)
    return [stamp - start for stamp in stamps], peak_memory_gib() or 0.0


def tenth_speed(stamps: list[float], tenth: int) -> float:
    """Return images/s of tenth 1 to 10 of a run."""
    edges = [0.0, *stamps]
    first, last = (tenth - 1) * len(stamps) // 10, tenth * len(stamps) // 10
    return (last - first) / (edges[last] - edges[first])


def in_own_process(corpus: Path, out: Path, beams: int) -> tuple[list[float], float]:
    """Run caption_timed where nothing else has used memory before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(caption_timed, (corpus, out, beams))


@click.command()
@click.option("--images", type=click.IntRange(FEW), default=CHALLENGE_SIZE, show_default=True)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "soak.json", show_default=True)
def main(images: int, beams: int, out: Path) -> None:
    """Caption the corpus with the demo bundle and judge speed and memory."""
    few = write_corpus(BUILD / f"pictures_{FEW}", FEW, EXAMPLES)
    many = write_corpus(BUILD / f"pictures_{images}", images, EXAMPLES)
    _, few_gib = in_own_process(few, BUILD / "soak_few.csv", beams)
    stamps, many_gib = in_own_process(many, BUILD / "soak.csv", beams)
    speeds = [tenth_speed(stamps, tenth) for tenth in range(1, 11)]
    record = {
        "benchmark": "soak",
        "machine": describe_machine(),
        "setting": {"images": images, "beams": beams, "no_repeat_ngram": 3, "most_new_tokens": 40, "workload": "demo"},
        "seconds": round(stamps[-1], 1),
        "images_per_s": round(len(stamps) / stamps[-1], 2),
        "images_per_s_by_tenth": [round(speed, 2) for speed in speeds],
        "last_over_second_tenth": round(speeds[9] / speeds[1], 3),
        "peak_gib": round(many_gib, 3),
        f"peak_gib_of_{FEW}": round(few_gib, 3),
        "passed": speeds[9] >= (1 - SPEED_BOUND) * speeds[1] and many_gib <= (1 + MEMORY_BOUND) * few_gib,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record))
    if not record["passed"]:
        click.echo("error: the run slowed down or its memory grew", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
