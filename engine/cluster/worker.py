"""What runs on the nodes of a cluster: a loaded captioner that answers blocks of images with captions."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine import __version__
from engine.backends import open_backend, require_backend
from engine.backends.ort import available_cores
from engine.bundle import Bundle
from engine.capacity import available_memory, slots_for
from engine.captioner import Caption, Captioner
from engine.cluster.messages import (
    COLUMN,
    WorkOrder,
    pack_captions,
    pack_error,
    pack_failures,
    pack_note,
    unpack_images,
)
from engine.errors import BackendError, BundleError, EngineError, ImageError
from engine.signature import environment
from engine.source import caption_within_memory

ANSWERS = 8
"""Messages a block is answered in: what a killed worker or driver loses at most, against what a message costs. Always
after the same images: Ray drops from a repeated block as many messages as have arrived before."""


MOST_ATTEMPTS = 10
"""Times a block is begun before the run gives up: where an image kills workers, Ray would replace them for ever."""


class Attempts:
    """An actor that counts how often each block was begun."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, block: str) -> int:
        """Count one more and return how many there are."""
        self._begun[block] += 1
        return self._begun[block]


def _give_up(block: str) -> str:
    images = unpack_images(block)
    return pack_error(
        BackendError(
            f"{MOST_ATTEMPTS} workers died of the images {images[0].source} to {images[-1].source}: is their memory "
            "short? Fewer --rows need less; the same command goes on from here"
        )
    )


@dataclass(frozen=True)
class Node:
    """What decides captions on a node. `error` says, in one sentence, what is missing there."""

    backend: str = ""
    environment: str = ""
    error: str = ""
    exit_code: int = 1


def look_around(backend: str) -> Node:
    """Return what `backend` means on this node, and its packages."""
    try:
        return Node(require_backend(backend), _versions())
    except EngineError as error:
        return Node(error=f"{error} (on the node {platform.node()})", exit_code=error.exit_code)


def _versions() -> str:
    return f"{environment()}|engine:{__version__}"


class CaptionWorker:
    """Loads the bundle of an order once; then called with a table of blocks of images, it yields tables of answers."""

    def __init__(self, order: WorkOrder, attempts: Any) -> None:
        """What goes wrong here is the answer to every block: an error inside a constructor would not arrive whole.

        `attempts` is the handle of an actor Attempts.
        """
        self._order = order
        self._attempts = attempts
        try:
            self._load()
        except EngineError as error:
            self._error: EngineError | None = error
        else:
            self._error = None

    def _load(self) -> None:
        order = self._order
        if (found := _versions()) != order.environment:
            raise BackendError(
                f"the node {platform.node()} has other packages ({found}) than the first one ({order.environment}): "
                "install the same everywhere"
            )
        bundle = Bundle.load(order.bundle)
        if bundle.digest != order.digest:
            raise BundleError(f"{order.bundle} on the node {platform.node()} is another bundle than here: copy it anew")
        backend = open_backend(
            bundle, order.backend, threads=order.threads, plans=order.plans, cuda_graphs=order.cuda_graphs
        )
        self._captioner = Captioner(bundle, backend)
        self._options = bundle.options(**order.options)
        self._rows = order.rows or self._fair_rows()

    def _fair_rows(self) -> int:
        """Return how many beams suit device and memory, when the workers of this node share the latter."""
        search = self._captioner.search(self._options)
        peers = min(self._order.peers, max(1, available_cores() // (self._order.threads or 1)))
        memory = available_memory() // peers
        slots = slots_for(search, self._captioner.bundle.model, self._captioner.backend.appetite, memory_bytes=memory)
        return slots * search.num_beams

    def __call__(self, blocks: Any) -> Iterator[Any]:
        """Answer a table with blocks of images."""
        import pyarrow as pa
        import ray

        for block in blocks[COLUMN].to_pylist():
            begun = ray.get(self._attempts.begin.remote(hashlib.sha256(block.encode()).hexdigest()))
            for answer in self._answers(block) if begun <= MOST_ATTEMPTS else [_give_up(block)]:
                yield pa.table({COLUMN: [answer]})

    def _answers(self, block: str) -> Iterator[str]:
        if self._error is not None:
            yield pack_error(self._error)
            return
        images = unpack_images(block)
        done: set[str] = set()
        ready: list[Caption] = []
        failures: list[ImageError] = []
        notes: list[str] = []
        captions = caption_within_memory(
            self._captioner,
            self._options,
            lambda: [image for image in images if image.id not in done],
            failures,
            rows=self._rows,
            say=notes.append,
        )
        try:
            for caption in captions:
                done.add(caption.id)
                ready.append(caption)
                if len(ready) >= -(-len(images) // ANSWERS):
                    yield pack_captions(ready)
                    ready = []
        except EngineError as error:
            yield pack_captions(ready)
            yield pack_error(error)
            return
        yield pack_captions(ready)
        if failures:
            ids = {str(image.source): image.id for image in images}
            yield pack_failures({ids[error.path]: error.reason for error in failures})
        yield from map(pack_note, notes)
