"""Workers on a Ray cluster: the connection, and actors on its nodes."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.backends import require_backend
from engine.bundle.manifest import Bundle
from engine.bundle.signature import environment
from engine.errors import EngineError, UsageError, counted, install_command
from engine.host import available_cores, descendants, started_at, wait_or_kill
from engine.inputs.images import ImageFile
from engine.runtime import CPU_BACKENDS, Workers
from engine.workers.driver import Events, Log, Team, WorkerSource
from engine.workers.messages import WorkOrder, pack_images
from engine.workers.worker import CaptionWorker

LOCAL, ANY = "local", "auto"
"""Special addresses: start a cluster on this machine, or use the one that is running on it."""
REACH_S = 10.0
"""Timeout in seconds for an address to respond; Ray itself would try for minutes."""
STORE_BYTES = 1 << 28
"""Shared memory of a local cluster in bytes; only file names and captions are transferred."""
PATIENCE_S = 10.0
"""Seconds for Ray's processes to end by themselves after a run; then they are killed."""
LONGEST_TEMPORARY = 40
"""Maximum characters of a temporary folder's name: the paths of Ray's sockets in it are limited to 107."""
REMOVALS = 20
"""Attempts to remove a cluster's folder, 0.1 s apart."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Silence Ray's logs, unless these are set already. Usage statistics are always off."""

_processes: dict[int, str | None] = {}
"""Processes of a cluster that was started here: {process id: start time}."""
_folders: list[str] = []
"""Temporary folders of that cluster."""


def require_ray() -> Any:
    """Import ray. Raises EngineError, with the command that installs it, if it is missing."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if "ray" not in sys.modules:  # registered before Ray's own exit handler, so that it runs after it
        atexit.register(_clean_up)
    try:
        import ray
    except ImportError as error:
        raise EngineError(f"--ray needs the package ray ({error}): {install_command('ray')}") from None
    return ray


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Connect to the cluster at `address`, start one (LOCAL), or use the one that this process is connected to already.

    After an error the connection ends with the process: shutting down a cluster that has failed might take long.

    A cluster that was started here leaves no process and no temporary file. Raises UsageError for an invalid address,
    EngineError if nothing responds there.
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
    except KeyboardInterrupt:  # the command exits at once, without running exit handlers
        _remove_folders()
        raise
    finally:
        if address == LOCAL:
            started = [pid for pid in descendants(os.getpid()) if pid not in before and _is_of_ray(pid)]
            _processes.update((pid, started_at(pid)) for pid in started)
    with _own_signal_handlers():
        ray.shutdown()
    _clean_up()


def _is_of_ray(pid: int) -> bool:
    """Return whether a process is Ray's; others may be children of other libraries, or of the user's program."""
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return line.startswith(b"ray::") or b"/ray/" in line
    return False


def _clean_up() -> None:
    """Wait for the processes of a cluster that was started here, kill those that do not end, and remove its files.

    Ray's shutdown returns when the head of the cluster has ended. Its workers end when they notice that, which may take
    minutes for one that was just starting.
    """
    wait_or_kill(_processes, PATIENCE_S)
    _processes.clear()
    _remove_folders()


def _remove_folders() -> None:
    """Remove the folders of clusters that were started here; again, if a process that is ending still writes there."""
    while _folders:
        folder = Path(_folders.pop())
        for _ in range(REMOVALS):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


@contextmanager
def _private_files() -> Iterator[None]:
    """Make files that are created in this context, and the token of this user's Ray clusters, private to the user.

    Ray writes the token to a file with default permissions, and whoever can read it can run code in the cluster.
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
    """Create a private temporary folder; return it as an option of ray.init, or {} if its name would be too long."""
    # 13 characters for `/ray-` and the random name
    folders = (tempfile.gettempdir(), "/tmp")
    parent = next((folder for folder in folders if len(folder) <= LONGEST_TEMPORARY - 13), None)
    if parent is None or not os.access(parent, os.W_OK) or os.environ.get("RAY_TMPDIR"):
        return {}
    _folders.append(tempfile.mkdtemp(prefix="ray-", dir=parent))
    return {"_temp_dir": _folders[-1]}


