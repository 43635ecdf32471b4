"""Communication between the processes of a distributed run. With one process nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long processes wait for the first one, which unpacks and decodes all images before training starts. The default
of torch is 10 minutes for NCCL and 30 for gloo.
"""


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, number of processes) from the environment variables that torchrun sets."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share_of(total: int, rank: int, world_size: int) -> range:
    """Return the indices below `total` that the process `rank` works on: every `world_size`-th."""
    return range(rank, total, world_size)


def on_first_process(work: Callable[[], T]) -> T:
    """Call `work` in the first process only and return its result in all processes.

    An error is raised in the first process only; torchrun then stops the others.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return work()
    _connect()
    shared: list[T | None] = [work() if rank == 0 else None]
    torch.distributed.broadcast_object_list(shared, device=_device())
    return shared[0]  # type: ignore[return-value]


def gather(values: list[T]) -> list[T]:
    """Return the `values` of all processes, concatenated in the order of ranks."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return values
    _connect()
    by_rank: list[list[T]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(by_rank, values)
    return [value for part in by_rank for value in part]


def _connect() -> None:
    """Initialise torch.distributed unless it is initialised already."""
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(_device())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)


def _device() -> torch.device:
    """Return the device that messages are sent from and received on."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
