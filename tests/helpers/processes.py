"""Which processes are there, for tests of what is left behind."""

from __future__ import annotations

import contextlib
from pathlib import Path


def children(parent: int) -> dict[int, bytes]:
    """Return {process: command line} of everything below a process."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            lines[pid] = (entry / "cmdline").read_bytes()
    below, found = {parent}, set()
    while below:
        below = {pid for pid, above in parents.items() if above in below}
        found |= below
    return {pid: lines[pid] for pid in found}


def is_running(pid: int) -> bool:
    """Return whether a process is there and not just waiting to be buried by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
