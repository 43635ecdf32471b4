"""What a benchmark ran on, and when; printed with every number."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path


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
