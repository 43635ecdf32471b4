"""A worker: captions the images that it receives, and answers with messages."""

from __future__ import annotations

import os
import pickle
import platform
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from engine.backends.device import slots_for
from engine.bundle.manifest import BundleWatch
from engine.bundle.signature import environment
from engine.captioner import Captioner, caption_within_memory
from engine.captions import Caption
from engine.errors import BackendError, BundleError, EngineError, ImageError
from engine.host import available_memory
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote
from engine.version import __version__
from engine.workers.messages import (
    WorkOrder,
    pack_captions,
    pack_error,
    pack_failures,
    pack_image_notes,
    pack_note,
    pack_ready,
    unpack_images,
)

TURNS_AHEAD = 4
"""Images per slot that a worker holds, so that no slot runs empty: captions are returned in order, and a long one
delays others that are ready.
"""


@dataclass(frozen=True)
class Unreadable:
    """The image `id` cannot be read."""

    id: str
    reason: str


Result = Caption | Unreadable | ImageNote | str | BaseException
"""A caption, an image that cannot be read, what was dropped from an image, a note for the user, or an error."""


class CaptionWorker:
    """Captions what is submitted, in its order. A worker process has one, and a Ray actor is one.

    `answers` and `submit` run in two threads of the process. A third one captions, so that it never waits for a message
    to be sent, and results that are ready at the same time share a message.
    """

    def __init__(self, order: WorkOrder) -> None:
        self._order = order
        self._where = f" (on the node {platform.node()})" if order.num_nodes > 1 else ""
        self._inbox: SimpleQueue[ImageFile] = SimpleQueue()
        self._outbox: SimpleQueue[Result] = SimpleQueue()
        self._open: dict[str, ImageFile] = {}
        """Images that are submitted and not answered yet, by id."""

    def submit(self, images: str) -> None:
        """Submit the images of a message; no two images in progress may have the same id."""
        for image in unpack_images(images):
            self._inbox.put(image)

    def answers(self) -> Iterator[str]:
        """Load the bundle, then yield messages: first how many images to submit at a time, then results.

        The last message is an error; without one there is no last message.
        """
        try:
            captioner, rows = self._load()
            concurrency = captioner.scheduler(self._order.decoding.search, rows).concurrency
            yield pack_ready(captioner.images_ahead + TURNS_AHEAD * concurrency)
            threading.Thread(target=self._caption, args=(captioner, rows), name="captions", daemon=True).start()
            while True:
                yield from self._messages(self._ready_results())
        except EngineError as error:
            yield pack_error(error, self._where)
        except Exception as error:
            yield pack_note(traceback.format_exc().rstrip())
            what = f"a worker process failed: {type(error).__name__}: {error}"
            yield pack_error(EngineError(what), self._where)

    def _load(self) -> tuple[Captioner, int]:
        """Load the order's bundle; return its captioner and the number of beams in flight.

        Raises BundleError or BackendError if bundle or packages are not those of the run.
        """
        order = self._order
        # another machine may have other packages, and other packages may give other captions
        here, wanted = (environment(order.runtime.backend), __version__), (order.environment, order.engine_version)
        if here != wanted:
            raise BackendError(
                f"{platform.node()} has other package versions ({'|engine:'.join(here)}) than the driver "
                f"({'|engine:'.join(wanted)}): install the same versions on all nodes"
            )
        bundle = order.bundle.open()
        if bundle.digest != order.digest:
            raise BundleError(f"{order.bundle} differs from the bundle of the run: copy it again")
        self._watch = BundleWatch(bundle)  # the driver watches its own copy only
        captioner = Captioner.of(bundle, order.runtime, many_images=True)
        search, memory = order.decoding.search, None
        # before the free memory is divided among slots: attention loads weights of its own
        captioner.scheduler(search, 1, attention=order.decoding.attention)
        if captioner.batch_sizes.memory_bytes is None:  # a GPU has its own memory, which no other worker uses
            memory = available_memory() // order.peers
        slots = slots_for(search, bundle.models, captioner.batch_sizes, memory_bytes=memory)
        return captioner, order.rows or slots * search.num_beams

    def _caption(self, captioner: Captioner, rows: int) -> None:
        """Caption what arrives until an error occurs; runs in a thread of its own."""
        put = self._outbox.put
        try:
            while True:
                self._take(self._inbox.get())
                for caption in caption_within_memory(
                    captioner,
                    self._order.decoding,
                    self._arrivals,
                    on_error=self._fail,
                    on_note=put,
                    rows=rows,
                    log=put,
                ):
                    self._watch.check()
                    del self._open[caption.id]
                    put(caption)
        except BaseException as error:
            put(error)
        finally:
            self._watch.close()

    def _arrivals(self) -> Iterator[ImageFile]:
        """Yield the images in progress, as after too little memory, then those that arrive until none is waiting."""
        yield from list(self._open.values())
        while True:
            try:
                yield self._take(self._inbox.get_nowait())
            except Empty:
                return

    def _take(self, image: ImageFile) -> ImageFile:
        self._open[image.id] = image
        return image

    def _fail(self, error: ImageError) -> None:
        name = next(name for name, image in self._open.items() if str(image.source) == error.path)
        del self._open[name]
        self._outbox.put(Unreadable(name, error.reason + self._where))

    def _ready_results(self) -> list[Result]:
        """Wait for a result and return all there are: a message costs both sides more than its content."""
        results = [self._outbox.get()]
        with suppress(Empty):
            while True:
                results.append(self._outbox.get_nowait())
        return results

    def _messages(self, results: list[Result]) -> Iterator[str]:
        """Yield the messages for all results, then raise the first error among them."""
        # notes come before the captions, because the driver stops reading after the last caption
        if notes := [result for result in results if isinstance(result, ImageNote)]:
            yield pack_image_notes(notes)
        yield from (pack_note(result) for result in results if isinstance(result, str))
        if failures := {result.id: result.reason for result in results if isinstance(result, Unreadable)}:
            yield pack_failures(failures)
        if captions := [result for result in results if isinstance(result, Caption)]:
            yield pack_captions(captions)
        for result in results:
            if isinstance(result, BaseException):
                raise result


def main() -> None:
    """Run a worker process: read an order and images from stdin, write messages to stdout until stdin is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the messages

    def send(worker: CaptionWorker) -> None:
        with suppress(BrokenPipeError):  # the parent has ended: the main thread sees its closed stdin and exits
            for message in worker.answers():
                answers.write(f"{message}\n".encode("ascii"))
                answers.flush()

    with suppress(EOFError):
        worker = CaptionWorker(pickle.load(sys.stdin.buffer))
        threading.Thread(target=send, args=(worker,), daemon=True).start()
        for line in sys.stdin.buffer:
            worker.submit(line.decode("ascii"))
    os._exit(0)
