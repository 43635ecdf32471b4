"""CPU cores and memory available to this process, and its child processes."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
UNKNOWN_MEMORY = 4 << 30
"""Bytes assumed to be available if the system does not report them."""
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Processor:
    """A processor as Linux reports it: the model name (empty if unknown), the instruction flags, family and model.

    In virtual machines the name is often only the vendor's, such as `AMD EPYC`. Family and model number identify the
    generation, so `full_name` has them as well.
    """

    name: str
    flags: frozenset[str]
    family: str = ""
    model: str = ""

    @property
    def full_name(self) -> str:
        """Return the name with family and model, such as `AMD EPYC (family 25, model 17)`."""
        name = self.name or platform.processor() or platform.machine()
        return f"{name} (family {self.family}, model {self.model})" if self.family and self.model else name

    @property
    def is_x86(self) -> bool:
        """Return whether this is known to be an x86 processor: all of them have the flag `fpu`, and no others do."""
        return "fpu" in self.flags


VNNI = {"avx512_vnni", "avx_vnni"}
"""Linux's flags of instructions that multiply 8-bit numbers and add them in 32 bits: faster than float32."""


def processor() -> Processor:
    """Return the first processor from /proc/cpuinfo; its fields are empty on systems other than Linux."""
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as file:
            # up to the first empty line: the kernel writes the file while it is read, and servers have 256 processors
            lines = [line.partition(":") for line in itertools.takewhile(str.strip, file)]
    except OSError:
        return Processor("", frozenset())
    first = {name.strip(): value.strip() for name, _, value in lines}
    flags = first.get("flags") or first.get("Features") or ""  # the names on x86 and on ARM
    family, model = first.get("cpu family", ""), first.get("model", "")
    return Processor(first.get("model name", ""), frozenset(flags.split()), family, model)


def available_cores() -> int:
    """Return the number of CPU cores this process may use: the lower of its CPU affinity and the container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _cpu_quota())))


def core_shares(count: int) -> list[frozenset[int]]:
    """Divide the cores of this process's CPU affinity among `count` workers.

    Neighbouring cores go to the same worker: first the threads of one physical core, then the cores of one socket. All
    shares are empty if there are fewer cores than workers, or if the system has no CPU affinity.
    """
    cores = sorted(os.sched_getaffinity(0), key=_position) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < count:
        return [frozenset()] * count
    bounds = [-(-len(cores) * i // count) for i in range(count + 1)]
    return [frozenset(cores[first:end]) for first, end in itertools.pairwise(bounds)]


def _position(core: int) -> tuple[int, ...]:
    """Return (socket, die, physical core, number) of a logical core, to sort neighbours next to each other."""
    position = []
    for name in ("physical_package_id", "die_id", "core_id"):
        try:
            position.append(int((CPUS / f"cpu{core}/topology/{name}").read_text()))
        except (OSError, ValueError):
            position.append(0)
    return (*position, core)


def _cpu_quota() -> float:
    """Return the number of cores that cgroups allow (v2: cpu.max, v1: cpu.cfs_*), or infinity without a limit."""
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
    """Return the bytes this process can still allocate: the smaller of the machine's and the cgroup's free memory."""
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
    """Return the bytes left below the memory limits of a container or a batch job (cgroups); very large without limits.

    The limits of all parent groups apply as well. The page cache (`inactive_file`) is part of a group's usage, but the
    kernel reclaims it when memory is needed, so it counts as free.
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
    """Return the directories of this process's cgroups for a controller, from its own group up to the root.

    Version 2 has one tree. Version 1 has one tree per controller or per set of controllers (`cpu,cpuacct`).
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
    """Return the ids of all descendants of a process, each before its parent; empty if the system has no /proc."""
    pids: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                pids += [*descendants(child), child]
    return pids


def started_at(pid: int) -> str | None:
    """Return the start time of a process in clock ticks, or None if it has ended, zombies included.

    Process ids are reused; the pair of id and start time identifies a process.
    """
    try:
        # the command name before the last ")" may contain spaces and parentheses
        state, *others = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if state in (b"Z", b"X") else others[18].decode()


def wait_or_kill(processes: Mapping[int, str | None], patience_s: float) -> None:
    """Wait until the processes {id: started_at} have ended; after `patience_s` seconds, kill the remaining ones."""
    end = time.monotonic() + patience_s
    while alive := [pid for pid, start in processes.items() if start is not None and started_at(pid) == start]:
        if time.monotonic() > end:
            for pid in alive:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)
