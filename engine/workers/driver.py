"""The driver: distributes the images of a run among workers, replaces dead ones, retries their images."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Protocol

from engine.bundle.manifest import Bundle
from engine.captioner import PendingImages
from engine.captions import Caption
from engine.errors import BackendError, ImageError, counted
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote
from engine.workers.messages import Answer, WorkOrder, unpack_answer

Log = Callable[[str], None]

REFILL = 8
"""A worker gets more images once 1 / REFILL of those it can hold are answered: more at a time are fewer messages."""
TRIALS = 64
"""Maximum number of groups in which a dead worker's images are retried: up to so many are retried one by one."""
EXIT_S = 1.0
"""Seconds for a process that has closed its output to end by itself; killed earlier it would lose its exit code."""
MOST_DEATHS = 5
"""Deaths of a worker in a row, without an image answered in between, after which it is not replaced any more."""
MOST_GIVEN_UP = 20
"""Images given up in a row whose deaths do not count. With more, not the images are the cause, but the machine."""


class Worker(Protocol):
    """A running CaptionWorker (engine/workers/worker.py), as the driver sees it.

    number  identifies the worker: a replacement gets the same one
    wants   how many images it can hold at a time, from its first message; 0 until then
    name    what the log calls it
    """

    number: int
    wants: int

    @property
    def name(self) -> str: ...

    def submit(self, images: Sequence[ImageFile]) -> None:
        """Send images to caption; to a dead worker nothing is sent, which its events will report."""
        ...

    def end(self, patience_s: float = 0) -> str:
        """Kill the worker if it does not end within `patience_s`; return how it ended, in a few words."""
        ...


Events = SimpleQueue[tuple[Worker, str]]
"""Each message of a worker with its sender, and an empty message when the worker has ended."""


@dataclass(frozen=True)
class Team:
    """The workers of a run, which `start(number, order, events)` starts and restarts.

    size    number of workers
    member  what one is called in errors
    remedy  what to do if they die again and again
    """

    size: int
    start: Callable[[int, WorkOrder, Events], Worker]
    member: str
    remedy: str


