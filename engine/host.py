"""Cores and memory that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

UNKNOWN_MEMORY = 4 << 30
"""Bytes taken as available where the system does not say."""


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
