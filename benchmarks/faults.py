"""Fault injection: unreadable and unusual image files, and runs that are killed, terminated or short of disk space.

The tests use the files one by one; benchmarks.soak mixes them into the corpus.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from engine.run.journal import journal_path, read_journal


def _picture(size: int = 48) -> Image.Image:
    rng = np.random.default_rng(size)
    blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)


def encoded(kind: str, picture: Image.Image | None = None, **options: object) -> bytes:
    """Return an image, by default a small colourful one, encoded in Pillow's format `kind`."""
    stream = io.BytesIO()
    (picture or _picture()).save(stream, kind, **options)
    return stream.getvalue()


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb() -> bytes:
    """Return a PNG of a few kilobytes whose header claims 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b"")


def _write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _link_to_pipe(path: Path) -> None:
    pipe = path.with_name(".pipe")
    if not pipe.exists():
        os.mkfifo(pipe)
    path.symlink_to(pipe.name)


UNREADABLE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "nothing": (".jpg", _write(b""), "empty file: copy or download it again"),
    "text": (".jpg", _write(b"<html>404 not found</html>\n"), "an HTML page instead of the file"),
    "noise": (".png", _write(np.random.default_rng(1).bytes(5000)), "not an image, or damaged"),
    "truncated JPEG": (".jpg", _write(encoded("JPEG")[:-400]), "truncated"),
    "a JPEG's first bytes": (".jpg", _write(encoded("JPEG")[:20]), "not an image, or damaged"),
    "truncated PNG": (".png", _write(encoded("PNG")[:-600]), "truncated"),
    "truncated WEBP": (".webp", _write(encoded("WEBP")[:-100]), "decoder"),
    "truncated TIFF": (".tif", _write(encoded("TIFF")[:200]), ""),
    "decompression bomb": (".png", _write(_bomb()), "a decompression bomb?"),
    "a format that is not decoded": (".jpg", _write(encoded("SGI")), "not an image, or damaged"),
    "loop of links": (".jpg", lambda path: path.symlink_to(path.name), "symbolic links"),
    "link to nowhere": (".jpg", lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to a folder": (".jpg", lambda path: path.symlink_to("."), "a folder, a pipe or a device"),
    "link to a pipe": (".jpg", _link_to_pipe, "a pipe or a device"),
    "link to a device": (".jpg", lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
    "text called DICOM": (".dcm", _write(b"not DICOM" * 50), "not a DICOM file, or damaged"),
}
"""Kind of file -> (extension, function that writes it, fragment of the expected error)."""


def _grey(dtype: type) -> Image.Image:
    values = np.asarray(_picture().convert("L")).astype(dtype)
    return Image.fromarray(values * 257 if dtype is np.uint16 else values)


def _palette_with_transparency() -> bytes:
    return encoded("PNG", _picture().quantize(16), transparency=3)


def _animation() -> bytes:
    return encoded("GIF", _picture(), save_all=True, append_images=[_picture(40).resize((48, 48))])


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: viewers rotate it by 90 degrees
    return encoded("JPEG", _picture(), exif=exif)


UNUSUAL: dict[str, tuple[str, bytes]] = {
    "16 bits a channel": (".png", encoded("PNG", _grey(np.uint16))),
    "1 bit": (".png", encoded("PNG", _picture().convert("1"))),
    "grey with alpha": (".png", encoded("PNG", _picture().convert("LA"))),
    "palette with transparency": (".png", _palette_with_transparency()),
    "CMYK": (".jpg", encoded("JPEG", _picture().convert("CMYK"))),
    "floating point": (".tif", encoded("TIFF", _grey(np.float32))),
    "animation": (".gif", _animation()),
    "EXIF rotation": (".jpg", _rotated()),
    "PNG called JPEG": (".jpg", encoded("PNG")),
    "one pixel": (".png", encoded("PNG", _picture().resize((1, 1)))),
    "a thousand times wider than high": (".png", encoded("PNG", _picture().resize((2000, 2)))),
}
"""Kind of file -> (extension, content). The engine must caption each of them."""


def write_unreadable(kind: str, directory: Path, stem: str) -> Path:
    """Write a file of a kind in UNREADABLE into a directory; return its path."""
    extension, write, _ = UNREADABLE[kind]
    path = directory / (stem + extension)
    write(path)
    return path


SAMPLE_S = 0.02
EXIT_CODES = {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "full disk": 1}
"""Fault -> expected exit code of the process."""
FULL_DISK = "cannot be written: File too large"
"""Error of a run on a full disk, which is simulated by a limit on the size of its files."""
NEAR_THE_END = 5
"""Faults are injected at least this many captions before the end; after that the run may end first."""


@dataclass
class Disturbed:
    """Result of a disturbed run: faults as (seconds, kind, captions kept), samples as (seconds, captions, bytes).

    `problems` is empty if every check passed. `skipped` counts faults for which no captions were left.
    """

    problems: list[str] = field(default_factory=list)
    faults: list[tuple[float, str, int]] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0


def mix_in_unreadable(pictures: Path, count: int, out: Path, *, seed: int = 0) -> list[str]:
    """Fill `out` with links to the images and `count` unreadable files; return the ids of these files."""
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
    """Run `command`, which captions `images` images into `out`; inject `faults`, restart it each time, check it.

    Each fault is injected after a random further number of captions, at least one per call. Then follow a call that
    must refuse to write a run because of the unreadable images, one whose disk is too full for run.csv, and one that
    completes.
    """
    chance, result = random.Random(seed), Disturbed()
    journal, start, kept = journal_path(out), time.perf_counter(), 0
    for leftover in (out, *out.parent.glob(f"{journal.name}*")):
        leftover.unlink(missing_ok=True)
    readable = images - len(unreadable)
    for number, fault in enumerate(faults):
        if kept + 1 > readable - NEAR_THE_END:
            result.skipped += 1
            continue
        share = (number + chance.random()) / len(faults)
        target = min(max(kept + 1, int(share * readable)), readable - NEAR_THE_END)
        largest_file = _full_disk_at(journal, target - kept) if fault == "full disk" else None
        with _Run(command, largest_file) as run:
            _watch(run.process, journal, None if fault == "full disk" else target, start, result)
            if fault != "full disk":
                run.process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
            errors = run.errors()
        code = run.process.returncode
        ids = [record["id"] for record in read_journal(journal)[1]] if journal.exists() else []
        _expect(result, code == EXIT_CODES[fault], f"{fault}: exit code {code}: {errors[-300:]}")
        _expect(result, fault != "full disk" or FULL_DISK in errors, f"{fault}: other errors: {errors[-300:]}")
        _expect(result, len(ids) == len(set(ids)), f"{fault}: a caption is in the journal twice")
        _expect(result, len(ids) >= kept, f"{fault}: {kept - len(ids)} captions were lost")
        _expect(result, not out.exists(), f"{fault}: run.csv exists although the run is not complete")
        _expect(result, not list(out.parent.glob(f"{journal.name}.old*")), f"{fault}: the journal was discarded")
        result.faults.append((time.perf_counter() - start, fault, len(ids)))
        kept = len(ids)
    _finish(command, journal, out, unreadable, start, result)
    result.seconds = time.perf_counter() - start
    return result


def _finish(
    command: Sequence[str], journal: Path, out: Path, unreadable: Sequence[str], start: float, result: Disturbed
) -> None:
    """Finish the run: refused because of unreadable files, then on a disk too full for run.csv, then completely."""
    expected = set(unreadable)
    calls = [("refused", [], None, 1)] if unreadable else []
    allowed = ["--allow-missing"] if unreadable else []
    calls += [("full disk at the last write", allowed, 100, 1), ("the last call", allowed, None, 0)]
    for name, more, largest_file, code in calls:
        if largest_file is not None and not journal.exists():
            continue  # without an earlier call's journal there is more to write than run.csv
        with _Run([*command, *more], largest_file) as run:
            _watch(run.process, journal, None, start, result)
            errors = run.errors()
        lines = [line.removeprefix("unreadable: ") for line in errors.splitlines() if line.startswith("unreadable: ")]
        named = {Path(line.partition(": ")[0]).stem for line in lines}
        _expect(result, run.process.returncode == code, f"{name}: exit code {run.process.returncode}: {errors[-300:]}")
        _expect(result, largest_file is None or FULL_DISK in errors, f"{name}: other errors: {errors[-300:]}")
        _expect(result, named == expected and len(lines) == len(expected), f"{name}: {len(lines)} files were named")
        _expect(result, out.exists() == (code == 0), f"{name}: run.csv {'exists' if out.exists() else 'is missing'}")


def compare_runs(undisturbed: Path, disturbed: Path, unreadable: Sequence[str]) -> list[str]:
    """Return the problems. Apart from the unreadable images' empty rows, both files must be equal byte by byte."""
    if not disturbed.exists():
        return ["run.csv is missing"]
    expected, actual = (_rows(path) for path in (undisturbed, disturbed))
    bad = set(unreadable)
    empty = [row[0] for row, _ in actual if row[0] in bad and row[1] == ""]
    others = [line for row, line in actual if row[0] not in bad]
    problems = [] if sorted(empty) == sorted(bad) else ["the unreadable images do not have one empty caption each"]
    if others != [line for _, line in expected]:
        problems.append("run.csv differs from the undisturbed one")
    return problems


