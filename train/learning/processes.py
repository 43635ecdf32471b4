"""What the processes of a distributed run tell each other; with one process nothing is sent.

Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long processes wait for the first one, which unpacks and decodes all images before training starts."""


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, number of processes), as torchrun tells them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share_of(total: int, rank: int, world_size: int) -> range:
    """Return the places of `total` things that one of several processes looks after."""
    return range(rank, total, world_size)


def on_first_process(work: Callable[[], T]) -> T:
    """Let the first process do some work and return its result in all of them.

    An error ends the first process only; torchrun ends the others.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return work()
    _connect()
    shared: list[T | None] = [work() if rank == 0 else None]
    torch.distributed.broadcast_object_list(shared, device=_device())
    return shared[0]  # type: ignore[return-value]


def gather(values: list[T]) -> list[T]:
    """Return what all processes hold, one after the other."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return values
    _connect()
    several: list[list[T]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(several, values)
    return [value for part in several for value in part]


def _connect() -> None:
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(_device())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)


def _device() -> torch.device:
    """Return the device whose memory messages pass through."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
