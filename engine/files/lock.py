"""One run at a time on one output: a lock that names its owner and dies with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from engine.errors import OutputError, UsageError

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs on one output are not told apart there
    fcntl = None  # type: ignore[assignment]


def lock_path(out: Path) -> Path:
    """Return where the lock of an output lies: beside the file that a link leads to, so that all its names share it."""
    target = Path(os.path.realpath(out))
    return target.with_name(target.name + ".lock")


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without flock answer, some of NFS and Lustre."""


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Wait until no other process of this node holds the lock, then hold it; where there are no locks, go on."""
    with path.open("w") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        yield


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """The same for a folder, in which nothing is written for it."""
    if fcntl is None:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.EBADF):  # NFS locks only what is open for writing
                raise
        yield
    finally:
        os.close(file)


class OutputLock:
    """Holds `<out>.lock` while a run works on `out`; as a context manager.

    The operating system drops the lock with the process, however it ends, so a file that a dead run left behind is
    simply taken over. The file holds the owner's process number, for the message of whoever comes second.
    """

    def __init__(self, out: Path) -> None:
        self.path = lock_path(out)
        self._out = out
        self._file = -1
        self.note = ""

    def __enter__(self) -> OutputLock:
        """Take the lock. Raises UsageError when another run holds it, OutputError when it cannot be written."""
        try:
            while True:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                self._claim()
                if self._is_current():
                    break
                os.close(self._file)  # its last owner deleted the file between our opening and locking it
            os.ftruncate(self._file, 0)
            os.write(self._file, f"{os.getpid()}\n".encode())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)  # while it is still locked
        os.close(self._file)

    def _claim(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self.note = f"{self.path.parent} knows no locks: see to it that no other run writes {self._out}"
                return
            if not isinstance(error, BlockingIOError):
                raise
            owner = os.read(self._file, 32).decode("ascii", "replace").strip() or "that has just begun"
            os.close(self._file)
            raise UsageError(
                f"{self._out} is being written by process {owner}: wait for it, or choose another place"
            ) from None

    def _is_current(self) -> bool:
        """Return whether the file we hold is the one others will find under the name."""
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False
