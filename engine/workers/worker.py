"""A worker: captions the images it is sent and returns captions, errors and notes."""

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
from engine.bundle.open import open_place
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
"""Images that are asked for at a time to keep each slot busy: captions come in order, and a long one holds up others
that are ready."""


@dataclass(frozen=True)
class Unreadable:
    """The image `id` cannot be read."""

    id: str
    error: ImageError


StreamItem = Caption | Unreadable | str | BaseException
"""What comes back: a caption, an image that cannot be read, a note for the user, or what went wrong."""
Outbox = SimpleQueue[StreamItem]


class CaptionStream:
    """A thread that captions whatever is asked of it, in that order; `rows` beams side by side."""

    def __init__(
        self,
        captioner: Captioner,
        options: DecodeOptions,
        *,
        rows: int,
        prompts: Mapping[str, str] | None = None,
        check_bundle: Callable[[], None] | None = None,
    ) -> None:
        """`check_bundle` raises an EngineError once the bundle was overwritten; no caption is handed out after that."""
        self._check_bundle = check_bundle or (lambda: None)
        self._captioner, self._options, self._rows, self._prompts = captioner, options, rows, prompts
        search, _ = captioner.searches(options, prompts)
        concurrency = captioner.scheduler(search, rows).concurrency
        self.wants = captioner.images_ahead + TURNS_AHEAD * concurrency
        """Images that callers may ask for at a time; with many fewer slots run empty."""
        self._inbox: SimpleQueue[tuple[ImageFile, Outbox]] = SimpleQueue()
        self._notes: list[ImageNote] = []
        self._open: dict[str, tuple[ImageFile, Outbox]] = {}
        threading.Thread(target=self._serve, name="captions", daemon=True).start()

    @classmethod
    def open(cls, order: WorkOrder) -> CaptionStream:
        """Load the bundle of an order, with as many images side by side as suit the device, and the memory that
        workers of a node share.

        Raises BundleError where the bundle is not the order's, and as open_bundle and open_backends do.
        """
        bundle = open_place(order.bundle)
        if bundle.digest != order.digest:
            raise BundleError(f"{order.bundle} is another bundle than here: copy it again")
        watch = BundleWatch(bundle)  # on another machine, or a copy of its own: the run's own watch does not see it
        captioner = Captioner(bundle, *open_backends(bundle, order.runtime), threads=order.runtime.threads)
        search, _ = captioner.searches(order.options, order.prompts)
        rows = order.rows or _fair_slots(captioner, search, order.peers) * search.num_beams
        return cls(captioner, order.options, rows=rows, prompts=order.prompts, check_bundle=watch.check)

    def ask(self, images: Sequence[ImageFile], outbox: Outbox) -> None:
        """Ask for captions; `outbox` gets a Caption or Unreadable of each image, captions in the order of the images,
        notes, and at most one error, after which nothing of these images comes any more.

        No two images that are asked for at one time may have the same id.
        """
        for image in images:
            self._inbox.put((image, outbox))

    def caption(self, images: Sequence[ImageFile]) -> Iterator[Caption | Unreadable | str]:
        """Yield a Caption or Unreadable of each image, captions in the order of the images, and notes.

        No two images that are asked for at one time may have the same id. Raises the EngineError that the captioner
        met, after which other images may still be asked for.
        """
        outbox: Outbox = SimpleQueue()
        self.ask(images, outbox)
        missing = len(images)
        while missing:
            said = outbox.get()
            if isinstance(said, BaseException):
                raise said
            missing -= not isinstance(said, str)
            yield said

    def take_notes(self) -> list[ImageNote]:
        """Return the images met since the last call that were read without something."""
        notes = []
        with suppress(IndexError):
            while True:  # one by one: others are added meanwhile
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
                    log=self._tell_all,
                ):
                    self._check_bundle()
                    self._open.pop(caption.id)[1].put(caption)
            except BaseException as error:  # whoever asked raises it
                self._tell_all(error)
                self._open.clear()

    def _arrivals(self) -> Iterator[ImageFile]:
        """Yield what is asked and not answered, and then whatever comes in until nothing waits."""
        yield from [image for image, _ in self._open.values()]
        while True:
            try:
                yield self._take(self._inbox.get_nowait())
            except Empty:
                return

    def _take(self, asked: tuple[ImageFile, Outbox]) -> ImageFile:
        self._open[asked[0].id] = asked
        return asked[0]

    def _fail(self, error: ImageError) -> None:
        name = next(name for name, (image, _) in self._open.items() if str(image.source) == error.path)
        self._open.pop(name)[1].put(Unreadable(name, error))

    def _tell_all(self, said: StreamItem) -> None:
        for outbox in {id(outbox): outbox for _, outbox in self._open.values()}.values():
            outbox.put(said)


def _fair_slots(captioner: Captioner, search: Search, peers: int) -> int:
    """Return how many images side by side suit the device, and a share of the memory that `peers` workers have."""
    batch_sizes, memory = captioner.batch_sizes, None
    if batch_sizes.memory_bytes is None:  # a GPU knows its own, which no other worker shares
        memory = available_memory() // peers
    return slots_for(search, captioner.bundle.models, batch_sizes, memory_bytes=memory)


def main() -> None:
    """Answer until the parent is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    opened: SimpleQueue[CaptionStream] = SimpleQueue()
    outbox: Outbox = SimpleQueue()
    with suppress(EOFError):
        order = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_work, args=(order, opened, outbox, answers), daemon=True).start()
        stream = None
        for line in sys.stdin.buffer:  # the first comes once the stream is open
            stream = stream or opened.get()
            stream.ask(unpack_images(line.decode("ascii")), outbox)
    os._exit(0)


def _work(order: WorkOrder, opened: SimpleQueue[CaptionStream], outbox: Outbox, answers: BinaryIO) -> None:
    """Load what the order is for and pass on what it says, until something goes wrong."""

    def tell(message: str) -> None:
        with suppress(BrokenPipeError):  # the parent has ended, which the main thread is being told, too
            answers.write(f"{message}\n".encode("ascii"))
            answers.flush()

    try:
        stream = CaptionStream.open(order)
        opened.put(stream)
        tell(pack_ready(stream.wants))
        while True:
            said = _next_said(outbox)
            for message in _answers(said, stream):
                tell(message)
    except EngineError as error:
        tell(pack_error(error))
    except BaseException as error:  # a fault of ours: the traceback is here, the run ends there
        traceback.print_exc()
        tell(pack_error(EngineError(f"a worker process failed: {type(error).__name__}: {error}")))


def _next_said(outbox: Outbox) -> list[StreamItem]:
    """Wait for something, and return all there is then: a message costs both sides more than what is in it."""
    said = [outbox.get()]
    with suppress(Empty):
        while True:
            said.append(outbox.get_nowait())
    return said


def _answers(said: list[StreamItem], stream: CaptionStream) -> Iterator[str]:
    """Yield messages; raise an error that is among what was said once the rest is told."""
    if notes := stream.take_notes():  # before the captions: the last of these ends the run
        yield pack_image_notes(notes)
    yield from (pack_note(one) for one in said if isinstance(one, str))
    if failures := {one.id: one.error.reason for one in said if isinstance(one, Unreadable)}:
        yield pack_failures(failures)
    if captions := [one for one in said if isinstance(one, Caption)]:
        yield pack_captions(captions)
    for one in said:
        if isinstance(one, BaseException):
            raise one
