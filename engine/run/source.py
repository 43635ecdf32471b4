"""Where captions come from: this process, others beside it, or a cluster; the rest of a run is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

from engine.backends import require_backend
from engine.bundle.ensemble import BundlePlace
from engine.bundle.manifest import Bundle
from engine.bundle.signature import environment
from engine.captioner import Captioner, Todo, caption_within_memory
from engine.captions import Caption
from engine.cluster.driver import open_cluster
from engine.cluster.session import require_ray
from engine.inputs.notes import ImageNote
from engine.options import DecodeOptions
from engine.processes.driver import open_processes
from engine.processes.shares import shares_of
from engine.runtime import Runtime, Workers

Say = Callable[[str], None]


class Source(Protocol):
    """Captions made with `bundle` on `backend_name`; `environment` says with which packages.

    `notes` grows by the images that were read without something (engine/inputs/notes.py).
    """

    bundle: Bundle
    backend_name: str
    environment: str
    notes: list[ImageNote]

    def resolve(self, asked: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        """Return what is asked laid over the bundle's settings. Raises UsageError where it, or one of the images'
        prompts, does not fit the bundle.
        """
        ...

    def captions(self, options: DecodeOptions, todo: Todo, say: Say) -> Iterator[Caption]:
        """Yield a caption of every image that remains, each once and in any order; unreadable ones fail in `todo`."""
        ...


def choose_runtime(runtime: Runtime, workers: Workers, say: Say) -> Runtime:
    """Return the runtime with what `auto` means here, which `say` gets a note of; that of a cluster as it is.

    Raises an EngineError, in one sentence and at once, when something that is needed is missing here.
    """
    if workers.address is not None:
        require_ray()
        return runtime
    wanted = "cuda" if workers.devices is not None and runtime.backend == "auto" else runtime.backend
    chosen = replace(runtime, backend=require_backend(wanted, runtime.cpu_precision))
    shares_of(chosen, workers)
    if runtime.backend == "auto":
        say(f"backend: {chosen.backend}")
    return chosen


def open_source(
    bundle: BundlePlace | None, asked: DecodeOptions, rows: int | None, runtime: Runtime, workers: Workers, say: Say
) -> AbstractContextManager[Source]:
    """Load what captions a run; `say` gets notes of its workers. Raises an EngineError of the kind that fits."""
    if workers.address is not None:
        return open_cluster(bundle, asked, rows, runtime, workers, say)
    if shares := shares_of(runtime, workers):
        return open_processes(bundle, asked, rows, runtime, shares, say)
    return nullcontext(LocalSource(Captioner.open(bundle, runtime), rows))


class LocalSource:
    """A captioner in this process."""

    def __init__(self, captioner: Captioner, rows: int | None = None) -> None:
        self._captioner, self._rows = captioner, rows
        self.bundle = captioner.bundle
        self.backend_name = captioner.backend.name
        self.environment = environment(self.backend_name)
        self.notes: list[ImageNote] = []

    def resolve(self, asked: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        options = asked.over(self.bundle.generation)
        self._captioner.searches(options, prompts)
        return options

    def captions(self, options: DecodeOptions, todo: Todo, say: Say) -> Iterator[Caption]:
        return caption_within_memory(
            self._captioner,
            options,
            todo.remaining,
            prompts=todo.prompts,
            on_error=todo.fail,
            on_note=self.notes.append,
            rows=self._rows,
            say=say,
        )
