"""What a benchmark ran on, and when, which is printed with every number; and where its record goes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click

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
