"""Read images in threads, in order, at most a fixed number of items ahead of the consumer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class _NotYetError(Exception):
    """A result is not available yet."""


class _EndOfItemsError(Exception):
    """There are no more items."""


class _Readers(Generic[A, B]):
    """Threads that compute function(item) of submitted items. Items and results are matched by number.

    The threads are daemons, so that a program that is stopped does not wait for a disk that hangs. It would wait for
    the threads of concurrent.futures. All items share two queues, because a future per item costs the consumer as much
    as choosing the item's beams.
    """

    def __init__(self, function: Callable[[A], B], threads: int) -> None:
        self._submitted: SimpleQueue[tuple[int, A] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, B | None, BaseException | None]] = SimpleQueue()
        self._early: dict[int, tuple[B | None, BaseException | None]] = {}
        self._function, self._threads = function, threads
        self.stopped = threading.Event()
        for _ in range(threads):
            threading.Thread(target=self._work, name="read ahead", daemon=True).start()

    def submit(self, number: int, item: A) -> None:
        """Queue an item for the threads."""
        self._submitted.put((number, item))

    def finish(self, number: int, error: BaseException) -> None:
        """Set an error as the result of a number, without using a thread."""
        self._done.put((number, None, error))

    def result(self, number: int, *, wait: bool = True) -> B:
        """Return the result of a number or raise its error. Without `wait`, raise _NotYetError if it is not ready."""
        while number not in self._early:
            try:
                finished, value, error = self._done.get(block=wait)
            except Empty:
                raise _NotYetError from None  # not Empty itself, which the source might raise for its own queues
            self._early[finished] = value, error
        value, error = self._early.pop(number)
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback would keep this frame alive, and with it all that the consumer holds
        return value  # type: ignore[return-value]

    def stop(self) -> None:
        """Make the threads exit after their current items."""
        self.stopped.set()
        for _ in range(self._threads):
            self._submitted.put(None)

    def _work(self) -> None:
        while (task := self._submitted.get()) is not None and not self.stopped.is_set():
            number, item = task
            try:
                self._done.put((number, self._function(item), None))
            except BaseException as error:  # the consumer raises it
                self._done.put((number, None, error))


def read_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int, window: int) -> Iterator[B]:
    """Yield function(item) in order, computed in threads, at most `window` items ahead of the consumer."""
    readers = _Readers(function, threads)
    numbers, sent = count(), 0
    try:
        for item in items:
            readers.submit(sent, item)
            sent += 1
            if sent >= window:
                yield readers.result(next(numbers))
        for number in numbers:
            if number == sent:
                break
            yield readers.result(number)
    finally:
        readers.stop()


def read_live(
    function: Callable[[A], B], items: Iterable[A], *, threads: int, window: int, may_wait: Callable[[], bool]
) -> Iterator[B | None]:
    """Like read_ahead, but iterate over `items` in a separate thread and yield None while no result is available.

    So `items` may be slow, or wait for the results of its earlier items. If `may_wait()` is true, wait for the next
    result instead of yielding None.
    """
    readers = _Readers(function, threads)
    room = threading.Semaphore(window)

    def feed() -> None:
        number = 0
        try:
            for item in items:
                room.acquire()
                if readers.stopped.is_set():
                    return
                readers.submit(number, item)
                number += 1
            readers.finish(number, _EndOfItemsError())
        except BaseException as error:  # the consumer raises it
            readers.finish(number, error)

    threading.Thread(target=feed, name="live source", daemon=True).start()
    try:
        for number in count():
            while True:
                try:
                    result = readers.result(number, wait=may_wait())
                    break
                except _NotYetError:
                    yield None
            room.release()
            yield result
    except _EndOfItemsError:
        return
    finally:
        readers.stop()
        room.release()
