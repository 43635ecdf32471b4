"""Read images in threads, in order, a bounded way ahead of who uses them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from queue import SimpleQueue
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def read_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int, window: int) -> Iterator[B]:
    """Yield function(item) in order, computed in threads, never more than `window` items ahead of the consumer.

    The threads are daemons: a program that is stopped does not wait for a disk that hangs, as it would for those of
    concurrent.futures. Two queues do for all items: a future for each costs the consumer as much as choosing its beams.
    """
    asked: SimpleQueue[tuple[int, A] | None] = SimpleQueue()
    done: SimpleQueue[tuple[int, B | None, BaseException | None]] = SimpleQueue()
    early: dict[int, tuple[B | None, BaseException | None]] = {}
    stopped = threading.Event()

    def work() -> None:
        while (task := asked.get()) is not None and not stopped.is_set():
            place, item = task
            try:
                done.put((place, function(item), None))
            except BaseException as error:  # the consumer raises it
                done.put((place, None, error))

    def result(place: int) -> B:
        while place not in early:
            finished, value, error = done.get()
            early[finished] = value, error
        value, error = early.pop(place)
        if error is not None:
            try:
                raise error
            finally:
                del error  # which would know this frame, and with it all that the consumer holds
        return value  # type: ignore[return-value]

    for _ in range(threads):
        threading.Thread(target=work, name="read ahead", daemon=True).start()
    places, sent = count(), 0
    try:
        for item in items:
            asked.put((sent, item))
            sent += 1
            if sent >= window:
                yield result(next(places))
        for place in places:
            if place == sent:
                break
            yield result(place)
    finally:
        stopped.set()
        for _ in range(threads):
            asked.put(None)
