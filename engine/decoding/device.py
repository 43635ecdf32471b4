"""A backend behind a queue: its calls are done in order, beside what the host does meanwhile.

Only the result of a step is waited for. Knows nothing of beams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.decoding.backend import Backend, Cache, Encoded, StepInputs

T = TypeVar("T")


class Later(Generic[T]):
    """What a queued call will return."""

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._value: Any = None
        self._error: BaseException | None = None

    def settle(self, value: T | None, error: BaseException | None = None) -> None:
        """Say what the call returned, or what it raised."""
        self._value, self._error = value, error
        self._done.release()

    def wait(self) -> T:
        """Return the value once it is there; raise what the call raised."""
        with self._done:
            if self._error is not None:
                raise self._error
            value: T = self._value
            return value


class DeviceQueue:
    """The calls of a Backend, done in order by a thread of their own, or at once where `in_thread` is false.

    A context manager. Of its own thread no call is done any more once one has failed, and each says the same error; of
    those that return nothing, the next step says it. Without a thread each call says its own.
    """

    def __init__(self, backend: Backend, *, in_thread: bool) -> None:
        self.backend = backend
        self._calls: SimpleQueue[list[tuple[Callable[[], None], bool]] | None] = SimpleQueue()
        self._asked: list[tuple[Callable[[], None], bool]] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="device", daemon=True) if in_thread else None

    def __enter__(self) -> DeviceQueue:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._error = self._error or value  # what is still queued is not worth doing then
            self._calls.put(None)
            if self._thread is not threading.current_thread():  # which may be the one that collects garbage
                self._thread.join()
            self._error = None  # it knows the frames it came through, and these all keys and values

    def encode(self, pixel_values: NDArray[np.uint8]) -> Later[Encoded]:
        """See Backend.encode. Begun with the next step, like admit and regroup."""
        return self._put(partial(self.backend.encode, pixel_values))

    def allocate(self, num_slots: int) -> Cache:
        """See Backend.allocate; this one is waited for."""
        later = self._put(partial(self.backend.allocate, num_slots))
        self._hand_over()
        return later.wait()

    def admit(self, cache: Cache, slot: int, encoded: Later[Encoded], image: int) -> None:
        """See Backend.admit. What was encoded in another queue is waited for."""
        self._send(lambda: self.backend.admit(cache, slot, encoded.wait(), image))

    def step(self, cache: Cache, inputs: StepInputs) -> Later[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """See Backend.step."""
        later = self._put(partial(self.backend.step, cache, inputs))
        self._hand_over()
        return later

    def regroup(self, cache: Cache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        self._send(partial(self.backend.regroup, cache, slots, columns))

    def _put(self, call: Callable[[], T]) -> Later[T]:
        """Do a call whose result is asked for."""
        later: Later[T] = Later()
        if self._thread is None:
            later.settle(call())
            return later

        def settle() -> None:
            if self._error is not None:
                later.settle(None, self._error)
                return
            try:
                value = call()
            except BaseException as error:
                later.settle(None, error)
                raise
            later.settle(value)

        self._send(settle, always=True)
        return later

    def _send(self, call: Callable[[], None], *, always: bool = False) -> None:
        """Do a call that returns nothing; after an error only those that are done `always`."""
        if self._thread is None:
            call()
        else:
            self._asked.append((call, always))

    def _hand_over(self) -> None:
        """Let the thread do what was asked; each time wakes it, which costs more than most of the calls."""
        if self._thread is not None:
            self._calls.put(self._asked)
            self._asked = []

    def _work(self) -> None:
        while (asked := self._calls.get()) is not None:
            for call, always in asked:
                try:
                    if always or self._error is None:
                        call()
                except BaseException as error:  # whoever waits for a result raises it
                    self._error = self._error or error
