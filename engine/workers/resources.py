"""Divide threads and cores, or GPUs, among the worker processes of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from engine.backends.providers import VISIBLE, visible_gpus
from engine.errors import UsageError
from engine.host import available_cores, core_shares
from engine.runtime import CPU_BACKENDS, Runtime, Workers


@dataclass(frozen=True)
class WorkerResources:
    """What one worker process may use.

    threads      number of CPU threads
    cores        cores that the process is bound to; empty: all of this process
    device       name of its GPU on this machine, such as cuda:1; empty without one
    environment  additional environment variables
    """

    threads: int
    cores: frozenset[int] = frozenset()
    device: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_workers(runtime: Runtime, workers: Workers) -> list[WorkerResources]:
    """Return the resources of each worker process; an empty list if this process makes the captions.

    `runtime` has the backend that `auto` stands for. Raises UsageError if the backend, the cores or the GPUs do not
    allow these workers.
    """
    if workers.devices is not None:
        return _on_gpus(runtime, workers)
    if workers.processes is None:
        return []
    if runtime.backend not in CPU_BACKENDS:
        raise UsageError(
            f"--processes are for the backends cpu and openvino, not for {runtime.backend}: add --backend cpu, or list "
            "GPUs with --devices"
        )
    count, threads = workers.processes, runtime.threads or available_cores()
    if count > threads:
        what = "cores" if runtime.threads is None else "threads"
        raise UsageError(f"{count} processes need at least as many {what}, not {threads}: lower --processes")
    replace(runtime, threads=threads // count)  # raises UsageError if there are more streams than threads per worker
    return [
        WorkerResources(number, cores)
        for number, cores in zip(_divide(threads, count), core_shares(count), strict=True)
    ]


def _on_gpus(runtime: Runtime, workers: Workers) -> list[WorkerResources]:
    """Return the resources of a worker per GPU. It sees no other GPU, so that its first device is the requested one."""
    if runtime.backend in CPU_BACKENDS:
        raise UsageError(
            f"--devices are GPUs, which the backend {runtime.backend} does not use: remove one of the two options"
        )
    if runtime.backend == "torch" and runtime.device != "cuda":
        raise UsageError(f"--devices are NVIDIA GPUs, but --device is {runtime.device}: remove one of the two options")
    gpus = visible_gpus()
    missing = [number for number in workers.gpus if number >= len(gpus)]
    if missing:
        available = ", ".join(f"cuda:{number}" for number in range(len(gpus)))
        raise UsageError(f"there is no cuda:{missing[0]}, only {available}: check nvidia-smi and {VISIBLE}")
    threads = _divide(runtime.threads or available_cores(), len(workers.gpus))
    return [
        WorkerResources(max(1, number), device=f"cuda:{gpu}", environment={VISIBLE: gpus[gpu]})
        for gpu, number in zip(workers.gpus, threads, strict=True)
    ]


def _divide(threads: int, count: int) -> list[int]:
    return [threads // count + (i < threads % count) for i in range(count)]
