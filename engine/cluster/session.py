"""Reach a Ray cluster, or start one on this machine, without Ray's own talk; knows no captions."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.errors import EngineError, UsageError, install_command
from engine.host import available_cores

LOCAL, ANY = "local", "auto"
"""Addresses: a cluster of this machine's own, and whichever one runs on it."""
REACH_S = 10.0
"""Seconds for an address to answer at all; Ray itself would try for minutes."""
STORE_BYTES = 1 << 28
"""Shared memory of a local cluster: what travels are file names and captions."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Ray's own talk is off, unless these are set already; nothing is reported to its makers in any case."""


def require_ray() -> Any:
    """Import ray, or raise EngineError naming the extra that brings it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
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
    them meets a connection that was shut down, Ray ends the process on the spot, before the error is told.
    Raises UsageError for an address that is none, EngineError when nothing answers there.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield ray
        return
    if address not in (LOCAL, ANY):
        _check_reachable(address)
    with _own_signal_handlers(), _silent():
        _connect(ray, address)
    yield ray
    with _own_signal_handlers():
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    mine = {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="CRITICAL",
            **(mine if address == LOCAL else {}),
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
