"""How many images are decoded side by side: as many as keep the device busy, and as memory holds."""

from __future__ import annotations

import os
from pathlib import Path

from engine.bundle.manifest import ModelDims
from engine.decoding.backend import Appetite
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
    available now, on the device or on the host). An explicit `rows` is taken at its word.
    """
    if rows is not None:
        return max(1, rows // search.num_beams)
    memory_bytes = appetite.memory_bytes if memory_bytes is None else memory_bytes
    memory_bytes = available_memory() if memory_bytes is None else memory_bytes
    affordable = int(MEMORY_SHARE * memory_bytes) // slot_bytes(search, model, appetite.item_bytes)
    return max(1, min(appetite.rows // search.num_beams, affordable, appetite.slots or affordable))


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
    """Return what the limits of a container or a batch job leave (control groups); a very large number without any.

    A group is bound by its own limit and by those of all above it. Cached file contents count as used there, but are
    given up when memory is asked for.
    """
    left = [1 << 62]
    for group in _memory_groups():
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                held = int((group / used).read_text()) - int(stat.get(cache, 0))
                left.append(max(0, int((group / limit).read_text()) - held))
            except (OSError, ValueError):
                continue
    return min(left)


def _memory_groups() -> list[Path]:
    """List the directories of this process's memory control groups, versions 2 and 1, from its own up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            own = root / path.lstrip("/")
            groups += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return groups
