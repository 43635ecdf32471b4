"""Captioning on a Ray cluster: the connection, the workers, and the driver that hands out images."""

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
from engine.bundle.open import BundlePlace, absolute, open_place
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


MESSAGES_PER_BLOCK = 8
"""Messages a block is answered in: what a killed worker or driver loses at most, against what a message costs. Always
after the same images: Ray drops from a repeated block as many messages as have arrived before."""


MOST_ATTEMPTS = 10
"""Times a block is begun before the run gives up: where an image kills workers, Ray would replace them for ever."""


class AttemptCounter:
    """An actor that counts how often each block was begun."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, block: str) -> int:
        """Count one more and return how many there are."""
        self._begun[block] += 1
        return self._begun[block]


def too_many_attempts(block: str) -> str:
    """Return the answer to a block that has killed too many workers."""
    images = unpack_images(block)
    return pack_error(
        BackendError(
            f"{MOST_ATTEMPTS} workers died at the images {images[0].source} to {images[-1].source}, or at others "
            "beside them: is memory short? Fewer --rows need less; the same command goes on from here"
        )
    )


@dataclass(frozen=True)
class NodeFacts:
    """What decides captions on a node. `error` says, in one sentence, what is missing there."""

    backend: str = ""
    environment: str = ""
    error: str = ""
    exit_code: int = 1


def inspect_node(backend: str) -> NodeFacts:
    """Return what `backend` means on this node, and its packages."""
    try:
        name = require_backend(backend)
        return NodeFacts(name, _versions(name))
    except EngineError as error:
        return NodeFacts(error=f"{error} (on the node {platform.node()})", exit_code=error.exit_code)


def _versions(backend: str) -> str:
    return f"{environment(backend)}|engine:{__version__}"


class CaptionWorker:
    """Loads the bundle of an order once; then called with a table of blocks of images, it yields tables of answers.

    Two calls at once keep it busy from one block to the next, see CaptionStream.
    """

    def __init__(self, order: WorkOrder, attempts: Any) -> None:
        """What goes wrong here is the answer to every block: an error inside a constructor would not arrive whole.

        `attempts` is the handle of an actor AttemptCounter.
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
        if (found := _versions(order.runtime.backend)) != order.environment:
            raise BackendError(
                f"{platform.node()} has other packages ({found}) than the first node ({order.environment}): install "
                "the same everywhere"
            )
        self._stream = CaptionStream.open(order)

    def __call__(self, blocks: Any) -> Iterator[Any]:
        """Answer a table with blocks of images."""
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
            for said in self._stream.caption(images):
                if isinstance(said, Caption):
                    ready.append(said)
                elif isinstance(said, Unreadable):
                    failures[said.id] = said.error.reason + self._where
                else:
                    notes.append(said)
                if len(ready) == -(-len(images) // MESSAGES_PER_BLOCK):
                    yield pack_captions(ready)
                    ready = []
        except EngineError as error:
            yield pack_error(error, self._where)
            return
        yield pack_captions(ready)
        if failures:
            yield pack_failures(failures)
        if image_notes := self._stream.take_notes():  # another block goes on meanwhile: some may be its own
            yield pack_image_notes(image_notes)
        yield from map(pack_note, notes)


Log = Callable[[str], None]

MOST_IN_BLOCK = 512
"""Images in a block at most: what a killed worker has to do again."""
BLOCKS_PER_ACTOR = 4
"""Blocks a worker gets at least, so that slow ones leave some to fast ones."""
BLOCKS_IN_FLIGHT = 2
"""Blocks a worker has at a time: when one ends, images of the other fill its slots."""
MAX_LOADING_DEATHS = 10
"""Workers that may die one after another while they load."""


def block_size(images: int, actors: int) -> int:
    """Return how many images a block holds."""
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
    place: BundlePlace | None, asked: DecodeOptions, rows: int | None, runtime: Runtime, workers: Workers, log: Log
) -> Iterator[ClusterSource]:
    """Connect to a cluster, and ask a node what the backend is there; `log` gets how many workers there will be."""
    bundle = open_place(place)  # a damaged bundle or a wrong option is found before a cluster starts
    search_for(bundle, tokenizer := CaptionTokenizer(bundle), asked)
    with cluster(workers.address or LOCAL) as ray:
        gpus = 0 if runtime.backend in CPU_BACKENDS else int(ray.cluster_resources().get("GPU", 0))
        node = _ask_a_node(ray, runtime.backend, min(gpus, 1))
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if node.backend in CPU_BACKENDS else gpus
        team = plan_actors(resources, gpus, actors=workers.actors, threads=runtime.threads)
        log(f"backend: {node.backend}, {team}")
        order = WorkOrder(
            bundle=absolute(place),
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
            f"a node cannot run the engine ({_first_line(error)}): install blip-caption-engine, as it is here, on all"
        ) from error
    if node.error:
        raise (UsageError if node.exit_code == UsageError.exit_code else EngineError)(node.error)
    return node


