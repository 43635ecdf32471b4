"""Read images in threads, in order, a bounded way ahead of the consumer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class _NotYetError(Exception):
    """A result is not there."""


class _EndOfItemsError(Exception):
    """There are no more items."""


class _Readers(Generic[A, B]):
    """Threads that compute function(item) of the items they are asked for, by the number of the item.

    The threads are daemons: a program that is stopped does not wait for a disk that hangs, as it would for those of
    concurrent.futures. Two queues do for all items: a future for each costs the consumer as much as choosing its beams.
    """

    def __init__(self, function: Callable[[A], B], threads: int) -> None:
        self._asked: SimpleQueue[tuple[int, A] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, B | None, BaseException | None]] = SimpleQueue()
        self._early: dict[int, tuple[B | None, BaseException | None]] = {}
        self._function, self._threads = function, threads
        self.stopped = threading.Event()
        for _ in range(threads):
            threading.Thread(target=self._work, name="read ahead", daemon=True).start()

    def ask(self, number: int, item: A) -> None:
        """Ask for the result of an item."""
        self._asked.put((number, item))

    def finish(self, number: int, error: BaseException) -> None:
        """Let the result of a number be an error, without asking a thread."""
        self._done.put((number, None, error))

    def result(self, number: int, *, wait: bool = True) -> B:
        """Return the result of a number, or raise its error. Without `wait`, raise _NotYetError if it is not there."""
        while number not in self._early:
            try:
                finished, value, error = self._done.get(block=wait)
            except Empty:
                raise _NotYetError from None  # Empty itself may come from the source, which has queues, too
            self._early[finished] = value, error
        value, error = self._early.pop(number)
        if error is not None:
            try:
                raise error
            finally:
                del error  # which would know this frame, and with it all that the consumer holds
        return value  # type: ignore[return-value]

    def stop(self) -> None:
        """Let the threads end once they have finished their items."""
        self.stopped.set()
        for _ in range(self._threads):
            self._asked.put(None)

    def _work(self) -> None:
        while (task := self._asked.get()) is not None and not self.stopped.is_set():
            number, item = task
            try:
                self._done.put((number, self._function(item), None))
            except BaseException as error:  # the consumer raises it
                self._done.put((number, None, error))


def read_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int, window: int) -> Iterator[B]:
    """Yield function(item) in order, computed in threads, never more than `window` items ahead of the consumer."""
    readers = _Readers(function, threads)
    numbers, sent = count(), 0
    try:
        for item in items:
            readers.ask(sent, item)
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
    """Like read_ahead, but take the items in a thread of their own and yield None while the next result is not there.

    So a source may deliver slowly, or wait for what becomes of its earlier items. Where `may_wait()` is true, wait for
    the next result instead of yielding None.
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
                readers.ask(number, item)
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
