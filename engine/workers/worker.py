"""A worker: captions the images that it receives and sends captions, errors and notes."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import BinaryIO

from engine.backends import open_backends
from engine.backends.device import slots_for
from engine.bundle.manifest import BundleWatch
from engine.captioner import Captioner, caption_within_memory
from engine.captions import Caption
from engine.decoding.beam import Search
from engine.errors import BundleError, EngineError, ImageError
from engine.host import available_memory
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote
from engine.options import DecodeOptions
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
"""Images per slot that callers submit at a time, so that no slot runs empty: captions are returned in order, and a long
one delays others that are ready.
"""


@dataclass(frozen=True)
class Unreadable:
    """The image `id` cannot be read."""

    id: str
    error: ImageError


StreamItem = Caption | Unreadable | str | BaseException
"""A result: a caption, an image that cannot be read, a note for the user, or an error."""
Outbox = SimpleQueue[StreamItem]


class CaptionStream:
    """A thread that captions submitted images in their order, with `rows` beams in flight."""

    def __init__(
        self,
        captioner: Captioner,
        options: DecodeOptions,
        *,
        rows: int,
        prompts: Mapping[str, str] | None = None,
        check_bundle: Callable[[], None] | None = None,
    ) -> None:
        """`check_bundle` raises an EngineError if the bundle was overwritten; after that no caption is returned."""
        self._check_bundle = check_bundle or (lambda: None)
        self._captioner, self._options, self._rows, self._prompts = captioner, options, rows, prompts
        search, _ = captioner.searches(options, prompts)
        concurrency = captioner.scheduler(search, rows).concurrency
        self.wants = captioner.images_ahead + TURNS_AHEAD * concurrency
        """Number of images that callers should submit at a time; with many fewer, slots run empty."""
        self._inbox: SimpleQueue[tuple[ImageFile, Outbox]] = SimpleQueue()
        self._notes: list[ImageNote] = []
        self._open: dict[str, tuple[ImageFile, Outbox]] = {}
        threading.Thread(target=self._serve, name="captions", daemon=True).start()

    @classmethod
    def open(cls, order: WorkOrder) -> CaptionStream:
        """Load the bundle of an order, with as many images in parallel as suit the device and the worker's part of the
        node's memory.

        Raises BundleError if the bundle is not that of the order, and the errors of open_bundle and open_backends.
        """
        bundle = order.bundle.open()
        if bundle.digest != order.digest:
            raise BundleError(f"{order.bundle} differs from the bundle of the run: copy it again")
        watch = BundleWatch(bundle)  # another machine, or another copy, which the driver does not watch
        captioner = Captioner(bundle, *open_backends(bundle, order.runtime), threads=order.runtime.threads)
        search, _ = captioner.searches(order.options, order.prompts)
        rows = order.rows or _fair_slots(captioner, search, order.peers) * search.num_beams
        return cls(captioner, order.options, rows=rows, prompts=order.prompts, check_bundle=watch.check)

    def submit(self, images: Sequence[ImageFile], outbox: Outbox) -> None:
        """Submit images; `outbox` gets a Caption or Unreadable for each, captions in order of the images, and notes.

        An error in `outbox` is the last result of these images. No two images in progress may have the same id.
        """
        for image in images:
            self._inbox.put((image, outbox))

    def caption(self, images: Sequence[ImageFile]) -> Iterator[Caption | Unreadable | str]:
        """Yield a Caption or Unreadable for each image, captions in the order of the images, and notes.

        No two images in progress may have the same id. Raises the captioner's EngineError, after which other images may
        still be submitted.
        """
        outbox: Outbox = SimpleQueue()
        self.submit(images, outbox)
        missing = len(images)
        while missing:
            item = outbox.get()
            if isinstance(item, BaseException):
                raise item
            missing -= not isinstance(item, str)
            yield item

    def take_notes(self) -> list[ImageNote]:
        """Return and clear the notes on images of which something was dropped."""
        notes = []
        with suppress(IndexError):
            while True:  # one by one, because the other thread adds some meanwhile
                notes.append(self._notes.pop())
        return notes

    def _serve(self) -> None:
        while True:
            self._take(self._inbox.get())
            try:
                for caption in caption_within_memory(
                    self._captioner,
                    self._options,
                    self._arrivals,
                    prompts=self._prompts,
                    on_error=self._fail,
                    on_note=self._notes.append,
                    rows=self._rows,
                    log=self._broadcast,
                ):
                    self._check_bundle()
                    self._open.pop(caption.id)[1].put(caption)
            except BaseException as error:  # raised by the callers
                self._broadcast(error)
                self._open.clear()

    def _arrivals(self) -> Iterator[ImageFile]:
        """Yield the images in progress, as after too little memory, then those that arrive until none is waiting."""
        yield from [image for image, _ in self._open.values()]
        while True:
            try:
                yield self._take(self._inbox.get_nowait())
            except Empty:
                return

    def _take(self, submitted: tuple[ImageFile, Outbox]) -> ImageFile:
        image, _ = submitted
        self._open[image.id] = submitted
        return image

    def _fail(self, error: ImageError) -> None:
        name = next(name for name, (image, _) in self._open.items() if str(image.source) == error.path)
        self._open.pop(name)[1].put(Unreadable(name, error))

    def _broadcast(self, item: StreamItem) -> None:
        """Put a note or an error into the outbox of each caller that waits for images, once."""
        for outbox in {id(outbox): outbox for _, outbox in self._open.values()}.values():
            outbox.put(item)


def _fair_slots(captioner: Captioner, search: Search, peers: int) -> int:
    """Return how many images in parallel suit the device, and the memory divided among `peers` workers."""
    batch_sizes, memory = captioner.batch_sizes, None
    if batch_sizes.memory_bytes is None:  # a GPU has its own memory, which no other worker uses
        memory = available_memory() // peers
    return slots_for(search, captioner.bundle.models, batch_sizes, memory_bytes=memory)


def main() -> None:
    """Run a worker process: read an order and images from stdin, write messages to stdout until stdin is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the messages
    opened: SimpleQueue[CaptionStream] = SimpleQueue()
    outbox: Outbox = SimpleQueue()
    with suppress(EOFError):
        order = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_work, args=(order, opened, outbox, answers), daemon=True).start()
        stream = None
        for line in sys.stdin.buffer:  # the driver sends images only after the message that the stream is open
            stream = stream or opened.get()
            stream.submit(unpack_images(line.decode("ascii")), outbox)
    os._exit(0)


