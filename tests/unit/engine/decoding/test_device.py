"""Sets of slots that share a device queue: equal captions, concurrent work, and no lost errors."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

from engine.decoding.device import DeviceQueue
from engine.decoding.scheduler import Request, Scheduler
from tests.unit.engine.decoding.test_beam import SEARCH, TableBackend, pixels

IMAGES = range(23)


def decode(backend, num_sets=1, num_slots=3, **more):
    search = replace(SEARCH, num_beams=3, no_repeat_ngram_size=2)
    scheduler = Scheduler(backend, search, num_slots=num_slots, encode_batch=2, num_sets=num_sets, **more)
    return dict(scheduler.decode(pixels(*IMAGES)))


def test_any_number_of_sets_and_backends_is_equal():
    expected = decode(TableBackend(3))
    assert sorted(expected) == list(IMAGES)
    for num_sets, num_slots in ((2, 3), (3, 2), (2, 40)):
        assert decode(TableBackend(3), num_sets, num_slots) == expected
    backends = [TableBackend(3) for _ in range(3)]
    assert decode(backends[0], 3, 2, more_backends=backends[1:]) == expected
    assert all(backend.steps for backend in backends)


@pytest.mark.parametrize("num_sets", [1, 2])
def test_encoded_images_are_admitted_before_the_next_batch(num_sets):
    """Encoded images are valid until the next call of encode: a GPU backend has one buffer for them."""

    class OnePlace(TableBackend):
        place = np.zeros((2, 1, 1, 3), np.uint8)

        def encode(self, pixel_values):
            self.place[: len(pixel_values)] = pixel_values
            return self.place

        def admit(self, cache, slot, encoded, image):
            super().admit(cache, slot, encoded.copy(), image)

    assert decode(OnePlace(3), num_sets, 5) == decode(TableBackend(3))


def test_small_run_opens_no_second_set():
    class Counting(TableBackend):
        allocated = 0

        def allocate(self, num_slots):
            self.allocated += 1
            return super().allocate(num_slots)

    backend = Counting(3)
    decode(backend, num_sets=2, num_slots=30)
    assert backend.allocated == 1


def test_device_and_host_work_on_different_sets():
    spent = {"device": 0.0, "host": 0.0}

    def work(where):
        start = time.perf_counter()
        time.sleep(0.02)
        spent[where] += time.perf_counter() - start

    class Slow(TableBackend):
        def step(self, cache, inputs):
            work("device")
            return super().step(cache, inputs)

    def seconds(num_sets):
        spent.update(device=0.0, host=0.0)
        scheduler = Scheduler(Slow(3), SEARCH, num_slots=4, encode_batch=2, num_sets=num_sets)
        start = time.perf_counter()
        for _ in scheduler.steps(itertools.starmap(Request, enumerate(pixels(*IMAGES)))):
            work("host")
        return time.perf_counter() - start

    assert seconds(1) >= spent["device"] + spent["host"]
    assert seconds(2) < 0.9 * (spent["device"] + spent["host"])


def test_a_slow_backend_does_not_delay_another():
    class Slow(TableBackend):
        def step(self, cache, inputs):
            time.sleep(0.05)
            return super().step(cache, inputs)

    slow, fast = Slow(3), TableBackend(3)
    assert decode(slow, 2, 2, more_backends=[fast]) == decode(TableBackend(3))
    assert fast.steps > 2 * slow.steps


def test_a_small_run_is_divided_among_the_backends():
    class Counting(TableBackend):
        encoded = 0

        def encode(self, pixel_values):
            self.encoded += len(pixel_values)
            return super().encode(pixel_values)

    backends = [Counting(3), Counting(3)]
    decode(backends[0], 2, 40, more_backends=backends[1:])
    assert sorted(backend.encoded for backend in backends) == [11, 12]


def test_the_caller_has_the_last_word():
    """Results that are known before decoding, which the caller notes while its images are read, are not lost."""
    events = []

    def images():
        for _ in range(3):
            events.append("image")
            yield None

    scheduler = Scheduler(TableBackend(3), SEARCH, num_slots=2, num_sets=2, more_backends=[TableBackend(3)])
    for closed in scheduler.steps(images()):
        assert closed == []
        events.append("control")
    assert events.count("image") == 3
    assert events[-1] == "control"


@pytest.mark.parametrize("call", ["encode", "allocate", "admit", "step", "regroup"])
@pytest.mark.parametrize("num_sets", [1, 2])
def test_error_of_a_call_reaches_the_caller(call, num_sets):
    def fail(*_):
        raise MemoryError("short")

    failing = TableBackend(3)
    setattr(failing, call, fail)
    threads = threading.active_count()
    with pytest.raises(MemoryError, match="short"):
        decode(failing, num_sets)
    assert threading.active_count() == threads


def test_nothing_is_done_after_an_error():
    done = []

    class Noting(TableBackend):
        def admit(self, *arguments):
            done.append(arguments)

        def regroup(self, *arguments):
            done.append(arguments)

        def encode(self, _):
            raise ValueError("damaged")

    with DeviceQueue(Noting(0), in_thread=True) as device:
        future = device.encode(np.zeros((1, 1, 1, 3), np.uint8))
        device.regroup(None, np.arange(1), np.zeros((1, 1), np.int64))
        device.admit(None, 0, future, 0)
        for call in (device.step(None, None), future):
            with pytest.raises(ValueError, match="damaged"):
                call.wait()
    assert done == []


@pytest.mark.parametrize("num_sets", [1, 2])
def test_empty_slots_do_not_grow_the_cache(num_sets):
    """Mostly repeated images: one request per batch takes the first slot, and the other slots stay empty."""
    widths = []

    class Watching(TableBackend):
        def regroup(self, cache, slots, columns):
            widths.append(columns.shape[1])
            super().regroup(cache, slots, columns)

    def images():
        for number in range(200):
            yield Request(number, pixels(number)[0])
            yield from [None] * 23

    search = replace(SEARCH, num_beams=2)
    scheduler = Scheduler(Watching(3), search, num_slots=12, encode_batch=2, num_sets=num_sets)
    found = [key for closed in scheduler.steps(images()) for key, _ in closed]
    assert sorted(found) == list(range(200))
    assert len(widths) > 5
    assert max(widths) <= search.num_beams * (search.max_length + 8)


@pytest.mark.parametrize("num_sets", [1, 2])
@pytest.mark.parametrize("end", ["error", "closed early"])
def test_early_end_frees_the_cache(num_sets, end):
    kept = []

    class Failing(TableBackend):
        def allocate(self, num_slots):
            cache = super().allocate(num_slots)
            kept.append(weakref.ref(cache))
            return cache

        def step(self, cache, inputs):
            if end == "error" and self.steps == 5:
                raise MemoryError("short")
            return super().step(cache, inputs)

    scheduler = Scheduler(Failing(3), SEARCH, num_slots=4, encode_batch=2, num_sets=num_sets)
    steps = scheduler.steps(itertools.starmap(Request, enumerate(pixels(*IMAGES))))
    try:
        for _, _ in zip(range(12), steps, strict=False):
            pass
    except MemoryError:
        pass
    steps.close()
    del steps, scheduler
    gc.collect()
    assert kept
    assert not any(reference() for reference in kept)
