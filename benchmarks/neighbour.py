"""Measure a run with a busy neighbour: another program that keeps one core busy, unpinned and of equal priority.

    python -m benchmarks.neighbour --workload base --policy "" --policy "--streams 1" --policy "--processes 2"

A policy is a set of options of `engine caption`. The whole command is timed, quiet and busy in turn. All runs must
give the same ids up to ties, as in benchmarks/throughput.py: a policy decides how products are divided, and thereby
rounded. The record is written to build/benchmarks/ (with --record: benchmarks/results/) and, as one
JSON line, to stdout.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.throughput import agreement_of
from benchmarks.workload import MAX_NEW_TOKENS, Workload, describe_machine, prepare, record_options, record_path
from engine.options import DecodeOptions

POLICIES = ("", "--streams 1", "--processes 2")
NGRAM = 3
"""Value of --no-repeat-ngram."""
BUSY = "while True: pass"


@contextmanager
def neighbour(count: int) -> Iterator[None]:
    """Keep `count` cores busy with one process each, for the duration of a `with` block."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def command(policy: str, workload: Workload, beams: int, out: Path) -> list[str]:
    """Return the command of a policy."""
    options = ["--bundle", workload.bundle, "--input", workload.pictures, "--out", out, "--backend", "cpu"]
    options += ["--beams", beams, "--no-repeat-ngram", NGRAM, "--max-new-tokens", workload.max_new_tokens]
    options += ["--n-best-out", out.with_suffix(".jsonl")]
    return [sys.executable, "-m", "engine", "caption", *map(str, options), *shlex.split(policy)]


def timed(policy: str, workload: Workload, beams: int, loops: int) -> tuple[float, list[tuple[int, ...]]]:
    """Run a policy once next to `loops` busy loops; return its seconds and the ids of its captions, in their order."""
    with tempfile.TemporaryDirectory() as folder, neighbour(loops):
        out = Path(folder, "run.csv")
        start = time.perf_counter()
        done = subprocess.run(command(policy, workload, beams, out), capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise click.ClickException(f"{policy or 'the default'}: {done.stderr[-1000:]}")
        entries = map(json.loads, out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines())
        return seconds, [tuple(entry["hypotheses"][0]["ids"]) for entry in entries]


@click.command()
@click.option("--workload", "name", type=click.Choice(sorted(MAX_NEW_TOKENS)), default="base", show_default=True)
@click.option("--images", type=click.IntRange(1), default=96, show_default=True, help="Number of images.")
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True, help="Number of beams.")
@click.option(
    "--policy", "policies", multiple=True, default=POLICIES, show_default=True, help="Policy; may be repeated."
)
@click.option("--loops", type=click.IntRange(1), default=1, show_default=True, help="Number of busy loops.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Rounds; the median counts.")
@record_options
def main(name, images, beams, policies, loops, repeats, out, record) -> None:
    """Time each policy, quiet and busy in turn."""
    workload = prepare(name, images)
    load = os.getloadavg()[0]
    seconds: dict[str, dict[str, list[float]]] = {policy: {"quiet": [], "busy": []} for policy in policies}
    captions: dict[str, list[tuple[int, ...]]] = {}
    for _ in range(repeats):
        for policy in policies:
            for kind, count in (("quiet", 0), ("busy", loops)):
                spent, ids = timed(policy, workload, beams, count)
                seconds[policy][kind].append(round(spent, 2))
                if not captions:
                    captions["engine"] = ids
                elif ids not in captions.values():
                    captions[f"{policy or 'default'}, {kind}"] = ids
                click.echo(f"{policy or 'default'}, {kind}: {spent:.2f} s", err=True)
    options = DecodeOptions(num_beams=beams, no_repeat_ngram_size=NGRAM, max_new_tokens=workload.max_new_tokens)
    agreement = agreement_of(workload, options, captions)
    if any(counts["real"] for counts in agreement.values()):
        raise click.ClickException(
            f"the captions differ between runs, not by ties: the measurement is void: {agreement}"
        )
    report = {
        "benchmark": "neighbour",
        "workload": name,
        "machine": describe_machine(),
        "setting": {"images": images, "beams": beams, "loops": loops, "repeats": repeats, "load_before": load},
        "agreement": agreement,
        "policies": {policy or "default": _summary(runs) for policy, runs in seconds.items()},
    }
    for policy, row in report["policies"].items():
        click.echo(f"{policy}: {row['quiet_s']:.1f} s, busy {row['busy_s']:.1f} s = {row['ratio']:.2f} x", err=True)
    record_path(f"neighbour_{name}.json", out, record).write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report))


def _summary(runs: dict[str, list[float]]) -> dict[str, Any]:
    """Return the median seconds, quiet and busy, and the median of their ratios in the same round."""
    ratios = [busy / quiet for quiet, busy in zip(runs["quiet"], runs["busy"], strict=True)]
    medians = {f"{kind}_s": statistics.median(values) for kind, values in runs.items()}
    return medians | {"ratio": round(statistics.median(ratios), 3), "runs": runs}


if __name__ == "__main__":
    main()