def plan_actors(nodes: list[Mapping[str, float]], gpus: int, *, actors: int | None, threads: int | None) -> WorkerPlan:
    """Return one worker a GPU, where there are `gpus` of them; on CPUs as many as there is room for with `threads` CPUs
    each, by default a node's.

    `nodes` are the resources of each node, by Ray's names. Raises UsageError for more `actors` than there is room for.
    """
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if gpus:
        cpus = threads or 1
        fitting = [min(int(node.get("GPU", 0)), int(node.get("CPU", 0)) // cpus) for node in nodes]
        if sum(fitting) < (actors or 1):
            raise UsageError(
                f"the Ray cluster has room for {sum(fitting)} workers with a GPU and {cpus} CPUs: ask for fewer "
                "--ray-actors or --threads"
            )
        return WorkerPlan(actors or sum(fitting), cpus, 1, min(actors or sum(fitting), max(fitting)))
    if not cores:
        raise EngineError("the Ray cluster has no CPUs: start its nodes with some (ray start --num-cpus)")
    cpus = threads or min(cores)
    if threads is None and actors is not None:
        cpus = max(1, min(cpus, sum(cores) // actors))
    room = sum(count // cpus for count in cores)
    if room < (actors or 1):
        raise UsageError(
            f"the Ray cluster has room for {room} workers with {cpus} CPUs: ask for fewer --ray-actors or --threads"
        )
    return WorkerPlan(actors or room, cpus, 0, min(actors or room, max(cores) // cpus))


class ClusterSource:
    """A team of workers, started when captions are asked for."""

    def __init__(
        self, ray: Any, bundle: Bundle, tokenizer: CaptionTokenizer, order: WorkOrder, team: WorkerPlan
    ) -> None:
        self.bundle = bundle
        self._tokenizer = tokenizer
        self.backend_name = order.runtime.backend
        self.environment = order.environment.rpartition("|engine:")[0]
        self.notes: list[ImageNote] = []
        self._ray, self._order, self._team = ray, order, team

    def resolve(self, asked: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        options = asked.over(self.bundle.generation)
        searches_for(self.bundle, self._tokenizer, options, prompts)
        return options

    def captions(self, options: DecodeOptions, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """See Source. A worker that dies is replaced and its block done again; what is nevertheless missing in the end
        goes out once more.
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
                raise EngineError("the workers answered without captions: run the same command again, or without --ray")

    def _answers(self, images: list[ImageFile]) -> Iterator[str]:
        """Yield what the workers say to blocks of images, as they say it."""
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
                raise  # a fault of ours, with its traceback
            raise _cluster_failed(error) from error
        except ray.exceptions.RayError as error:
            raise _cluster_failed(error) from error


def start_restarting_actor(ray: Any, kind: type) -> Any:
    """Start an actor that is started anew wherever its process or node dies; what it knew is gone then."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind).remote()


def _cluster_failed(error: Exception) -> EngineError:
    return EngineError(
        f"the Ray cluster failed ({_first_line(error)}): run the same command again, it goes on from here"
    )


def configure_ray_data(context: Any) -> None:
    """Let Ray Data hand on every message at once, without progress bars; workers may die while they load."""
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MAX_LOADING_DEATHS


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
