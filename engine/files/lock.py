"""One run at a time on one output: a lock that names its owner and ends with its process."""

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
"""What file systems without locks answer, some of NFS and Lustre."""
LONGEST_OWNER = 32
"""Bytes of a lock file: a process number and a line end are fewer. A longer file is not a lock."""
ON_WINDOWS = os.name == "nt"
"""There a lock covers the file's first byte, which no other process can read meanwhile, and an open file stays."""


def lock_path(out: Path) -> Path:
    """Return the path of an output's lock: next to the file that a link leads to, so that all its names share it."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".lock")


def open_own(path: Path) -> int:
    """Open or create a file of this program's own, such as a lock or a journal, for reading and writing.

    A link is never followed: in a folder that several people share, it could lead to a file that is not ours. Raises
    UsageError for a link and for what is not a file, OSError as the system does.
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
    """Return the process number in a lock file, empty where there is none yet; None for another kind of file."""
    os.lseek(file, 1 if ON_WINDOWS else 0, os.SEEK_SET)
    content = os.read(file, LONGEST_OWNER + 1).strip(b" \r\n\0")  # NULs: a power cut
    is_number = len(content) <= LONGEST_OWNER and content.isdigit()
    return content.decode("ascii") if is_number or not content else None


def _lock(file: int, *, wait: bool) -> bool | None:
    """Lock an open file; return whether that worked, None where the file system has no locks."""
    from filelock import lock_descriptor  # here: the command line's help does without it

    try:
        return bool(lock_descriptor(file, blocking=wait))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Wait until no other process of this node holds the lock, then hold it; without locks, do not wait."""
    file = _open_lock(path)
    try:
        _lock(file, wait=True)
        yield
    finally:
        os.close(file)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder as with waiting_lock, without a file in it. Windows cannot lock folders."""
    if ON_WINDOWS:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            _lock(file, wait=True)
        except OSError as error:
            if error.errno != errno.EBADF:  # NFS locks only what is open for writing
                raise
        yield
    finally:
        os.close(file)


class OutputLock:
    """Holds `<out>.lock` while a run works on `out`; as a context manager.

    The operating system drops the lock with the process, however it ends, so the file that a dead run left behind is
    taken over. The file holds the owner's process number, for the message of the run that comes second. `note` is a
    line for the user where the file system has no locks.
    """

    def __init__(self, out: Path) -> None:
        self.path = lock_path(out)
        self._out = out
        self._file = -1
        self.note = ""

    def __enter__(self) -> OutputLock:
        """Take the lock.

        Raises UsageError when another run holds it or the file is not a lock, OutputError when it cannot be written.
        """
        try:
            while True:
                self._file = _open_lock(self.path)
                self._claim()
                if self._is_current():
                    break
                os.close(self._file)  # its last owner deleted the file between our opening and locking it
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
            with suppress(OSError):  # the next run may have opened it
                self.path.unlink()
            return
        self.path.unlink(missing_ok=True)  # while it is still locked
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
        """Return whether the file we hold is the one others will find under the name."""
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False
