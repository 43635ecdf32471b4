"""What a Ray cluster costs on one machine, and what it should bring on many.

    python -m benchmarks.scaleout --images 300 --rounds 3
    python -m benchmarks.scaleout --images 300 --rounds 1 --workload base

One process with all cores, one worker with all cores and one worker a core caption the same corpus, taking turns, a
third of it and all of it: the slope is seconds an image, the rest is what starting costs, and what counts for who
waits is the whole. All must say the same; where random weights tie, as those of base do, every caption that differs is
traced to its tie, as in throughput.py.
Then every stage is timed by itself, and a simulation (scaleout_model.py) says how throughput grows with workers, up to
millions of images, and what is in the way first. `--caption-s` puts another device's seconds an image in.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.cluster.scaleout_model import BUSY, Outcome, Stages, simulate
from benchmarks.setting.corpus import CHALLENGE_SIZE
from benchmarks.setting.machine import describe_machine, record_options, record_path
from benchmarks.setting.workload import MAX_NEW_TOKENS, Workload, prepare
from benchmarks.survival.faults import engine_command
from benchmarks.throughput import agreement_of, is_valid
from engine.bundle.manifest import Bundle
from engine.captioner import FEWEST_READERS, Captioner
from engine.captions import Caption
from engine.cluster.driver import configure_ray_data
from engine.cluster.session import LOCAL, cluster
from engine.cluster.worker import MESSAGES_PER_BLOCK
from engine.files.atomic import file_sha256
from engine.host import available_cores
from engine.inputs.images import find_images
from engine.inputs.pixels import read_image
from engine.run.job import Outputs
from engine.run.record import RunRecord
from engine.run.rows import rows_of
from engine.workers.messages import COLUMN, pack_captions, unpack_answer

NGRAM = 3
ALONE = "one process"
PUBMED_SCALE = 5_000_000
"""Figures of PubMed Central's open subset, by order of magnitude; for the simulation alone."""
SIZES = (CHALLENGE_SIZE, 1_000_000, PUBMED_SCALE)
MOST_ACTORS = 4096
MESSAGES = 800
"""Messages whose way through the object store is timed."""
SPEAKERS = 16
"""Blocks answered side by side then: Ray Data looks at all of them in turn, so that one alone would time its naps."""


def ways(cores: int) -> dict[str, list[str]]:
    """Return the options of each way to caption with `cores` cores."""
    return {
        ALONE: ["--threads", str(cores)],
        "one worker": ["--ray", "--ray-actors", "1", "--threads", str(cores)],
        "a worker a core": ["--ray", "--ray-actors", str(cores), "--threads", "1"],
    }


def compare(few: Workload, many: Workload, beams: int, rounds: int, cores: int) -> dict[str, Any]:
    """Caption few and many images every way, `rounds` times in turn; return seconds, checksums and, of the many, how
    far the ways agree.
    """
    corpora = [few.pictures, many.pictures]
    seconds: dict[str, list[list[float]]] = {way: [[] for _ in corpora] for way in ways(cores)}
    sums: dict[int, set[str]] = {i: set() for i in range(len(corpora))}
    said: dict[str, list[tuple[int, ...]]] = {}
    common = ["--bundle", many.bundle, "--beams", beams, "--no-repeat-ngram", NGRAM]
    common += ["--max-new-tokens", many.max_new_tokens, "--no-resume", "--n-best", 1, "--n-best-out"]
    with tempfile.TemporaryDirectory() as work:
        for round_ in range(rounds):
            for number, corpus in enumerate(corpora):
                for way, options in ways(cores).items():
                    out, ids = Path(work, "run.csv"), Path(work, "run.jsonl")
                    command = engine_command(corpus, out, *common, ids, *options)
                    start = time.perf_counter()
                    subprocess.run(command, check=True, capture_output=True)
                    seconds[way][number].append(time.perf_counter() - start)
                    sums[number].add(file_sha256(out))
                    said["engine" if way == ALONE else way] = read_best_ids(ids)
                    click.echo(f"round {round_ + 1}, {way}: {seconds[way][number][-1]:.1f} s", err=True)
    counts = [len(list(corpus.iterdir())) for corpus in corpora]
    report: dict[str, Any] = {way: _line(counts, times) for way, times in seconds.items()}
    for way in report:
        report[way]["image_s_over_one_process"] = report[way]["image_s"] / report[ALONE]["image_s"]
        report[way]["wall_over_one_process"] = statistics.median(
            own / alone for own, alone in zip(report[way]["wall_s"][1], report[ALONE]["wall_s"][1], strict=True)
        )
    return {
        "ways": report,
        "identical": all(len(found) == 1 for found in sums.values()),
        "run_sha256": sorted(sums[len(corpora) - 1]),
        "agreement": agreement_of(many, many.options(beams), said),
    }


