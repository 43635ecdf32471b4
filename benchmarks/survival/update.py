"""What `--update` costs when a folder has changed a little, and whether run.csv is that of a run from scratch.

    python -m benchmarks.update --images 17237 --changed 0.01

A first run, one with nothing changed, and one with a share of the pictures changed, as a user types them, with the demo
bundle; then one from scratch of the changed folder, whose run.csv must be the same bytes. The record goes to
benchmarks/results/ and, as one JSON line, to stdout. Exits with 1 when the bytes differ.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.setting.corpus import CHALLENGE_SIZE, write_corpus
from benchmarks.setting.machine import describe_machine, record_options, record_path
from benchmarks.setting.workload import BUILD, EXAMPLES
from benchmarks.survival.faults import engine_command
from engine.bundle.manifest import Bundle
from engine.files.atomic import file_sha256
from engine.inputs.paths import find_inputs
from engine.run.fingerprints import fingerprints

MAX_NEW_TOKENS, NGRAM = 40, 3


def link_all(pictures: list[Path], out: Path) -> None:
    """Fill a new folder with links to pictures."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in pictures:
        (out / path.name).hardlink_to(path)


def replace_some(folder: Path, others: list[Path], seed: int) -> None:
    """Put other pictures in the place of as many of a folder."""
    for path, other in zip(random.Random(seed).sample(sorted(folder.iterdir()), len(others)), others, strict=True):
        path.unlink()
        path.hardlink_to(other)


def timed_run(folder: Path, out: Path, beams: int, *more: str) -> dict[str, Any]:
    """Run `engine caption` in a process of its own; return its seconds, loading included, and what it says it did."""
    options = ["--beams", beams, "--no-repeat-ngram", NGRAM, "--max-new-tokens", MAX_NEW_TOKENS, "--json", *more]
    start = time.perf_counter()
    done = subprocess.run(
        engine_command(folder, out, *options), capture_output=True, text=True, check=False, errors="replace"
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"the run failed: {done.stderr[-2000:]}")
    summary = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": round(seconds, 2),
        "captioned": summary["captions"] - summary["resumed"],
        "captioning_s": round(summary["seconds"], 2),
        "signature": summary["signature"],
    }


def listing_s(folder: Path) -> float:
    """Return the seconds to list a folder and to look at its files, best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        fingerprints(find_inputs([folder]).images)
        times.append(time.perf_counter() - start)
    return min(times)


@click.command()
@click.option("--images", type=click.IntRange(2), default=CHALLENGE_SIZE, show_default=True)
@click.option("--changed", type=click.FloatRange(0, 1, min_open=True), default=0.01, show_default=True, help="Share.")
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@record_options
def main(images: int, changed: float, beams: int, seed: int, out: Path | None, record: bool) -> None:
    """Time the runs and compare what they wrote."""
    count = max(1, round(changed * images))
    corpus = write_corpus(BUILD / f"pictures_{images + count}", images + count, EXAMPLES)
    pictures = sorted(corpus.iterdir())
    folder, run, scratch = BUILD / "update", BUILD / "update.csv", BUILD / "update_scratch.csv"
    link_all(pictures[:images], folder)
    for leftover in BUILD.glob("update*.csv*"):
        leftover.unlink()
    runs = {"first": timed_run(folder, run, beams, "--update")}
    runs["nothing_changed"] = timed_run(folder, run, beams, "--update")
    replace_some(folder, pictures[images:], seed)
    runs["some_changed"] = timed_run(folder, run, beams, "--update")
    runs["scratch"] = timed_run(folder, scratch, beams)
    digests = [file_sha256(path) for path in (run, scratch)]
    report = {
        "benchmark": "update",
        "machine": describe_machine(),
        "bundle": Bundle.load().digest[:12],
        "setting": {"images": images, "changed": count, "beams": beams, "no_repeat_ngram": NGRAM, "workload": "demo"},
        "runs": runs,
        "listing_s": round(listing_s(folder), 3),
        "some_changed_over_scratch": round(runs["some_changed"]["seconds"] / runs["scratch"]["seconds"], 4),
        "run_sha256": digests[0],
        "same_as_from_scratch": digests[0] == digests[1],
    }
    path = record_path(f"update_{images}.json", out, record)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(report))
    if digests[0] != digests[1]:
        click.echo("error: run.csv is not that of a run from scratch", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
