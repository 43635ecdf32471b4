"""A backend behind a queue: a worker thread runs its calls in order while the host continues.

Only the result of a step is waited for. This module does not depend on beams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from engine.decoding.backend import AttentionBackend, Backend, Cache, Encoded, StepInputs

T = TypeVar("T")


class Future(Generic[T]):
    """The result of a queued call, available later.

    A lock instead of concurrent.futures.Future, which takes seven times as long to create, resolve and read (3.7 us),
    since the host's time per step counts.
    """

    def __init__(self, on_done: Callable[[], None] | None = None) -> None:
        """Create the future of a call that has not run; `on_done` is called once it has, in the worker's thread."""
        self._on_done = on_done
        self._done = threading.Lock()
        self._done.acquire()
        self._value: Any = None
        self._error: BaseException | None = None

    def resolve(self, value: T | None, error: BaseException | None = None) -> None:
        """Store the value that the call returned, or the error that it raised."""
        self._value, self._error = value, error
        self._done.release()
        # after the release: whoever this wakes reads the value at once
        if self._on_done is not None:
            self._on_done()

    def wait(self) -> T:
        """Block until the call has run; return its value or raise its error."""
        with self._done:
            if self._error is not None:
                raise self._error
            value: T = self._value
            return value


class StepResult(NamedTuple):
    """The best candidates of a step, scores f32[B,C] and ids i64[B,C]; the attention f32[B,T,S] of the fed tokens."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    attention: NDArray[np.float32] | None


class DeviceQueue:
    """Runs the calls of a Backend in order, in a worker thread, or immediately if `in_thread` is false.

    A context manager. After a failure the worker thread runs no further calls; every pending and later call raises
    that error. Calls without a result raise it at the next step. Without a thread each call raises its own error.
    """

    def __init__(self, backend: Backend, *, in_thread: bool) -> None:
        self.backend = backend
        self._calls: SimpleQueue[list[tuple[Callable[[], None], bool]] | None] = SimpleQueue()
        self._collected: list[tuple[Callable[[], None], bool]] = []
        self._error: BaseException | None = None
        # a daemon: if the program exits while the device hangs, it must not wait for this thread
        self._thread = threading.Thread(target=self._work, name="device", daemon=True) if in_thread else None

    def __enter__(self) -> DeviceQueue:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._error = self._error or value  # after an error the calls that are still queued are skipped
            self._calls.put(None)
            if self._thread is not threading.current_thread():  # garbage collection may run this in the worker
                self._thread.join()
            self._error = None  # its traceback holds frames that hold the whole KV cache

    def encode(self, pixel_values: NDArray[np.uint8]) -> Future[Encoded]:
        """See Backend.encode. The call starts together with the next step, like admit and regroup."""
        return self._put(partial(self.backend.encode, pixel_values))

    def allocate(self, num_slots: int) -> Cache:
        """See Backend.allocate; blocks until it is done."""
        future = self._put(partial(self.backend.allocate, num_slots))
        self.start()
        return future.wait()

    def admit(self, cache: Cache, slot: int, encoded: Future[Encoded], image: int) -> None:
        """See Backend.admit. Blocks the worker until `encoded`, which may be from another queue, is done."""
        # waits in the worker, not here: the host chooses beams while another queue encodes
        self._send(lambda: self.backend.admit(cache, slot, encoded.wait(), image))

    def step(
        self,
        cache: Cache,
        inputs: StepInputs,
        on_done: Callable[[], None] | None = None,
        *,
        with_attention: bool = False,
    ) -> Future[StepResult]:
        """See Backend.step and AttentionBackend. `on_done` is called when the result can be read without waiting."""

        def step() -> StepResult:
            scores, ids = self.backend.step(cache, inputs)
            attention = cast("AttentionBackend", self.backend).attention(cache) if with_attention else None
            return StepResult(scores, ids, attention)

        future = self._put(step, on_done)
        self.start()
        return future

    def regroup(self, cache: Cache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        self._send(partial(self.backend.regroup, cache, slots, columns))

    def _put(self, call: Callable[[], T], on_done: Callable[[], None] | None = None) -> Future[T]:
        """Queue a call that returns a value."""
        future: Future[T] = Future(on_done)
        if self._thread is None:  # an error is raised here, where the caller can tell which call it was
            future.resolve(call())
            return future

        def resolve() -> None:
            if self._error is not None:
                future.resolve(None, self._error)
                return
            try:
                value = call()
            except BaseException as error:
                future.resolve(None, error)
                raise
            future.resolve(value)

        # always: after an error somebody still waits for this future, and must get the error
        self._send(resolve, always=True)
        return future

    def _send(self, call: Callable[[], None], *, always: bool = False) -> None:
        """Queue a call without a result; after an error only calls with `always` still run."""
        if self._thread is None:
            call()
        else:
            self._collected.append((call, always))

    def start(self) -> None:
        """Pass the collected calls to the thread, all at once: waking it costs more than most of the calls."""
        if self._thread is not None:
            self._calls.put(self._collected)
            self._collected = []

    def _work(self) -> None:
        while (calls := self._calls.get()) is not None:
            for call, always in calls:
                try:
                    if always or self._error is None:
                        call()
                except BaseException as error:  # raised by whoever waits for a result
                    self._error = self._error or error
