"""Cores and memory that this process may use, and the processes below it."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
UNKNOWN_MEMORY = 4 << 30
"""Bytes taken as available where the system does not say."""
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Processor:
    """A processor by Linux's names: its model, empty where unknown, and its instructions."""

    name: str
    flags: frozenset[str]

    @property
    def is_x86(self) -> bool:
        """Return whether it is known to be one: all have this flag, and no other family does."""
        return "fpu" in self.flags


def processor() -> Processor:
    """Return what the system says of the first processor; nothing where it does not say (only Linux does)."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Processor("", frozenset())
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    flags = first.get("flags") or first.get("Features") or ""  # on x86 and on ARM
    return Processor(first.get("model name", ""), frozenset(flags.split()))


def available_cores() -> int:
    """Return how many CPU cores this process may use: those it is bound to, and no more than its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _cpu_quota())))


def core_shares(count: int) -> list[frozenset[int]]:
    """Divide the cores this process is bound to among `count` workers; those of a socket, and the threads of one core,
    stay together. Shares are empty where there are fewer cores, or the system binds no process to some.
    """
    cores = sorted(os.sched_getaffinity(0), key=_position) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < count:
        return [frozenset()] * count
    bounds = [-(-len(cores) * place // count) for place in range(count + 1)]
    return [frozenset(cores[first:end]) for first, end in itertools.pairwise(bounds)]


def _position(core: int) -> tuple[int, ...]:
    """Return socket, die, physical core and number of what the system calls a core."""
    position = []
    for name in ("physical_package_id", "die_id", "core_id"):
        try:
            position.append(int((CPUS / f"cpu{core}/topology/{name}").read_text()))
        except (OSError, ValueError):
            position.append(0)
    return (*position, core)


def _cpu_quota() -> float:
    """Return the cores that control groups allow (cpu.max of version 2, cpu.cfs_* of 1); infinite without a limit."""
    quotas = [math.inf]
    for group in _groups("cpu"):
        try:
            if (group / "cpu.max").is_file():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota.strip() not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas)


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
    for group in _groups("memory"):
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


CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _groups(controller: str) -> list[Path]:
    """List the directories of this process's control groups of a controller, from its own up to the root.

    Of version 2 there is one tree; of version 1 one for each controller, or for some together (`cpu,cpuacct`).
    """
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = CGROUPS / controllers
            own = root / path.lstrip("/")
            groups += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return groups


def descendants(pid: int) -> list[int]:
    """Return the processes below a process, children last; none where the system has no /proc."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [*descendants(child), child]
    return found


def started_at(pid: int) -> str | None:
    """Return when a process was started, in the system's ticks: with its id it names the process for good. None if it
    has ended, even if its parent has not asked for its exit code yet.
    """
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if state in (b"Z", b"X") else others[18].decode()


def wait_or_kill(processes: Mapping[int, str | None], patience_s: float) -> None:
    """Wait until processes {id: started_at} have ended, and kill those that have not after `patience_s` seconds."""
    end = time.monotonic() + patience_s
    while living := [pid for pid, start in processes.items() if start is not None and started_at(pid) == start]:
        if time.monotonic() > end:
            for pid in living:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)
