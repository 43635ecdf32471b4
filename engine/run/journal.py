"""The journal next to run.csv, which records each caption as it is finished, so that an interrupted run resumes.

A text file with one record per line: crc32 of the rest in hexadecimal, a space, JSON. The first record holds the key of
the run: bundle, options and packages. Each of the others holds a caption. When the file is opened again, an incomplete
last line is cut off, and a line that does not match its checksum is skipped; these images are captioned again.
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
"""Seconds between two fsyncs: a power cut can lose the records of that time, a crash of the program loses none."""
MAX_HEADER_BYTES = 1000
"""Maximum size of the first record."""
MAX_LINE_BYTES = 1 << 24
"""Far above any record, so that a file without line breaks is not read into memory as a whole."""
BEGINNING = re.compile(rb"\0*|[0-9a-f]{8} \{.*", re.DOTALL)
"""The beginning of a journal: a checksum and JSON, or only NUL bytes after a power cut."""


def journal_path(out: Path) -> Path:
    """Return the path of the journal of the run `out`; if `out` is a link, next to its target."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".journal")


def update_path(out: Path) -> Path:
    """Return where --update keeps the captions of `out`: in a separate file, as a complete run deletes its journal."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".update.journal")


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line: checksum, space, JSON, newline."""
    body = json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None if the line is incomplete or damaged."""
    checksum, space, body = line[:8], line[8:9], line[9:-1]
    if space != b" " or line[-1:] != b"\n" or checksum != b"%08x" % zlib.crc32(body):
        return None
    try:
        record = json.loads(body)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class Journal:
    """An open journal; `append` adds a record.

    records     the records when it was opened
    damaged     number of incomplete or damaged lines
    set_aside   where a journal of another run was moved to, or None
    is_earlier  whether the journal has the `earlier_key`, the key that earlier versions gave the same run
    """

    def __init__(self, path: Path, key: str, *, earlier_key: str = "", resume: bool = True) -> None:
        """Open or create the journal of the run `key`.

        A journal of another run, and without `resume` any journal, is renamed. Raises UsageError for a link or a file
        that is not a journal, without changing it, and OutputError if the file cannot be opened or written.
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
            raise OutputError(f"the journal {path}, next to --out, cannot be opened: {error.strerror}") from error
        self._header_end = 0
        if self._end == 0:
            self._write(self._header)
            self._header_end = self._end

    def _open(self, end: int) -> None:
        """Open the file to append after byte `end`, and cut off the rest."""
        self._file = open_own(self.path)
        self._end = end
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    @property
    def _header(self) -> dict[str, Any]:
        return {"journal": FORMAT, "key": self._key}

    @property
    def is_empty(self) -> bool:
        """Whether the journal holds nothing except the header that this run wrote."""
        return self._end == self._header_end

    def _take_over(self, keys: tuple[str, str], resume: bool) -> int:
        """Read the existing journal, or rename it; return how many of its bytes are kept."""
        os.close(open_own(self.path))  # raises UsageError for a link
        header, records, damaged, whole_bytes = read_journal(self.path)
        if not header and not records:
            self._refuse_foreign()
        if not whole_bytes and self.path.stat().st_size < MAX_HEADER_BYTES:
            return 0  # the run was killed before its first record was complete
        if resume and header.get("key") in keys and header.get("journal") == FORMAT:
            self.records, self.damaged = records, damaged
            self.is_earlier = header["key"] != self._key
            return whole_bytes
        self.set_aside = _free_name(self.path)
        self.path.rename(self.set_aside)
        return 0

    def _refuse_foreign(self) -> None:
        """Raise UsageError if the file is not a journal but a file of the user with the same name."""
        with self.path.open("rb") as stream:
            content = stream.read(MAX_HEADER_BYTES)
            if BEGINNING.fullmatch(content) is None and not encode_record(self._header).startswith(content):
                raise UsageError(f"{self.path} is not a journal of this program: move it, or choose another --out")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record. Raises OutputError if it cannot be written completely; earlier records stay intact."""
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
            with contextlib.suppress(OSError):  # otherwise it is cut off when the file is opened again
                os.ftruncate(self._file, self._end)
                os.lseek(self._file, self._end, os.SEEK_SET)
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}: free disk space and run the same command again "
                "(without --no-resume), which resumes from here"
            ) from error

    def sync(self) -> None:
        """Force the appended records to disk (fsync)."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file, which stays on disk."""
        os.close(self._file)

    def delete(self) -> None:
        """Delete the file, which may still be open: the run is complete."""
        self.path.unlink(missing_ok=True)

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace the records of the file, and set this run's key.

        Raises OutputError if that fails, and leaves the file unchanged.
        """
        content = b"".join(map(encode_record, (self._header, *records)))
        replace_file(self.path, content, follow=False)
        os.close(self._file)
        self._open(len(content))


class NoJournal:
    """Replaces the journal of a run that writes to standard output, which keeps nothing."""

    set_aside: Path | None = None
    records: Sequence[dict[str, Any]] = ()
    damaged = 0
    is_empty = True
    is_earlier = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def delete(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int, int]:
    """Return (header, records, number of damaged lines, bytes up to the end of the last complete line).

    The header is empty if the first line is damaged. Records after a damaged line are valid, as lines are independent.
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
    """Return the first path that does not exist of `<path>.old`, `<path>.old2`, ..."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.old{number if number > 1 else ''}")).exists():
        number += 1
    return candidate