def _work(order: WorkOrder, opened: SimpleQueue[CaptionStream], outbox: Outbox, answers: BinaryIO) -> None:
    """Load the bundle of an order and send the results of its stream, until an error occurs."""

    def send(message: str) -> None:
        with suppress(BrokenPipeError):  # the parent has ended: the main thread sees its closed stdin and exits
            answers.write(f"{message}\n".encode("ascii"))
            answers.flush()

    try:
        stream = CaptionStream.open(order)
        opened.put(stream)
        send(pack_ready(stream.wants))
        while True:
            for message in _messages(_next_items(outbox), stream):
                send(message)
    except EngineError as error:
        send(pack_error(error))
    except BaseException as error:  # a bug: the traceback is printed here, and the error ends the run
        traceback.print_exc()
        send(pack_error(EngineError(f"a worker process failed: {type(error).__name__}: {error}")))


def _next_items(outbox: Outbox) -> list[StreamItem]:
    """Wait for a result and return all there are: a message costs both sides more than its content."""
    items = [outbox.get()]
    with suppress(Empty):
        while True:
            items.append(outbox.get_nowait())
    return items


def _messages(items: list[StreamItem], stream: CaptionStream) -> Iterator[str]:
    """Yield the messages for all results, then raise the first error among them."""
    if notes := stream.take_notes():  # before the captions, because the driver stops reading after the last caption
        yield pack_image_notes(notes)
    yield from (pack_note(item) for item in items if isinstance(item, str))
    if failures := {item.id: item.error.reason for item in items if isinstance(item, Unreadable)}:
        yield pack_failures(failures)
    if captions := [item for item in items if isinstance(item, Caption)]:
        yield pack_captions(captions)
    for item in items:
        if isinstance(item, BaseException):
            raise item
