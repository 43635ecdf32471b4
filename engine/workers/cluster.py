"""Captioning on a Ray cluster: the connection, the workers, and the driver that distributes images."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.backends import require_backend
from engine.bundle.manifest import Bundle
from engine.bundle.open import BundleRef
from engine.bundle.signature import environment
from engine.bundle.tokenizer import CaptionTokenizer
from engine.captioner import PendingImages, search_for, searches_for
from engine.captions import Caption
from engine.errors import BackendError, EngineError, ImageError, UsageError, install_command
from engine.host import available_cores, descendants, started_at, wait_or_kill
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote
from engine.options import DecodeOptions
from engine.runtime import CPU_BACKENDS, Runtime, Workers
from engine.version import __version__
from engine.workers.messages import (
    COLUMN,
    WorkOrder,
    pack_captions,
    pack_error,
    pack_failures,
    pack_image_notes,
    pack_images,
    pack_note,
    unpack_answer,
    unpack_images,
)
from engine.workers.worker import CaptionStream, Unreadable

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
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Silence Ray's logs and progress bars, unless these are set already. Usage statistics are always off."""

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
        import ray.data
    except ImportError as error:
        raise EngineError(f"--ray needs the package ray ({error}): {install_command('ray')}") from None
    return ray


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Connect to the cluster at `address`, start one (LOCAL), or use the one that this process is connected to already.

    After an error the connection is not shut down but ends with the process. Threads of Ray Data may still be running,
    and if one of them uses a connection that was shut down, Ray ends the process at once, before the error is printed.

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
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


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


MESSAGES_PER_BLOCK = 8
"""Number of messages with the captions of a block. More of them lose less when a worker or driver is killed, but each
has a cost. They are always sent after the same images: from a repeated block Ray drops as many messages as have arrived
before.
"""


MOST_ATTEMPTS = 10
"""Attempts at a block before the run gives up; if an image kills workers, Ray would replace them for ever."""


