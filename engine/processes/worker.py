"""What runs in a worker process: an order and then images come in on standard input, answers go out on standard output.

It ends when its input does, which is when its parent has ended, however that happened.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import BinaryIO

from engine.captions import Caption
from engine.errors import EngineError
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
from engine.workers.stream import CaptionStream, Outbox, StreamItem, Unreadable


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
