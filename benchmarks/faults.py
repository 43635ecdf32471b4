"""A run that is killed, stopped and starved of disk again and again, in a folder with files nobody can read.

Real processes and real signals; a full disk is a limit on file size, which fails the same write in the same place.
What must hold: no caption lost, none twice, nothing that looks complete before it is, and a run.csv that is byte for
byte the undisturbed one apart from the unreadable images, which are all named.
"""

from __future__ import annotations

import csv
import io
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.hostile import UNREADABLE, write_unreadable
from engine.output.journal import read_journal
from engine.output.record import journal_path

SAMPLE_S = 0.02
EXIT_CODES = {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "full disk": 1}
"""Fault -> how the process must end."""


@dataclass
class Disturbed:
    """What became of a disturbed run: faults as (seconds, kind, captions kept), samples as (seconds, captions, bytes).

    `problems` is empty when everything held.
    """

    problems: list[str] = field(default_factory=list)
    faults: list[tuple[float, str, int]] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: float = 0.0


def mix_in_unreadable(pictures: Path, count: int, out: Path, *, seed: int = 0) -> list[str]:
    """Fill `out` with links to the pictures and `count` unreadable files between them; return the ids of these."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    names = sorted(path.name for path in pictures.iterdir())
    for name in names:
        (out / name).hardlink_to(pictures / name)
    kinds = list(UNREADABLE)
    chosen = random.Random(seed).sample(names, count)
    return [
        write_unreadable(kinds[i % len(kinds)], out, Path(name).stem + "_bad").stem for i, name in enumerate(chosen)
    ]


def run_disturbed(
    command: Sequence[str], images: int, out: Path, unreadable: Sequence[str], faults: Sequence[str], *, seed: int = 0
) -> Disturbed:
    """Run `command`, which captions `images` images into `out`, through `faults` to its end, and judge it.

    Each fault strikes after a random further share of the captions. The last two calls meet none: one that must refuse
    to write a run because of the unreadable images, and one with --allow-missing.
    """
    chance, result = random.Random(seed), Disturbed()
    journal, start, kept = journal_path(out), time.perf_counter(), 0
    for leftover in (out, *out.parent.glob(f"{journal.name}*")):
        leftover.unlink(missing_ok=True)
    for number, fault in enumerate(faults):
        share = (number + chance.random()) / len(faults)
        target = max(kept, int(share * (images - len(unreadable))))
        process = _start(command, _full_disk_at(journal, target - kept) if fault == "full disk" else None)
        _watch(process, journal, None if fault == "full disk" else target, start, result)
        if fault != "full disk":
            process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
        _, errors = process.communicate()
        ids = [record["id"] for record in read_journal(journal)[1]] if journal.exists() else []
        _expect(result, process.returncode == EXIT_CODES[fault], f"{fault}: exit code {process.returncode}: {errors}")
        _expect(result, len(ids) == len(set(ids)), f"{fault}: a caption is in the journal twice")
        _expect(result, len(ids) >= kept, f"{fault}: {kept - len(ids)} captions were lost")
        _expect(result, not out.exists(), f"{fault}: a run.csv was there before its time")
        _expect(result, not list(out.parent.glob(f"{journal.name}.old*")), f"{fault}: the journal was set aside")
        result.faults.append((time.perf_counter() - start, fault, len(ids)))
        kept = len(ids)
    for more in ([], ["--allow-missing"]) if unreadable else ([],):
        process = _start([*command, *more], None)
        _watch(process, journal, None, start, result)
        _, errors = process.communicate()
        _expect(result, (process.returncode == 0) == (more != [] or not unreadable), f"the last run: {errors[-400:]}")
        named = [line for line in errors.splitlines() if line.startswith("unreadable: ")]
        _expect(result, len(named) == len(unreadable), f"{len(named)} of {len(unreadable)} unreadable files were named")
    result.seconds = time.perf_counter() - start
    return result


def compare_runs(undisturbed: Path, disturbed: Path, unreadable: Sequence[str]) -> list[str]:
    """Return what is wrong: rows, without the unreadable images' empty ones, must be the same bytes in one order."""
    expected, found = (_rows(path) for path in (undisturbed, disturbed))
    bad = set(unreadable)
    empty = {row[0] for row, _ in found if row[0] in bad and row[1] == ""}
    others = [line for row, line in found if row[0] not in bad]
    problems = [] if empty == bad else [f"{len(bad - empty)} unreadable images do not have an empty caption"]
    if others != [line for _, line in expected]:
        problems.append("run.csv differs from the undisturbed one")
    return problems


def _rows(path: Path) -> list[tuple[list[str], str]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [(row, line) for row, line in zip(csv.reader(io.StringIO("".join(lines))), lines, strict=True)][1:]


def _start(command: Sequence[str], largest_file: int | None) -> subprocess.Popen[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit if largest_file is not None else None,
    )


def _full_disk_at(journal: Path, captions: int) -> int:
    """Return the file size at which a disk is full after about so many further captions."""
    size = journal.stat().st_size if journal.exists() else 0
    lines = journal.read_bytes().count(b"\n") if size else 1
    return size + max(1, captions) * max(100, size // max(1, lines)) + 137


def _watch(process: subprocess.Popen[str], journal: Path, target: int | None, start: float, result: Disturbed) -> None:
    """Sample captions and memory until the process ends, or the journal holds `target` captions."""
    position, captions, sampled = 0, -1, 0.0
    while process.poll() is None:
        if journal.exists():
            with journal.open("rb") as stream:
                stream.seek(position)
                new = stream.read()
            position, captions = position + len(new), captions + new.count(b"\n")
        now = time.perf_counter() - start
        if now - sampled > 1.0:
            result.samples.append((now, max(0, captions), resident_bytes(process.pid)))
            sampled = now
        if target is not None and captions >= target:
            return
        time.sleep(SAMPLE_S)


def resident_bytes(pid: int) -> int:
    """Return the memory a process holds now, 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def _expect(result: Disturbed, holds: bool, problem: str) -> None:
    if not holds:
        result.problems.append(problem)


def engine_command(pictures: Path, out: Path, *more: object) -> list[str]:
    """Return the command line that captions `pictures` into `out`, as a user would type it."""
    return [sys.executable, "-m", "engine", "caption", "--input", str(pictures), "--out", str(out), *map(str, more)]