def read_best_ids(path: Path) -> list[tuple[int, ...]]:
    """Return the ids of the best hypothesis of every line of an n-best file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line)["hypotheses"][0]["ids"]) for line in lines]


def _line(counts: list[int], times: list[list[float]]) -> dict[str, Any]:
    """Return seconds an image and seconds whatever the number, from the medians of a small and a large corpus."""
    few, many = (statistics.median(entry) for entry in times)
    image_s = (many - few) / (counts[1] - counts[0])
    return {"image_s": image_s, "fixed_s": many - counts[1] * image_s, "wall_s": times}


def measure_stages(workload: Workload, beams: int) -> Stages:
    """Time each stage of a run by itself, with one thread."""
    captioner = Captioner.load(workload.bundle, backend="cpu", threads=1)
    options = workload.options(beams)
    spec = captioner.bundle.image
    listed = _Timer()
    with listed:
        images = find_images(workload.pictures).images
    with _Timer() as read:
        pixels = [read_image(image.path, spec.height, spec.width, spec.resample) for image in images]
    with _Timer() as captioned:
        spoken = list(captioner.caption(pixels, options))
    captions = [replace(caption, id=image.id) for caption, image in zip(spoken, images, strict=True)]
    group = max(1, len(captions) // MESSAGES_PER_BLOCK)
    messages = [pack_captions(captions[start : start + group]) for start in range(0, len(captions), group)]
    with tempfile.TemporaryDirectory() as work:
        out = Path(work, "run.csv")
        with listed:
            record = RunRecord(images, out, "benchmark")
        with record:
            with _Timer() as recorded:
                for caption in _unpacked(messages):
                    record.add(caption)
            with _Timer() as written:
                record.check_unchanged()
                record.write(Outputs(out), rows_of(record, Outputs(out)))
    start_s, block_s, message_s = _measure_ray(messages[0])
    count = len(images)
    return Stages(
        read_s=read.seconds / count,
        caption_s=captioned.seconds / count,
        start_s=start_s,
        list_s=listed.seconds / count,
        write_s=written.seconds / count,
        block_s=block_s,
        message_s=message_s,
        record_s=recorded.seconds / count,
        readers=FEWEST_READERS,
    )


def _unpacked(messages: list[str]) -> Iterator[Caption]:
    for message in messages:
        yield from unpack_answer(message).captions


class Echo:
    """A worker that answers a number with as many copies of a message, at once."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, blocks: Any) -> Iterator[Any]:
        import pyarrow as pa

        for count in blocks[COLUMN].to_pylist():
            for _ in range(count):
                yield pa.table({COLUMN: [self._message]})


def _measure_ray(message: str) -> tuple[float, float, float]:
    """Return the seconds until a worker without a model answers, of a block sent out and of a message fetched."""
    import pyarrow as pa

    with cluster(LOCAL) as ray:
        configure_ray_data(ray.data.DataContext.get_current())
        with _Timer() as sent:
            blocks = ray.data.from_arrow(
                [pa.table({COLUMN: [MESSAGES_PER_BLOCK]}) for _ in range(MESSAGES // MESSAGES_PER_BLOCK)]
            )
        answers = blocks.map_batches(
            Echo,
            fn_constructor_args=(message,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=1,
                max_tasks_in_flight_per_actor=SPEAKERS,
                max_concurrent_calls_per_actor=SPEAKERS,
                enable_true_multi_threading=True,
            ),
            num_cpus=1,
        )
        start, stamps = time.perf_counter(), []
        for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            stamps += [time.perf_counter()] * len(table)
    assert len(stamps) == MESSAGES // MESSAGES_PER_BLOCK * MESSAGES_PER_BLOCK
    return stamps[0] - start, sent.seconds * MESSAGES_PER_BLOCK / MESSAGES, (stamps[-1] - stamps[0]) / (len(stamps) - 1)


class _Timer:
    """Adds up the seconds spent inside."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> _Timer:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def grow(stages: Stages) -> list[Outcome]:
    """Simulate every size of run with 1, 2, 4, ... workers."""
    actors = [1 << power for power in range(MOST_ACTORS.bit_length())]
    return [simulate(stages, images, count) for images in SIZES for count in actors]


def _say_growth(outcomes: list[Outcome]) -> None:
    click.echo("images      workers  images/s  workers busy  driver busy  bottleneck")
    for one in outcomes:
        click.echo(
            f"{one.images:<11,} {one.actors:<8} {one.images_per_s:<9.1f} {one.worker_busy:<13.1%} "
            f"{one.driver_busy:<12.1%} {one.bottleneck}"
        )
    for images in SIZES:
        late = next((one for one in outcomes if one.images == images and one.worker_busy < BUSY), None)
        if late is not None:
            click.echo(f"{images:,} images: first bottleneck at {late.actors} workers, {late.bottleneck}")


@click.command()
@click.option("--images", type=click.IntRange(30), default=300, show_default=True)
@click.option("--workload", "name", type=click.Choice(sorted(MAX_NEW_TOKENS)), default="demo", show_default=True)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--caption-s", type=click.FloatRange(0, min_open=True), help="Seconds an image of another device.")
@record_options
def main(
    images: int, name: str, beams: int, rounds: int, caption_s: float | None, out: Path | None, record: bool
) -> None:
    """Compare, measure, simulate; exits with 1 when two ways do not say the same and no tie explains it."""
    few, many = (prepare(name, count) for count in (images // 3, images))
    compared = compare(few, many, beams, rounds, available_cores())
    measured = measure_stages(many, beams)
    stages = measured if caption_s is None else replace(measured, caption_s=caption_s)
    outcomes = grow(stages)
    _say_growth(outcomes)
    report = {
        "benchmark": "scaleout",
        "machine": describe_machine(),
        "bundle": Bundle.load(many.bundle).digest[:12],
        "setting": {"images": images, "beams": beams, "rounds": rounds, "no_repeat_ngram": NGRAM}
        | {"most_new_tokens": many.max_new_tokens, "workload": name, "caption_s": caption_s},
        **compared,
        "stages": asdict(measured),
        "simulated": [asdict(one) for one in outcomes],
    }
    record_path(f"scaleout_{name}.json", out, record).write_text(json.dumps(report) + "\n")
    click.echo(json.dumps({key: value for key, value in report.items() if key != "simulated"}))
    if not is_valid(report["agreement"], images):
        click.echo("error: two ways say different things, and no tie explains it: their times are void", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
