"""Worker processes on this machine: what each may use, and how they are started and ended."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from engine.backends.providers import VISIBLE, visible_gpus
from engine.bundle.manifest import Bundle
from engine.bundle.signature import environment
from engine.errors import EngineError, UsageError
from engine.host import available_cores, core_shares
from engine.inputs.images import ImageFile
from engine.runtime import CPU_BACKENDS, Runtime, Workers
from engine.workers.driver import Events, Log, Team, WorkerSource
from engine.workers.messages import WorkOrder, pack_images


@dataclass(frozen=True)
class WorkerResources:
    """What one worker process may use.

    threads      number of CPU threads
    cores        cores that the process is bound to; empty: all of this process
    device       name of its GPU on this machine, such as cuda:1; empty without one
    environment  additional environment variables
    """

    threads: int
    cores: frozenset[int] = frozenset()
    device: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_workers(runtime: Runtime, workers: Workers) -> list[WorkerResources]:
    """Return the resources of each worker process; an empty list if this process makes the captions.

    `runtime` has the backend that `auto` stands for. Raises UsageError if the backend, the cores or the GPUs do not
    allow these workers.
    """
    if workers.devices is not None:
        return _on_gpus(runtime, workers)
    if workers.processes is None:
        return []
    if runtime.backend not in CPU_BACKENDS:
        raise UsageError(
            f"--processes works with the backends cpu and openvino, not with {runtime.backend}: add --backend cpu, or "
            "list GPUs with --devices"
        )
    count, threads = workers.processes, runtime.threads or available_cores()
    if count > threads:
        what = "cores" if runtime.threads is None else "threads"
        raise UsageError(f"{count} processes need at least as many {what}, not {threads}: lower --processes")
    replace(runtime, threads=threads // count)  # raises UsageError if there are more streams than threads per worker
    return [
        WorkerResources(number, cores)
        for number, cores in zip(_divide(threads, count), core_shares(count), strict=True)
    ]


def _on_gpus(runtime: Runtime, workers: Workers) -> list[WorkerResources]:
    """Return the resources of a worker per GPU. It sees no other GPU, so that its first device is the requested one."""
    if runtime.backend in CPU_BACKENDS:
        raise UsageError(
            f"--devices are GPUs, which the backend {runtime.backend} does not use: remove one of the two options"
        )
    if runtime.backend == "torch" and runtime.device != "cuda":
        raise UsageError(f"--devices are NVIDIA GPUs, but --device is {runtime.device}: remove one of the two options")
    gpus = visible_gpus()
    missing = [number for number in workers.gpus if number >= len(gpus)]
    if missing:
        available = ", ".join(f"cuda:{number}" for number in range(len(gpus)))
        raise UsageError(f"there is no cuda:{missing[0]}, only {available}: check nvidia-smi and {VISIBLE}")
    threads = _divide(runtime.threads or available_cores(), len(workers.gpus))
    return [
        WorkerResources(max(1, number), device=f"cuda:{gpu}", environment={VISIBLE: gpus[gpu]})
        for gpu, number in zip(workers.gpus, threads, strict=True)
    ]


def _divide(threads: int, count: int) -> list[int]:
    return [threads // count + (i < threads % count) for i in range(count)]


@contextmanager
def open_processes(
    bundle: Bundle, order: WorkOrder, team: Sequence[WorkerResources], log: Log
) -> Iterator[WorkerSource]:
    """Log how many worker processes there will be; all have ended when the context is left."""
    log(describe(team))
    order = replace(
        order,
        bundle=order.bundle.local(bundle),
        environment=environment(order.runtime.backend),
        peers=len(team),
    )

    def start(number: int, order: WorkOrder, events: Events) -> Child:
        return Child(number, team[number], order, events)

    source = WorkerSource(bundle, order, Team(len(team), start, "worker process", "lower --processes or --rows"))
    try:
        yield source
    finally:
        source.end()


def describe(team: Sequence[WorkerResources]) -> str:
    """Describe the workers, such as `2 worker processes on cuda:0, cuda:1`."""
    who = f"{len(team)} worker processes" if len(team) > 1 else "a worker process"
    if all(resources.device for resources in team):
        return f"{who} on {', '.join(resources.device for resources in team)}"
    return f"{who} with {sum(resources.threads for resources in team)} threads in all"


PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from engine.workers.worker import main; main()"
"""Program of a worker process; its arguments are this process's sys.path, so that it imports the same packages."""


class Child:
    """A worker process, which is started at once, see Worker."""

    def __init__(self, number: int, resources: WorkerResources, order: WorkOrder, events: Events) -> None:
        """Raises EngineError if no process can be started."""
        self.number = number
        self.wants = 0
        try:
            with _interrupts_blocked():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | dict(resources.environment),
                )
        except OSError as error:
            raise EngineError(f"no worker process can be started ({error.strerror}): lower --processes") from error
        if resources.cores:
            with suppress(OSError):  # the process has ended already, which its events will report
                os.sched_setaffinity(self._process.pid, resources.cores)
        self._reader = threading.Thread(target=self._listen, args=(events,), name="worker process", daemon=True)
        self._reader.start()
        self._send(pickle.dumps(replace(order, runtime=replace(order.runtime, threads=resources.threads))))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def name(self) -> str:
        return f"worker process {self.pid}"

    def submit(self, images: Sequence[ImageFile]) -> None:
        self._send(f"{pack_images(images)}\n".encode("ascii"))

    def end(self, patience_s: float = 0) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self._process.kill()
        code = self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with suppress(OSError):  # closing flushes what the process has not read
            self._process.stdin.close()
        return f"exit code {code}" if code >= 0 else _signal_name(-code)

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(message)
            self._process.stdin.flush()

    def _listen(self, events: Events) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                if line.endswith(b"\n"):  # otherwise the process was killed while it wrote
                    events.put((self, line.decode("ascii")))
        events.put((self, ""))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for processes that are started in this context: the parent ends them.

    A terminal sends Ctrl-C to all processes of a group. A blocked signal stays blocked in a new program, from its first
    instruction on.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
