"""Make Ctrl-C and SIGTERM end a command within a second, whatever native code is running.

Python raises KeyboardInterrupt only between two bytecode instructions, so a matrix product, a lock or a child process
that does not respond can delay it for ever. Therefore a thread also watches for the signal and ends the process if the
regular shutdown takes longer than GRACE_S. Files on disk survive that: the tests kill runs at random moments, and these
resume from their journals.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from engine.host import descendants

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a program that was stopped by Ctrl-C (128 + SIGINT) or by `kill` (128 + SIGTERM)."""
BROKEN_PIPE = 141
"""Exit code of a program whose reader has closed the pipe (128 + SIGPIPE), such as `yes` in `yes | head`."""
GRACE_S = 0.7
"""Seconds for the regular shutdown, which closes journals and locks in milliseconds."""
STOPPED = "error: stopped"

_armed = threading.Event()
_descendants: set[int] = set()
"""Descendants of this process when the signal came: once their parents have ended they cannot be found any more."""


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, so that it stops a command as cleanly as Ctrl-C does."""


def end_on_signals() -> None:
    """Make SIGINT and SIGTERM end this process within a second. Call it once, from the main thread.

    A signal that was ignored when the process started (`nohup`, a background job of a shell) stays ignored.
    """
    if _armed.is_set() or threading.current_thread() is not threading.main_thread():
        return
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == usual:
            signal.signal(number, _stop)
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(receiver, sender), name="signals", daemon=True).start()
    _armed.set()


def end(exit_code: int) -> NoReturn:
    """End this process and its descendants now, without waiting for threads and destructors of libraries.

    Without a previous `end_on_signals` (in a test, or in another program) this is sys.exit.
    """
    if not _armed.is_set():
        sys.exit(exit_code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    kill_descendants()
    os._exit(exit_code)


def kill_descendants() -> None:
    """Kill all descendants of this process that /proc lists, such as the Java process of a metric."""
    for pid in _descendants | set(descendants(os.getpid())):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _forget() -> None:
    """Reset signals in a child that a library forks, such as a worker of torch's DataLoader; its parent ends it.

    With the inherited handlers the child would print a traceback at Ctrl-C, and its signals would stop the parent.
    """
    signal.set_wakeup_fd(-1)
    for number, usual in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == _stop:
            signal.signal(number, usual)


def _stop(signum: int, frame: object) -> NoReturn:  # noqa: ARG001
    sys.unraisablehook = lambda _: None  # if raised inside a destructor, it would be printed with a traceback
    _descendants.update(descendants(os.getpid()))
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def _watch(receiver: socket.socket, sender: socket.socket) -> None:  # noqa: ARG001  (keeps it open as long as the thread runs)
    codes = {int(signal.SIGINT): INTERRUPTED, int(signal.SIGTERM): TERMINATED}
    while True:
        number = receiver.recv(1)[0]
        if number in codes:
            time.sleep(GRACE_S)
            with contextlib.suppress(OSError):
                os.write(2, f"{STOPPED}\n".encode())
            kill_descendants()
            os._exit(codes[number])