def _connect(ray: Any, address: str) -> None:
    settings: dict[str, Any] = {}
    if address == LOCAL:
        settings = {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": STORE_BYTES}
        settings |= _own_folder()
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="CRITICAL",
            **settings,
        )
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if type(error.__cause__).__name__ == "AuthenticationError":
            raise EngineError(
                f"the Ray cluster at {address} requires a token: set RAY_AUTH_MODE=token, with the token in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from error
        what = "no Ray cluster could be started here" if address == LOCAL else f"no Ray cluster responds at {address}"
        hint = "" if address == LOCAL else ": `ray start --head` starts one, --ray alone a local one"
        raise EngineError(f"{what}: {' '.join(str(error).split())[:300]}{hint}") from error


def _check_reachable(address: str) -> None:
    """Raise an EngineError if nothing listens at HOST:PORT or ray://HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--ray expects HOST:PORT, ray://HOST:PORT, {ANY} or no value, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"no Ray cluster responds at {address}: {reason}: `ray start --head` starts one, --ray alone a local one"
        ) from None


@contextmanager
def _silent() -> Iterator[None]:
    """Redirect standard error to /dev/null, for native code as well: Ray's core writes there when it starts."""
    sys.stderr.flush()
    original = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        os.close(original)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore this program's signal handlers, which Ray replaces with its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError):  # not the main thread, in which case Ray replaces none
                signal.signal(number, handler)


@dataclass(frozen=True)
class NodeFacts:
    """Backend and package versions of a node, which decide captions, or the error if something is missing there."""

    backend: str = ""
    environment: str = ""
    error: str = ""
    exit_code: int = 1


def inspect_node(backend: str) -> NodeFacts:
    """Return the backend that `backend` stands for on this node, and its package versions."""
    try:
        name = require_backend(backend)
        return NodeFacts(name, environment(name))
    except EngineError as error:
        return NodeFacts(error=f"{error} (on the node {platform.node()})", exit_code=error.exit_code)


@dataclass(frozen=True)
class WorkerPlan:
    """`actors` workers with `cpus` CPUs and `gpus` GPUs (0 or 1) each, at most `peers` of them on a node."""

    actors: int
    cpus: int
    gpus: int
    peers: int

    def __str__(self) -> str:
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"{self.actors} worker{'s' if self.actors > 1 else ''} with {'a GPU and ' if self.gpus else ''}{cpus}"


@contextmanager
def open_cluster(bundle: Bundle, order: WorkOrder, workers: Workers, log: Log) -> Iterator[WorkerSource]:
    """Connect to a cluster, resolve the backend on one of its nodes, and log how many workers there will be."""
    runtime = order.runtime
    with cluster(workers.address or LOCAL) as ray:
        on_cpu = runtime.backend in CPU_BACKENDS or runtime.device == "cpu"
        gpus = 0 if on_cpu else int(ray.cluster_resources().get("GPU", 0))
        node = _ask_a_node(ray, runtime.backend, min(gpus, 1))
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if node.backend in CPU_BACKENDS else gpus
        plan = plan_actors(resources, gpus, actors=workers.actors, threads=runtime.threads)
        log(f"backend: {node.backend}, {plan}")
        order = replace(
            order,
            bundle=order.bundle.absolute(),
            environment=node.environment,
            runtime=replace(
                runtime, backend=node.backend, threads=plan.cpus, plans=runtime.plans and runtime.plans.absolute()
            ),
            peers=plan.peers,
            num_nodes=len(resources),
        )
        # Ray would restart an actor without telling the driver which images it held: the driver does it
        kind = ray.remote(
            num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0, max_task_retries=0, max_concurrency=2
        )(CaptionWorker)

        def start(number: int, order: WorkOrder, events: Events) -> Actor:
            return Actor(ray, kind.remote(order), number, events)

        source = WorkerSource(bundle, order, Team(plan.actors, start, "Ray worker", "lower --ray-actors or --rows"))
        try:
            yield source
        finally:
            source.end()


class Actor:
    """A CaptionWorker that runs as a Ray actor, see Worker. Until the cluster has room for it, it only waits."""

    def __init__(self, ray: Any, handle: Any, number: int, events: Events) -> None:
        self.number, self.wants = number, 0
        self._ray, self._handle, self._how = ray, handle, "it was killed"
        self._reader = threading.Thread(target=self._listen, args=(events,), name="Ray worker", daemon=True)
        self._reader.start()

    @property
    def name(self) -> str:
        return f"Ray worker {self.number}"

    def submit(self, images: Sequence[ImageFile]) -> None:
        self._handle.submit.remote(pack_images(images))

    def end(self, patience_s: float = 0) -> str:  # noqa: ARG002, Ray has ended it, or it is to end at once
        self._ray.kill(self._handle)
        self._reader.join()
        return self._how

    def _listen(self, events: Events) -> None:
        """Pass on the messages. Ray ends the process if this thread still uses a connection that was shut down."""
        try:
            for answer in self._handle.answers.options(num_returns="streaming").remote():
                events.put((self, self._ray.get(answer)))
        except self._ray.exceptions.RayError as error:  # its text has many lines, its type says the cause
            self._how = type(error).__name__
        events.put((self, ""))


def _ask_a_node(ray: Any, backend: str, gpus: int) -> NodeFacts:
    try:
        node: NodeFacts = ray.get(ray.remote(num_cpus=0, num_gpus=gpus)(inspect_node).remote(backend))
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"a node cannot run the engine ({_first_line(error)}): install the same blip-caption-engine on all nodes"
        ) from error
    if node.error:
        raise (UsageError if node.exit_code == UsageError.exit_code else EngineError)(node.error)
    return node


def plan_actors(nodes: list[Mapping[str, float]], gpus: int, *, actors: int | None, threads: int | None) -> WorkerPlan:
    """Return one worker per GPU if there are `gpus`, otherwise as many workers with `threads` CPUs each as fit.

    `nodes` are the resources of each node, with Ray's names. Without `threads` a worker gets the CPUs of the smallest
    node, or fewer if that many `actors` do not fit. Raises UsageError for more `actors` than fit.
    """
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if gpus:
        cpus = threads or 1
        fitting = [min(int(node.get("GPU", 0)), int(node.get("CPU", 0)) // cpus) for node in nodes]
        if sum(fitting) < (actors or 1):
            raise UsageError(
                f"the Ray cluster has room for {counted(sum(fitting), 'worker')} with a GPU and "
                f"{counted(cpus, 'CPU')}: lower --ray-actors or --threads"
            )
        return WorkerPlan(actors or sum(fitting), cpus, 1, min(actors or sum(fitting), max(fitting)))
    if not cores:
        raise EngineError("the Ray cluster has no CPUs: start its nodes with some (`ray start --num-cpus N`)")
    cpus = threads or min(cores)
    if threads is None and actors is not None:
        cpus = max(1, min(cpus, sum(cores) // actors))
    room = sum(count // cpus for count in cores)
    if room < (actors or 1):
        raise UsageError(
            f"the Ray cluster has room for {counted(room, 'worker')} with {counted(cpus, 'CPU')}: lower --ray-actors "
            "or --threads"
        )
    return WorkerPlan(actors or room, cpus, 0, min(actors or room, max(cores) // cpus))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