class WorkQueue:
    """The images of a run: waiting, held by one of `workers` workers, quarantined or answered.

    Any of the images that a dead worker held may have killed it, or none. They are quarantined and retried last, in
    small groups, while the worker holds nothing else. If the worker dies again, the group is divided. An image that
    kills its worker even alone is given up.
    """

    def __init__(self, images: Sequence[ImageFile], workers: int) -> None:
        self.workers = workers
        self._waiting = deque(images)
        self._quarantined: deque[list[ImageFile]] = deque()
        self._held: dict[int, dict[str, ImageFile]] = {}
        self._retrying: set[int] = set()
        self.unanswered = len(images)

    def give(self, worker: int, wants: int) -> list[ImageFile]:
        """Return more images for a worker that can hold `wants` of them; often an empty list."""
        held = self._held.setdefault(worker, {})
        if held and worker in self._retrying:
            return []
        self._retrying.discard(worker)
        given = self._next_waiting(len(held), wants)
        if not given and not held and self._quarantined:
            given = self._quarantined.popleft()
            self._retrying.add(worker)
        held.update((image.id, image) for image in given)
        return given

    def _next_waiting(self, held: int, wants: int) -> list[ImageFile]:
        in_work = self.unanswered - sum(map(len, self._quarantined))
        fair = -(-in_work // self.workers)  # a small run is for all workers, not for the first that is ready
        room = min(wants, fair) - held
        waiting = len(self._waiting)
        if room < max(1, min(wants // REFILL, -(-waiting // self.workers))):
            return []
        return [self._waiting.popleft() for _ in range(min(room, waiting))]

    def answer(self, worker: int, image_id: str) -> ImageFile:
        """Record that a worker has answered an image; return the image."""
        self.unanswered -= 1
        return self._held[worker].pop(image_id)

    def died(self, worker: int) -> tuple[list[ImageFile], ImageFile | None]:
        """Quarantine the images of a dead worker; return those to retry, and the image that is given up or None."""
        held = list(self._held.pop(worker, {}).values())
        if worker in self._retrying and len(held) == 1:
            self.unanswered -= 1
            return [], held[0]
        size = -(-len(held) // TRIALS)
        self._quarantined += [held[start : start + size] for start in range(0, len(held), size or 1)]
        return held, None


class WorkerSource:
    """Captions made by worker processes or Ray actors, which start when `captions` is called first; see Source.

    An image that kills its worker even when it is alone is reported as unreadable.
    """

    def __init__(self, bundle: Bundle, order: WorkOrder, team: Team) -> None:
        self.bundle, self.decoding = bundle, order.decoding
        self.backend_name, self.environment = order.runtime.backend, order.environment
        self.notes: list[ImageNote] = []
        self._order, self._team = order, team
        self._workers: dict[int, Worker] = {}
        self._deaths: Counter[int] = Counter()
        self._has_captioned, self._given_up = False, 0
        self._events: Events = SimpleQueue()

    def captions(self, pending: PendingImages, log: Log, *, more: bool = False) -> Iterator[Caption]:
        """See Source. Raises BackendError if no worker is left, and the errors that workers send."""
        images = list(pending.remaining())
        numbers = range(self._team.size if more else min(self._team.size, len(images)))
        self._order = replace(self._order, peers=min(self._order.peers, len(numbers)))
        queue = WorkQueue(images, len(numbers))
        for number in numbers:
            if number in self._workers:  # from an earlier call with `more`
                self._give(self._workers[number], queue)
            else:
                self._start(number)
        while queue.unanswered:
            worker, message = self._events.get()
            if message:
                answer = unpack_answer(message)
                self._process(worker, answer, queue, pending, log)
                self._give(worker, queue)
                yield from answer.captions
            else:
                self._replace(worker, queue, pending, log)
                # idle workers send no messages, so that nothing else would give them the images of the dead one
                for other in self._workers.values():
                    self._give(other, queue)
        if not more:
            self.end()

    def end(self) -> None:
        """Stop all workers and discard their results."""
        while self._workers:
            self._workers.popitem()[1].end()

    def _start(self, number: int) -> None:
        self._workers[number] = self._team.start(number, self._order, self._events)

    def _process(self, worker: Worker, answer: Answer, queue: WorkQueue, pending: PendingImages, log: Log) -> None:
        worker.wants = answer.wants or worker.wants
        self.notes += answer.image_notes
        if answer.note:
            log(answer.note)
        for name, reason in answer.failures.items():
            pending.fail(ImageError(str(queue.answer(worker.number, name).source), reason))
        for caption in answer.captions:
            queue.answer(worker.number, caption.id)
        self._has_captioned |= bool(answer.captions)
        if answer.captions or answer.failures:
            self._given_up = 0
            del self._deaths[worker.number]

    def _give(self, worker: Worker, queue: WorkQueue) -> None:
        if worker.wants and (images := queue.give(worker.number, worker.wants)):
            worker.submit(images)

    def _replace(self, worker: Worker, queue: WorkQueue, pending: PendingImages, log: Log) -> None:
        """Replace a dead worker, unless it dies repeatedly. Raises BackendError if no worker is left."""
        number = worker.number
        del self._workers[number]
        how = worker.end(patience_s=EXIT_S)
        retried, given_up = queue.died(number)
        if given_up is not None:
            pending.fail(ImageError(str(given_up.source), f"its {self._team.member} died each time ({how})"))
        retry = f": {counted(len(retried), 'image is', 'images are')} retried" if retried else ""
        log(f"warning: {worker.name} died ({how}){retry if given_up is None else f' at {given_up.source}'}")
        if not queue.unanswered:
            return
        self._given_up += given_up is not None
        if given_up is not None and self._has_captioned and self._given_up <= MOST_GIVEN_UP:
            del self._deaths[number]  # the image is to blame: the next one may be read
        else:
            self._deaths[number] += 1
        if self._deaths[number] < MOST_DEATHS:
            self._start(number)
            return
        queue.workers -= 1
        if not queue.workers:
            raise BackendError(
                f"no {self._team.member} is left, the last one died {MOST_DEATHS} times in a row ({how}): if memory is "
                f"short, {self._team.remedy}"
            )
        log(f"warning: it died {MOST_DEATHS} times in a row: continuing with {queue.workers} {self._team.member}s")