class AttemptCounter:
    """An actor that counts the attempts at each block."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, block: str) -> int:
        """Count one more attempt at a block and return their number."""
        self._begun[block] += 1
        return self._begun[block]


def too_many_attempts(block: str) -> str:
    """Return the message for a block that has killed too many workers."""
    images = unpack_images(block)
    return pack_error(
        BackendError(
            f"{MOST_ATTEMPTS} workers died at the images {images[0].source} to {images[-1].source}, or at others in "
            "progress: if memory is short, lower --rows; the same command resumes from here"
        )
    )


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
        return NodeFacts(name, _versions(name))
    except EngineError as error:
        return NodeFacts(error=f"{error} (on the node {platform.node()})", exit_code=error.exit_code)


def _versions(backend: str) -> str:
    return f"{environment(backend)}|engine:{__version__}"


class CaptionWorker:
    """A Ray actor that loads the bundle of an order once, and maps tables of image blocks to tables of messages.

    Two concurrent calls keep it busy from one block to the next, see CaptionStream.
    """

    def __init__(self, order: WorkOrder, attempts: Any) -> None:
        """Load the bundle. An error becomes the answer to every block, as Ray would not pass on one raised here intact.

        `attempts` is the handle of an AttemptCounter actor.
        """
        self._order = order
        self._attempts = attempts
        self._where = f" (on the node {platform.node()})" if order.num_nodes > 1 else ""
        try:
            self._load()
        except EngineError as error:
            self._error: EngineError | None = error
        else:
            self._error = None

    def _load(self) -> None:
        order = self._order
        if (versions := _versions(order.runtime.backend)) != order.environment:
            raise BackendError(
                f"{platform.node()} has other packages ({versions}) than the first node ({order.environment}): install "
                "the same versions on all nodes"
            )
        self._stream = CaptionStream.open(order)

    def __call__(self, blocks: Any) -> Iterator[Any]:
        """Yield tables with the messages for a table of image blocks."""
        import pyarrow as pa
        import ray

        for block in blocks[COLUMN].to_pylist():
            begun = ray.get(self._attempts.begin.remote(hashlib.sha256(block.encode()).hexdigest()))
            for answer in self._answers(block) if begun <= MOST_ATTEMPTS else [too_many_attempts(block)]:
                yield pa.table({COLUMN: [answer]})

    def _answers(self, block: str) -> Iterator[str]:
        if self._error is not None:
            yield pack_error(self._error, self._where)
            return
        images = unpack_images(block)
        ready: list[Caption] = []
        failures: dict[str, str] = {}
        notes: list[str] = []
        try:
            for item in self._stream.caption(images):
                if isinstance(item, Caption):
                    ready.append(item)
                elif isinstance(item, Unreadable):
                    failures[item.id] = item.error.reason + self._where
                else:
                    notes.append(item)
                if len(ready) == -(-len(images) // MESSAGES_PER_BLOCK):
                    yield pack_captions(ready)
                    ready = []
        except EngineError as error:
            yield pack_error(error, self._where)
            return
        yield pack_captions(ready)
        if failures:
            yield pack_failures(failures)
        if image_notes := self._stream.take_notes():  # some may be of another block, which is in progress
            yield pack_image_notes(image_notes)
        yield from map(pack_note, notes)


Log = Callable[[str], None]

MOST_IN_BLOCK = 512
"""Maximum number of images in a block, which are repeated if a worker is killed."""
BLOCKS_PER_ACTOR = 4
"""Minimum number of blocks per worker, so that fast workers can take over blocks from slow ones."""
BLOCKS_IN_FLIGHT = 2
"""Blocks that a worker has at a time: when one ends, images of the other fill its slots."""
MAX_LOADING_DEATHS = 10
"""Number of workers that may die in a row while they load."""


def block_size(images: int, actors: int) -> int:
    """Return the number of images per block."""
    return max(1, min(MOST_IN_BLOCK, -(-images // (actors * BLOCKS_PER_ACTOR))))


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
def open_cluster(
    place: BundleRef, requested: DecodeOptions, rows: int | None, runtime: Runtime, workers: Workers, log: Log
) -> Iterator[ClusterSource]:
    """Connect to a cluster, resolve the backend on one of its nodes, and log how many workers there will be."""
    bundle = place.open()  # first, so that a damaged bundle or a wrong option is reported before a cluster starts
    search_for(bundle, tokenizer := CaptionTokenizer(bundle), requested)
    with cluster(workers.address or LOCAL) as ray:
        gpus = 0 if runtime.backend in CPU_BACKENDS else int(ray.cluster_resources().get("GPU", 0))
        node = _ask_a_node(ray, runtime.backend, min(gpus, 1))
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if node.backend in CPU_BACKENDS else gpus
        team = plan_actors(resources, gpus, actors=workers.actors, threads=runtime.threads)
        log(f"backend: {node.backend}, {team}")
        order = WorkOrder(
            bundle=place.absolute(),
            digest=bundle.digest,
            environment=node.environment,
            runtime=replace(
                runtime, backend=node.backend, threads=team.cpus, plans=runtime.plans and runtime.plans.absolute()
            ),
            peers=team.peers,
            num_nodes=len(resources),
            rows=rows,
        )
        yield ClusterSource(ray, bundle, tokenizer, order, team)


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
                f"the Ray cluster has room for {sum(fitting)} workers with a GPU and {cpus} CPUs: lower --ray-actors "
                "or --threads"
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
            f"the Ray cluster has room for {room} workers with {cpus} CPUs: lower --ray-actors or --threads"
        )
    return WorkerPlan(actors or room, cpus, 0, min(actors or room, max(cores) // cpus))


class ClusterSource:
    """Captions made by the workers of a cluster, which start when `captions` is called; see Source."""

    def __init__(
        self, ray: Any, bundle: Bundle, tokenizer: CaptionTokenizer, order: WorkOrder, team: WorkerPlan
    ) -> None:
        self.bundle = bundle
        self._tokenizer = tokenizer
        self.backend_name = order.runtime.backend
        self.environment = order.environment.rpartition("|engine:")[0]
        self.notes: list[ImageNote] = []
        self._ray, self._order, self._team = ray, order, team

    def resolve(self, requested: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        options = requested.over(self.bundle.generation)
        searches_for(self.bundle, self._tokenizer, options, prompts)
        return options

    def captions(self, options: DecodeOptions, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """See Source. Ray replaces a worker that dies and repeats its block. Images that are missing at the end are
        sent again.
        """
        self._order = replace(self._order, options=options, prompts=pending.prompts)
        while missing := list(pending.remaining()):
            paths = {image.id: str(image.source) for image in missing}
            for answer in map(unpack_answer, self._answers(missing)):
                for name, reason in answer.failures.items():
                    pending.fail(ImageError(paths[name], reason))
                self.notes += answer.image_notes
                if answer.note:
                    log(answer.note)
                yield from (caption for caption in answer.captions if not pending.has(caption.id))
            if len(list(pending.remaining())) == len(missing):
                raise EngineError("the workers returned no captions: run the same command again, or without --ray")

    def _answers(self, images: list[ImageFile]) -> Iterator[str]:
        """Yield the workers' messages for blocks of images, as they arrive."""
        import pyarrow as pa

        ray, team = self._ray, self._team
        size = block_size(len(images), team.actors)
        blocks = [images[start : start + size] for start in range(0, len(images), size)]
        configure_ray_data(ray.data.DataContext.get_current())
        answers = ray.data.from_arrow([pa.table({COLUMN: [pack_images(block)]}) for block in blocks]).map_batches(
            CaptionWorker,
            fn_constructor_args=(self._order, start_restarting_actor(ray, AttemptCounter)),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(team.actors, len(blocks)),
                max_tasks_in_flight_per_actor=BLOCKS_IN_FLIGHT,
                max_concurrent_calls_per_actor=BLOCKS_IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
            num_cpus=team.cpus,
            num_gpus=team.gpus,
        )
        try:
            for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                yield from table[COLUMN].to_pylist()
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, ray.exceptions.RayError):
                raise  # a bug, with its traceback
            raise _cluster_failed(error) from error
        except ray.exceptions.RayError as error:
            raise _cluster_failed(error) from error


def start_restarting_actor(ray: Any, kind: type) -> Any:
    """Start an actor that Ray restarts, without its state, if its process or node dies."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind).remote()


def _cluster_failed(error: Exception) -> EngineError:
    return EngineError(
        f"the Ray cluster failed ({_first_line(error)}): run the same command again, which resumes from here"
    )


def configure_ray_data(context: Any) -> None:
    """Make Ray Data pass on every message at once, without progress bars, and tolerate workers that die on loading."""
    context.target_max_block_size = 1  # in bytes: larger blocks would collect messages before passing them on
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MAX_LOADING_DEATHS


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
