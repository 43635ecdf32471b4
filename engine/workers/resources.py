"""What each worker process of a machine has: threads, and cores or a GPU of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from engine.backends.providers import VISIBLE, visible_gpus
from engine.errors import UsageError
from engine.host import available_cores, core_shares
from engine.runtime import CPU_BACKENDS, Runtime, Workers


@dataclass(frozen=True)
class WorkerResources:
    """`threads` for one worker, the cores it is bound to (none: to all that this process has), the GPU that is its own
    by its name here, and what its environment has besides.
    """

    threads: int
    cores: frozenset[int] = frozenset()
    device: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_workers(runtime: Runtime, workers: Workers) -> list[WorkerResources]:
    """Return the share of each worker process, none where captions are made in this one.

    `runtime` names what `auto` means here. Raises UsageError where backend, cores or GPUs are not there for it.
    """
    if workers.devices is not None:
        return _on_gpus(runtime, workers)
    if workers.processes is None:
        return []
    if runtime.backend not in CPU_BACKENDS:
        raise UsageError(
            f"--processes are for the backends cpu and openvino, not for {runtime.backend}: add --backend cpu, or name "
            "GPUs with --devices"
        )
    count, threads = workers.processes, runtime.threads or available_cores()
    if count > threads:
        what = "cores" if runtime.threads is None else "threads"
        raise UsageError(f"{count} processes cannot share {threads} {what}: ask for fewer --processes")
    replace(runtime, threads=threads // count)  # refuses more streams than one of them has threads
    return [
        WorkerResources(number, cores)
        for number, cores in zip(_divide(threads, count), core_shares(count), strict=True)
    ]


def _on_gpus(runtime: Runtime, workers: Workers) -> list[WorkerResources]:
    """Return a share for each GPU. The worker sees no other, so that its first one is the one that is meant."""
    if runtime.backend in CPU_BACKENDS:
        raise UsageError(f"--devices are GPUs, which the backend {runtime.backend} does not use: leave one of them out")
    gpus = visible_gpus()
    missing = [number for number in workers.gpus if number >= len(gpus)]
    if missing:
        there = ", ".join(f"cuda:{number}" for number in range(len(gpus)))
        raise UsageError(f"there is no cuda:{missing[0]}, only {there}: look at nvidia-smi and {VISIBLE}")
    threads = _divide(runtime.threads or available_cores(), len(workers.gpus))
    return [
        WorkerResources(max(1, number), device=f"cuda:{gpu}", environment={VISIBLE: gpus[gpu]})
        for gpu, number in zip(workers.gpus, threads, strict=True)
    ]


def _divide(threads: int, count: int) -> list[int]:
    return [threads // count + (i < threads % count) for i in range(count)]
