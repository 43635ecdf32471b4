"""How many images are decoded side by side: as many as keep the device busy, and as memory holds."""

from __future__ import annotations

import os
from pathlib import Path

from engine.backends.base import Appetite
from engine.bundle import ModelDims
from engine.decoding.beam import Search
from engine.decoding.scheduler import SETTLE_EVERY

MEMORY_SHARE = 0.25
"""Share of the available memory that keys and values may take."""
UNKNOWN_MEMORY = 4 << 30
"""Bytes taken as available where the system does not say."""
COPIES = 3
"""Of a growing tensor at most this many are alive at once: the old one, the new one, and one being regrouped."""


def slots_for(
    search: Search, model: ModelDims, appetite: Appetite, *, rows: int | None = None, memory_bytes: int | None = None
) -> int:
    """Return the number of slots B for about `rows` beams side by side.

    `rows` None means as many as the device likes, bounded by MEMORY_SHARE of `memory_bytes` (None: what is
    available now). An explicit `rows` is taken at its word.
    """
    if rows is not None:
        return max(1, rows // search.num_beams)
    memory_bytes = available_memory() if memory_bytes is None else memory_bytes
    affordable = int(MEMORY_SHARE * memory_bytes) // slot_bytes(search, model)
    return max(1, min(appetite.rows // search.num_beams, affordable))


def slot_bytes(search: Search, model: ModelDims, item_bytes: int = 4) -> int:
    """Return the bytes of keys and values a slot holds at most, items of `item_bytes`.

    Settled positions are those some beam descends from: at most all of every beam, in practice a shared past and
    a few of each; the bound taken is max_length and SETTLE_EVERY steps of K.
    """
    position = 2 * model.num_layers * model.num_heads * model.head_width * item_bytes
    grown = search.max_length + 2 * SETTLE_EVERY * search.num_beams
    return position * (model.encoder_positions + COPIES * grown)


def available_memory() -> int:
    """Return the bytes this process may still take: of the machine and, where there is one, of its control group."""
    return min(_machine_memory(), _group_memory())


def _machine_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return UNKNOWN_MEMORY


def _group_memory() -> int:
    """Read the limits a container sets (control groups, version 2, then 1); no limit is a very large number."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return 1 << 62