def _rows(path: Path) -> list[tuple[list[str], str]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(zip(csv.reader(io.StringIO("".join(lines))), lines, strict=True))


class _Run:
    """A process whose stderr goes to a file, so that it never blocks on a full pipe."""

    def __init__(self, command: Sequence[str], largest_file: int | None) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if largest_file is not None else self._errors,
            preexec_fn=limit if largest_file is not None else None,
        )
        if largest_file is not None:  # the limit would apply to a file of stderr too, so copy it through a pipe
            self._reader = threading.Thread(target=self._copy)
            self._reader.start()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._errors.close()

    def _copy(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            shutil.copyfileobj(stream, self._errors)

    def errors(self) -> str:
        """Wait until the process ends; return its stderr."""
        self.process.wait()
        if self.process.stderr is not None:
            self._reader.join()
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "backslashreplace")


def _full_disk_at(journal: Path, captions: int) -> int:
    """Return a limit on the file size that is reached after about `captions` more captions in the journal."""
    size = journal.stat().st_size if journal.exists() else 0
    lines = journal.read_bytes().count(b"\n") if size else 1
    return size + max(1, captions) * max(100, size // max(1, lines)) + 137


def _watch(
    process: subprocess.Popen[bytes], journal: Path, target: int | None, start: float, result: Disturbed
) -> None:
    """Sample captions and memory until the process ends or its journal holds `target` captions."""
    position, captions, sampled = 0, -1, 0.0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError), journal.open("rb") as stream:
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
    """Return the resident memory of a process in bytes, 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def _expect(result: Disturbed, holds: bool, problem: str) -> None:
    if not holds:
        result.problems.append(problem)


def engine_command(pictures: Path, out: Path, *more: object) -> list[str]:
    """Return the command line that captions the folder `pictures` into `out`."""
    return [sys.executable, "-m", "engine", "caption", "--input", str(pictures), "--out", str(out), *map(str, more)]
