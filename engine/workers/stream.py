"""One captioner that several callers feed at once, so that its slots stay full from one block to the next.

A scheduler that is given a block at a time runs empty at the end of each; knows no Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue

from engine.captioner import Captioner, caption_within_memory
from engine.captions import Caption
from engine.errors import ImageError
from engine.inputs.images import ImageFile
from engine.options import DecodeOptions

StreamItem = Caption | ImageError | str | BaseException
"""What comes back: a caption, an image that cannot be read, a note for the user, or what went wrong."""
Outbox = SimpleQueue[StreamItem]


class CaptionStream:
    """A thread that captions whatever is asked of it, in that order; `rows` beams side by side."""

    def __init__(self, captioner: Captioner, options: DecodeOptions, *, rows: int) -> None:
        self._captioner, self._options, self._rows = captioner, options, rows
        self._inbox: SimpleQueue[tuple[ImageFile, Outbox]] = SimpleQueue()
        self._open: dict[str, tuple[ImageFile, Outbox]] = {}
        threading.Thread(target=self._serve, name="captions", daemon=True).start()

    def caption(self, images: Sequence[ImageFile]) -> Iterator[Caption | ImageError | str]:
        """Yield a Caption or an ImageError of each image, captions in the order of the images, and notes.

        No two images that are asked for at one time may have the same id. Raises the EngineError that the captioner
        met, after which other images may still be asked for.
        """
        outbox: Outbox = SimpleQueue()
        for image in images:
            self._inbox.put((image, outbox))
        missing = len(images)
        while missing:
            said = outbox.get()
            if isinstance(said, BaseException) and not isinstance(said, ImageError):
                raise said
            missing -= not isinstance(said, str)
            yield said

    def _serve(self) -> None:
        while True:
            self._take(self._inbox.get())
            try:
                for caption in caption_within_memory(
                    self._captioner,
                    self._options,
                    self._arrivals,
                    on_error=self._fail,
                    rows=self._rows,
                    say=self._tell_all,
                ):
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
        place = next(name for name, (image, _) in self._open.items() if str(image.source) == error.path)
        self._open.pop(place)[1].put(error)

    def _tell_all(self, said: StreamItem) -> None:
        for outbox in {id(outbox): outbox for _, outbox in self._open.values()}.values():
            outbox.put(said)
