"""Which worker gets which image, and which deaths of workers end a run; without processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import pytest

from engine.bundle.manifest import Bundle
from engine.bundle.open import BundleRef
from engine.captioner import Decoding
from engine.captions import Alternative, Caption
from engine.errors import BackendError
from engine.inputs.images import ImageFile
from engine.runtime import Runtime
from engine.workers.driver import MOST_DEATHS, TRIALS, Events, Team, WorkerSource, WorkQueue
from engine.workers.messages import WorkOrder, pack_captions, pack_ready


def images(count: int) -> list[ImageFile]:
    return [ImageFile(str(number), Path(f"{number}.png")) for number in range(count)]


def test_small_run_is_divided_among_all_workers():
    queue = WorkQueue(images(10), 2)
    assert [len(queue.give(worker, 100)) for worker in (0, 1, 0, 1)] == [5, 5, 0, 0]


def test_worker_never_holds_more_than_it_wants():
    queue = WorkQueue(images(1000), 2)
    held = {worker: queue.give(worker, 40) for worker in (0, 1)}
    assert [len(batch) for batch in held.values()] == [40, 40]
    for _ in range(4):
        queue.answer(0, held[0].pop(0).id)
        assert not queue.give(0, 40)
    queue.answer(0, held[0].pop(0).id)
    assert len(queue.give(0, 40)) == 5


@pytest.mark.parametrize("seed", range(20))
def test_every_image_is_answered_or_given_up_once(seed):
    chance = random.Random(seed)
    count, workers, wants = chance.randint(1, 900), chance.randint(1, 5), chance.randint(1, 200)
    poison = {str(number) for number in chance.sample(range(count), min(count, chance.randint(0, 3)))}
    queue = WorkQueue(images(count), workers)
    held: dict[int, list[str]] = {worker: [] for worker in range(workers)}
    answered: list[str] = []
    given_up: list[str] = []
    deaths = 0
    while queue.unanswered:
        for worker, names in held.items():
            names += [image.id for image in queue.give(worker, wants)]
        assert any(held.values()), "images wait, and no worker gets one"
        worker = chance.choice([worker for worker, names in held.items() if names])
        name = held[worker].pop(0)
        if name not in poison:
            queue.answer(worker, name)
            answered.append(name)
            continue
        deaths += 1
        held[worker] = []
        again, alone = queue.died(worker)
        assert (alone is None) == bool(again)
        given_up += [alone.id] if alone else []
    assert sorted(given_up) == sorted(poison)
    assert sorted([*answered, *given_up], key=int) == [str(number) for number in range(count)]
    assert deaths <= len(poison) * (2 if wants <= TRIALS else 3)


def test_image_held_alone_is_retried_once():
    queue = WorkQueue(images(1), 1)
    (image,) = queue.give(0, 5)
    assert queue.died(0) == ([image], None)
    assert queue.give(0, 5) == [image]
    assert queue.died(0) == ([], image)
    assert not queue.unanswered


class MortalWorker:
    """A worker that captions one image of those it gets and dies, or dies before it captions any."""

    name, wants = "worker", 0

    def __init__(self, number: int, events: Events, *, captions: bool) -> None:
        self.number, self._events, self._captions, self._lives = number, events, captions, True
        events.put((self, pack_ready(20)))

    def submit(self, images) -> None:
        if not self._lives:
            return
        self._lives = False
        if self._captions:
            caption = Caption(images[0].id, (Alternative("a", "a", (1, 2), -1.0, -1.0),))
            self._events.put((self, pack_captions([caption])))
        self._events.put((self, ""))

    def end(self, patience_s: float = 0) -> str:  # noqa: ARG002
        return "killed"


class Pending:
    def __init__(self, count: int) -> None:
        self.images = images(count)

    def remaining(self) -> Iterator[ImageFile]:
        return iter(self.images)

    def fail(self, error: Exception) -> None:
        """The image that a worker held last is given up."""


class DelicateWorker(MortalWorker):
    """A worker that captions all images it gets up to the first with an id of `deadly`, and dies there."""

    deadly: frozenset[str]

    def submit(self, images) -> None:
        for image in images:
            if not self._lives or image.id in self.deadly:
                self._lives = False
                self._events.put((self, ""))
                return
            caption = Caption(image.id, (Alternative("a", "a", (1, 2), -1.0, -1.0),))
            self._events.put((self, pack_captions([caption])))


def test_many_deadly_images_in_a_row_do_not_end_a_run():
    pending = Pending(40)
    failed: list[str] = []
    pending.fail = lambda error: failed.append(error.path)
    deadly = [image.id for image in pending.images[5 : 5 + 2 * MOST_DEATHS]]

    def start(number: int, _: WorkOrder, events: Events) -> MortalWorker:
        worker = DelicateWorker(number, events, captions=True)
        worker.deadly = frozenset(deadly)
        return worker

    order = WorkOrder(BundleRef(), "", Runtime("cpu"), cast(Decoding, None))
    source = WorkerSource(cast(Bundle, None), order, Team(1, start, "worker", "pray"))
    captions = list(source.captions(pending, lambda _: None))
    assert len(captions) == 40 - len(deadly)
    assert len(failed) == len(deadly)


@pytest.mark.parametrize("captions", [True, False])
def test_only_deaths_in_a_row_end_a_run(captions):
    started: list[int] = []

    def start(number: int, _: WorkOrder, events: Events) -> MortalWorker:
        started.append(number)
        return MortalWorker(number, events, captions=captions)

    order = WorkOrder(BundleRef(), "", Runtime("cpu"), cast(Decoding, None))
    source = WorkerSource(cast(Bundle, None), order, Team(1, start, "worker", "pray"))
    found = source.captions(Pending(10 * MOST_DEATHS), lambda _: None)
    if captions:
        assert len(list(islice(found, 2 * MOST_DEATHS))) == 2 * MOST_DEATHS
        assert len(started) >= 2 * MOST_DEATHS
    else:
        with pytest.raises(BackendError, match=f"died {MOST_DEATHS} times in a row"):
            list(found)
        assert len(started) == MOST_DEATHS
