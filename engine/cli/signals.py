"""Ctrl-C and SIGTERM end a command within a second, whatever a library holds.

Python raises KeyboardInterrupt between two of its own instructions: a matrix product, a lock or a child that does not
answer can keep it waiting for ever. So a thread watches for the signal, too, and ends the process when the polite way
takes too long. What is on disk stands that: runs are killed at random in the tests, and go on from their journals.
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
"""Exit codes of a program stopped by Ctrl-C (128 + SIGINT) and by a plain kill (128 + SIGTERM)."""
BROKEN_PIPE = 141
"""Of one whose reader has gone (128 + SIGPIPE), as shells show it of `yes | head`."""
GRACE_S = 0.7
"""Seconds for the polite way: journals and locks are closed in milliseconds."""
STOPPED = "error: stopped"

_armed = threading.Event()
_below: set[int] = set()
"""Processes that were below this one when the signal came: what their parents leave behind is found no more."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as cleanly as Ctrl-C does."""


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM end this process within a second; called once, by the program's main thread.

    A signal that the process was started to ignore (`nohup`, a background job of a shell) stays ignored.
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
    """End this process now, children included, without waiting for threads and destructors of libraries.

    In a program that did not call `end_on_signals` (a test, another program's command) it is sys.exit.
    """
    if not _armed.is_set():
        sys.exit(exit_code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    killdescendants()
    os._exit(exit_code)


def killdescendants() -> None:
    """Kill all processes below this one, where /proc tells them; a scorer's Java is one."""
    for pid in _below | set(descendants(os.getpid())):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _forget() -> None:
    """Prepare a child that a library forks, such as torch's DataLoader: its parent ends it, also at Ctrl-C.

    With the inherited handlers it would print a traceback, and its signals would stop the parent.
    """
    signal.set_wakeup_fd(-1)
    for number, usual in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == _stop:
            signal.signal(number, usual)


def _stop(signum: int, frame: object) -> NoReturn:  # noqa: ARG001
    sys.unraisablehook = lambda _: None  # what is raised here within a destructor would be printed with its traceback
    _below.update(descendants(os.getpid()))
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def _watch(receiver: socket.socket, sender: socket.socket) -> None:  # noqa: ARG001  (kept open as long as the thread)
    codes = {int(signal.SIGINT): INTERRUPTED, int(signal.SIGTERM): TERMINATED}
    while True:
        number = receiver.recv(1)[0]
        if number in codes:
            time.sleep(GRACE_S)
            with contextlib.suppress(OSError):
                os.write(2, f"{STOPPED}\n".encode())
            killdescendants()
            os._exit(codes[number])
