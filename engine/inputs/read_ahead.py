"""Read images in threads, in order, a bounded way ahead of who uses them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def read_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int, window: int) -> Iterator[B]:
    """Yield function(item) in order, computed in threads, never more than `window` items ahead of the consumer.

    The threads are daemons: a program that is stopped does not wait for a disk that hangs, as it would for those of
    concurrent.futures.
    """
    asked: SimpleQueue[tuple[Future[B], A] | None] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while (task := asked.get()) is not None and not stopped.is_set():
            future, item = task
            try:
                future.set_result(function(item))
            except BaseException as error:  # the consumer raises it
                future.set_exception(error)

    for _ in range(threads):
        threading.Thread(target=work, name="read ahead", daemon=True).start()
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(Future())
            asked.put((pending[-1], item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stopped.set()
        for _ in range(threads):
            asked.put(None)
