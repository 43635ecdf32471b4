"""Reach a Ray cluster, or start one on this machine, without Ray's own talk; knows no captions."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import EngineError, UsageError, install_command
from engine.host import available_cores, descendants, started_at, wait_or_kill

LOCAL, ANY = "local", "auto"
"""Addresses: a cluster of this machine's own, and whichever one runs on it."""
REACH_S = 10.0
"""Seconds for an address to answer at all; Ray itself would try for minutes."""
STORE_BYTES = 1 << 28
"""Shared memory of a local cluster: what travels are file names and captions."""
PATIENCE_S = 10.0
"""Seconds for Ray's processes to end by themselves after a run."""
LONGEST_TEMPORARY = 40
"""Characters of a folder's name below which the names of Ray's sockets still fit into the system's 107."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Ray's own talk is off, unless these are set already; nothing is reported to its makers in any case."""

_processes: dict[int, str | None] = {}
"""Processes of a cluster of this machine's own: {id: start}."""
_folders: list[str] = []
"""Its temporary folders."""


def require_ray() -> Any:
    """Import ray, or raise EngineError naming the extra that brings it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if "ray" not in sys.modules:  # what is registered first is called last: after Ray's own end
        atexit.register(_leave_nothing)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(f"--ray needs the package ray ({error}): {install_command('ray')}") from None
    return ray


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Connect to the cluster at `address`, start one (LOCAL), or use the one this process is connected to already.

    After an error the connection ends with the process: threads of Ray Data may still be at work then, and when one of
    them meets a connection that was shut down, Ray ends the process on the spot, before the error is printed.
    Nothing of a cluster that was started here outlives it: no process, and no temporary file.
    Raises UsageError for an invalid address, EngineError when nothing answers there.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield ray
        return
    if address not in (LOCAL, ANY):
        _check_reachable(address)
    before = set(descendants(os.getpid()))
    with _own_signal_handlers(), _silent(), _private_files():
        _connect(ray, address)
    try:
        yield ray
    except KeyboardInterrupt:  # the command ends at once, without what is registered for the end of a program
        _remove_folders()
        raise
    finally:
        if address == LOCAL:
            started = [pid for pid in descendants(os.getpid()) if pid not in before and _is_of_ray(pid)]
            _processes.update((pid, started_at(pid)) for pid in started)
    with _own_signal_handlers():
        ray.shutdown()
    _leave_nothing()


def _is_of_ray(pid: int) -> bool:
    """Return whether a process is Ray's: this one may have children of other libraries, or of the user's program."""
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return line.startswith(b"ray::") or b"/ray/" in line
    return False


def _leave_nothing() -> None:
    """Wait for the processes of a cluster that was started here, and remove its files.

    Ray's shutdown returns once the head of the cluster has ended. Its workers end when they miss it, and one that was
    just starting then may not notice for minutes.
    """
    wait_or_kill(_processes, PATIENCE_S)
    _processes.clear()
    _remove_folders()


def _remove_folders() -> None:
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


@contextmanager
def _private_files() -> Iterator[None]:
    """Let others read no file that is made meanwhile, nor the token that guards Ray's clusters of this user.

    Ray writes the token into a file with the usual permissions, and whoever has it may run code in the cluster.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
        with contextlib.suppress(OSError, RuntimeError, AttributeError):  # no home folder; Windows has no user ids
            token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
            if token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:  # one of an earlier run
                token.chmod(0o600)


def _own_folder() -> dict[str, str]:
    """Return the option of ray.init for a temporary folder that others cannot enter; none where names get too long."""
    parent = next((one for one in (tempfile.gettempdir(), "/tmp") if len(one) <= LONGEST_TEMPORARY - 13), None)
    if parent is None or not os.access(parent, os.W_OK) or os.environ.get("RAY_TMPDIR"):
        return {}
    _folders.append(tempfile.mkdtemp(prefix="ray-", dir=parent))
    return {"_temp_dir": _folders[-1]}


def _connect(ray: Any, address: str) -> None:
    mine: dict[str, Any] = {}
    if address == LOCAL:
        mine = {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": STORE_BYTES}
        mine |= _own_folder()
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="CRITICAL",
            **mine,
        )
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if type(error.__cause__).__name__ == "AuthenticationError":
            raise EngineError(
                f"the Ray cluster at {address} wants a token: set RAY_AUTH_MODE=token, with the token in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from error
        what = "no Ray cluster could be started here" if address == LOCAL else f"no Ray cluster answers at {address}"
        hint = "" if address == LOCAL else ": `ray start --head` starts one, --ray alone a local one"
        raise EngineError(f"{what}: {' '.join(str(error).split())[:300]}{hint}") from error


def _check_reachable(address: str) -> None:
    """Raise an EngineError when nothing listens at HOST:PORT or ray://HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--ray takes HOST:PORT, ray://HOST:PORT, {ANY} or nothing, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"no Ray cluster answers at {address}: {reason}: `ray start --head` starts one, --ray alone a local one"
        ) from None


@contextmanager
def _silent() -> Iterator[None]:
    """Close standard error to native code, too: Ray's core says there how little it will say."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handlers of this program: Ray puts its own in their place."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            with contextlib.suppress(ValueError):  # not the main thread: nobody's handler was touched
                signal.signal(number, handler)
