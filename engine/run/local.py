"""Where captions come from: this process, or the workers of a cluster; the rest of a run is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from engine.backends import check_choice, require_backend
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.captions import Caption
from engine.errors import ImageError, OutOfMemoryError, UsageError
from engine.inputs.images import ImageFile
from engine.options import DecodeOptions
from engine.run.record import RunRecord
from engine.run.signature import environment

if TYPE_CHECKING:
    from engine.run.pipeline import Job

Say = Callable[[str], None]


class Source(Protocol):
    """Captions for the images of a record, made with `bundle` on `backend_name`.

    `environment` tells the packages that decide them apart, see engine.run.signature.
    """

    bundle: Bundle
    backend_name: str
    environment: str

    def check(self, options: DecodeOptions) -> None:
        """Raise UsageError where options do not fit the bundle."""
        ...

    def captions(self, options: DecodeOptions, record: RunRecord, say: Say) -> Iterator[Caption]:
        """Yield a caption of every image that has none yet, each once and in any order; unreadable ones fail in
        `record`.
        """
        ...


def require_source(job: Job) -> None:
    """Raise an EngineError, in one sentence and at once, when something that a job needs is missing here."""
    if job.ray is None:
        if job.ray_actors is not None:
            raise UsageError("--ray-actors is how many workers --ray has: give both, or neither")
        check_choice(job.backend, job.plans, job.cuda_graphs)
        require_backend(job.backend)
        return
    check_choice(job.backend, job.plans, job.cuda_graphs)
    from engine.cluster.session import require_ray

    require_ray()


def open_source(job: Job, say: Say) -> AbstractContextManager[Source]:
    """Load what captions a job; `say` gets a note of what `auto` chose. Raises an EngineError of the kind that fits."""
    if job.ray is not None:
        from engine.cluster.driver import open_cluster

        return open_cluster(job, job.ray, say)
    source = LocalSource(job)
    if job.backend == "auto":
        say(f"backend: {source.backend_name}")
    return nullcontext(source)


class LocalSource:
    """A bundle loaded into this process."""

    def __init__(self, job: Job) -> None:
        """Raises what Captioner.load does."""
        self._captioner = Captioner.load(
            job.bundle, backend=job.backend, threads=job.threads, plans=job.plans, cuda_graphs=job.cuda_graphs
        )
        self._rows = job.rows
        self.bundle = self._captioner.bundle
        self.backend_name = self._captioner.backend.name
        self.environment = environment()

    def check(self, options: DecodeOptions) -> None:
        self._captioner.search(options)

    def captions(self, options: DecodeOptions, record: RunRecord, say: Say) -> Iterator[Caption]:
        def shrink(note: str) -> None:
            record.failures.clear()  # these images will be tried again
            say(note)

        return caption_within_memory(
            self._captioner, options, record.remaining, on_error=record.fail, rows=self._rows, say=shrink
        )


def caption_within_memory(
    captioner: Captioner,
    options: DecodeOptions,
    remaining: Callable[[], Iterable[ImageFile]],
    *,
    on_error: Callable[[ImageError], None],
    rows: int | None,
    say: Say,
) -> Iterator[Caption]:
    """Caption what remains; where memory does not suffice, go on with half as many images side by side.

    `remaining` is asked again then, and must leave out what has been yielded; `say` gets a note of it before.
    Unreadable images go to `on_error`.
    """
    num_slots = captioner.scheduler(captioner.search(options), rows).num_slots
    while True:
        try:
            yield from captioner.caption(remaining(), options, rows=num_slots * options.num_beams, on_error=on_error)
            return
        except (OutOfMemoryError, MemoryError) as error:
            if num_slots == 1:
                raise OutOfMemoryError(
                    f"memory is too short for a single image ({error}): close other programs"
                ) from error
            say(f"memory is short with {num_slots} images side by side: going on with {num_slots // 2}")
            num_slots //= 2
