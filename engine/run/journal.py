"""The journal next to run.csv: each caption as it is made, so that a run that was cut off resumes.

A text file, one record a line: crc32 of the rest in hexadecimal, a space, JSON. The first record holds the key of the
run: bundle, options and packages. The others hold a caption each. A last line that is torn is cut off when the file is
opened again, one that does not match its checksum is skipped, and these images are captioned again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import OutputError, UsageError
from engine.files.atomic import replace_file
from engine.files.lock import open_own

FORMAT = 1
SYNC_EVERY_S = 5.0
"""Seconds after which records are forced to disk: what a power cut can cost, a crash of the program costs nothing."""
MAX_HEADER_BYTES = 1000
"""The first record is shorter."""
MAX_LINE_BYTES = 1 << 24
"""No record comes near it; a line without an end is not read into memory."""
BEGINNING = re.compile(rb"\0*|[0-9a-f]{8} \{.*", re.DOTALL)
"""How a journal begins: with a checksum and JSON, or with nothing but NULs after a power cut."""


def journal_path(out: Path) -> Path:
    """Return the path of the journal of the run that will be `out`: next to the file that a link leads to."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".journal")


def update_path(out: Path) -> Path:
    """Return where --update keeps the captions of `out`: not in the journal, which goes with an ordinary run."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".update.journal")


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return one line: checksum, space, JSON, newline."""
    body = json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None when it is torn or damaged."""
    checksum, space, body = line[:8], line[8:9], line[9:-1]
    if space != b" " or line[-1:] != b"\n" or checksum != b"%08x" % zlib.crc32(body):
        return None
    try:
        record = json.loads(body)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class Journal:
    """An open journal: `records` are those it held when it was opened, `append` adds one.

    `damaged` counts lines that were not complete, `set_aside` is where a journal that is not this run's was moved to.
    `is_earlier` tells that it has `earlier_key`, with which earlier versions named the same run.
    """

    def __init__(self, path: Path, key: str, *, earlier_key: str = "", resume: bool = True) -> None:
        """Open or create the journal of the run `key`.

        A journal of another run, or any without `resume`, is moved aside. Raises UsageError for a link or a file that
        is not a journal, which are left as they are, and OutputError when the file cannot be opened or written.
        """
        self.path, self._key = path, key
        self.set_aside: Path | None = None
        self.records: list[dict[str, Any]] = []
        self.damaged = 0
        self.is_earlier = False
        self._synced = time.monotonic()
        try:
            whole_bytes = self._take_over((key, earlier_key or key), resume) if os.path.lexists(path) else 0
            self._open(whole_bytes)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be opened: {error.strerror}: the journal is kept next to --out"
            ) from error
        self._header_end = 0
        if self._end == 0:
            self._write(self._header)
            self._header_end = self._end

    def _open(self, end: int) -> None:
        """Open the file to append after byte `end`; what follows is cut off."""
        self._file = open_own(self.path)
        self._end = end
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    @property
    def _header(self) -> dict[str, Any]:
        return {"journal": FORMAT, "key": self._key}

    @property
    def is_empty(self) -> bool:
        """Return whether it holds nothing but what this run began it with."""
        return self._end == self._header_end

    def _take_over(self, keys: tuple[str, str], resume: bool) -> int:
        """Read the journal that is there, or move it aside; return the bytes of it that are kept."""
        os.close(open_own(self.path))  # refuses a link
        header, records, damaged, whole_bytes = read_journal(self.path)
        if not header and not records:
            self._refuse_foreign()
        if not whole_bytes and self.path.stat().st_size < MAX_HEADER_BYTES:
            return 0  # a run died before its first record was complete
        if resume and header.get("key") in keys and header.get("journal") == FORMAT:
            self.records, self.damaged = records, damaged
            self.is_earlier = header["key"] != self._key
            return whole_bytes
        self.set_aside = _free_name(self.path)
        self.path.rename(self.set_aside)
        return 0

    def _refuse_foreign(self) -> None:
        """Raise UsageError where the file is not a journal, such as a key that was called run.csv.journal."""
        with self.path.open("rb") as stream:
            content = stream.read(MAX_HEADER_BYTES)
            if BEGINNING.fullmatch(content) is None and not encode_record(self._header).startswith(content):
                raise UsageError(f"{self.path} is not a journal of this program: move it, or choose another --out")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record. Raises OutputError when it cannot be written whole; what was there before stays whole."""
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        line = encode_record(record)
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self._file, view) :]
            self._end += len(line)
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                self.sync()
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line is cut off when the file is opened again
                os.ftruncate(self._file, self._end)
                os.lseek(self._file, self._end, os.SEEK_SET)
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}: make room and run the same command again "
                "(without --no-resume), which resumes from here"
            ) from error

    def sync(self) -> None:
        """Force what was appended to disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; it stays on disk."""
        os.close(self._file)

    def delete(self) -> None:
        """Delete the file, still open: the run is complete."""
        self.path.unlink(missing_ok=True)

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Let the file hold these records alone, with this run's key.

        Raises OutputError and leaves the file as it was.
        """
        content = b"".join(map(encode_record, (self._header, *records)))
        replace_file(self.path, content, follow=False)
        os.close(self._file)
        self._open(len(content))


class NoJournal:
    """Stands for the journal of a run that writes to standard output, next to which nothing can be kept."""

    set_aside: Path | None = None
    records: Sequence[dict[str, Any]] = ()
    damaged = 0
    is_empty = True
    is_earlier = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep nothing."""

    def delete(self) -> None:
        """Delete nothing."""

    def close(self) -> None:
        """Close nothing."""


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int, int]:
    """Return (header, records, damaged lines, bytes up to the last whole line).

    The header is empty where the first line is damaged. Records after a damaged line count: each stands for itself.
    """
    lines: list[dict[str, Any] | None] = []
    whole_bytes = 0
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE_BYTES):
            lines.append(decode_record(line))
            if line.endswith(b"\n"):
                whole_bytes = stream.tell()
    header = lines[0] if lines else None
    records = [record for record in lines[1:] if record is not None]
    return header or {}, records, lines.count(None), whole_bytes


def _free_name(path: Path) -> Path:
    """Return the first free of `<path>.old`, `<path>.old2`, ..."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.old{number if number > 1 else ''}")).exists():
        number += 1
    return candidate
