"""One worker process, as its parent sees it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from engine.errors import EngineError
from engine.inputs.images import ImageFile
from engine.workers.messages import WorkOrder, pack_images
from engine.workers.resources import WorkerResources

PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from engine.workers.worker import main; main()"
"""The packages are this process's, wherever it found them."""


class Child:
    """A worker process, begun at once. `events` gets (child, line) of all it says, and an empty line when it has ended.

    It says first how many images it `wants` at a time, which whoever reads the events keeps here.
    """

    def __init__(
        self, place: int, share: WorkerResources, order: WorkOrder, events: SimpleQueue[tuple[Child, bytes]]
    ) -> None:
        """Raises EngineError where no process can be started."""
        self.place = place
        self.wants = 0
        try:
            with _interrupts_held_back():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | dict(share.environment),
                )
        except OSError as error:
            raise EngineError(
                f"no worker process can be started ({error.strerror}): ask for fewer --processes"
            ) from error
        if share.cores:
            with suppress(OSError):  # it has ended already, which its events will say
                os.sched_setaffinity(self._process.pid, share.cores)
        self._reader = threading.Thread(target=self._listen, args=(events,), name="worker process", daemon=True)
        self._reader.start()
        self._send(pickle.dumps(order))

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, images: Sequence[ImageFile]) -> None:
        """Send images to caption; to a process that has ended they do not come, which its events will say."""
        self._send(f"{pack_images(list(images))}\n".encode("ascii"))

    def end(self, patience_s: float = 0) -> str:
        """Kill the process where it does not end by itself; return how it ended, in words."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self._process.kill()
        code = self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with suppress(OSError):  # what it did not read any more
            self._process.stdin.close()
        return f"exit code {code}" if code >= 0 else _signal_name(-code)

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(message)
            self._process.stdin.flush()

    def _listen(self, events: SimpleQueue[tuple[Child, bytes]]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                if line.endswith(b"\n"):  # else it was killed while it spoke
                    events.put((self, line))
        events.put((self, b""))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let what is started meanwhile never see Ctrl-C, which a terminal sends to all: its parent ends it.

    A signal that is held back stays so in a new program, from its first instruction on.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
