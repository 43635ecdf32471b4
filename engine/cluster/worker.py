"""What runs on the nodes of a cluster: a loaded captioner that answers blocks of images with captions."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.backends import require_backend
from engine.bundle.signature import environment
from engine.captions import Caption
from engine.errors import BackendError, EngineError
from engine.version import __version__
from engine.workers.messages import (
    COLUMN,
    WorkOrder,
    pack_captions,
    pack_error,
    pack_failures,
    pack_image_notes,
    pack_note,
    unpack_images,
)
from engine.workers.stream import CaptionStream, Unreadable

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
