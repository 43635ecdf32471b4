"""Locks for outputs and folders, so that only one run writes an output. A lock is released when its process ends."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from engine.errors import OutputError, UsageError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems without locks, such as some NFS and Lustre installations."""
LONGEST_OWNER = 32
"""Limit of a lock file in bytes: it holds a process id and a line end. A longer file is not a lock."""
ON_WINDOWS = os.name == "nt"
"""On Windows a lock covers the first byte, which other processes cannot read, and an open file cannot be deleted."""


def lock_path(out: Path) -> Path:
    """Return the lock file of an output. A link is resolved first, so that all names of one file share one lock."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".lock")


def open_own(path: Path) -> int:
    """Open or create a file that belongs to this program (a lock, a journal) for reading and writing.

    Links are not followed: in a folder that several people share, a link could lead to a file that does not belong to
    this program. Raises UsageError for a link or anything else that is not a regular file, and OSError if opening
    fails.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    if path.is_symlink():  # Windows has no O_NOFOLLOW
        raise UsageError(f"{path} is a link, which is not followed: remove it, or choose another output")
    try:
        file = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644)
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory: remove it, or choose another output") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UsageError(f"{path} is a pipe or a device: remove it, or choose another output")
    return file


def _open_lock(path: Path) -> int:
    """Open or create a lock file. Raises UsageError for a file that is not a lock, such as poetry.lock."""
    file = open_own(path)
    if _owner(file) is None:
        os.close(file)
        raise UsageError(f"{path} is not a lock of this program: move it, or choose another output")
    return file


def _owner(file: int) -> str | None:
    """Return the process id in a lock file, "" if it is not written yet, or None if the file is not a lock."""
    os.lseek(file, 1 if ON_WINDOWS else 0, os.SEEK_SET)
    content = os.read(file, LONGEST_OWNER + 1).strip(b" \r\n\0")  # a power cut can leave NUL bytes
    is_number = len(content) <= LONGEST_OWNER and content.isdigit()
    return content.decode("ascii") if is_number or not content else None


def _lock(file: int, *, wait: bool) -> bool | None:
    """Lock an open file. Return whether that succeeded, or None if the file system has no locks."""
    from filelock import lock_descriptor  # imported late: the command line's help does not need it

    try:
        return bool(lock_descriptor(file, blocking=wait))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Wait until no other process on this node holds the lock, then hold it. Without file locks, do not wait."""
    file = _open_lock(path)
    try:
        _lock(file, wait=True)
        yield
    finally:
        os.close(file)


@contextmanager
def tried_lock(path: Path) -> Iterator[bool]:
    """Hold the lock if no other process on this node does. Yields whether it is held; without file locks it is not."""
    file = _open_lock(path)
    try:
        yield bool(_lock(file, wait=False))
    finally:
        os.close(file)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder itself, like waiting_lock but without a lock file. Windows has no such locks: does nothing."""
    if ON_WINDOWS:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            _lock(file, wait=True)
        except OSError as error:
            if error.errno != errno.EBADF:  # NFS locks only files opened for writing, and a folder cannot be
                raise
        yield
    finally:
        os.close(file)


class OutputLock:
    """Context manager that holds `<out>.lock` while a run writes `out`.

    The operating system releases the lock when the process ends, even if it is killed, so a lock file left by a dead
    run is reused. The file contains the owner's process id, for the error message of a second run. `note` is a line
    for the user if the file system has no locks, else empty.
    """

    def __init__(self, out: Path) -> None:
        self.path = lock_path(out)
        self._out = out
        self._file = -1
        self.note = ""

    def __enter__(self) -> OutputLock:
        """Take the lock.

        Raises UsageError if another run holds it or the file is not a lock, OutputError if it cannot be written.
        """
        try:
            while True:
                self._file = _open_lock(self.path)
                self._claim()
                if self._is_current():
                    break
                os.close(self._file)  # the last owner deleted the file after we opened it and before we locked it
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, f" {os.getpid()}\n".encode())  # the space is the byte that Windows locks
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if ON_WINDOWS:
            os.close(self._file)
            with suppress(OSError):  # the next run may have opened it already
                self.path.unlink()
            return
        # before the lock is released, so that we never delete a file that the next run has locked
        self.path.unlink(missing_ok=True)
        os.close(self._file)

    def _claim(self) -> None:
        is_locked = _lock(self._file, wait=False)
        if is_locked is None:
            self.note = f"{self.path.parent} has no file locks: make sure that no other run writes {self._out}"
        elif not is_locked:
            owner = _owner(self._file) or "that has just started"
            os.close(self._file)
            raise UsageError(f"{self._out} is being written by process {owner}: wait for it, or choose another output")

    def _is_current(self) -> bool:
        """Return whether the path still leads to the file we locked."""
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False
