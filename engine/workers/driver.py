"""Worker processes on one machine: distribute images, replace dead workers, retry their images."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

from engine.bundle.manifest import Bundle
from engine.bundle.open import BundleRef
from engine.bundle.signature import environment
from engine.bundle.tokenizer import CaptionTokenizer
from engine.captioner import PendingImages, search_for, searches_for
from engine.captions import Caption
from engine.errors import BackendError, ImageError
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote
from engine.options import DecodeOptions
from engine.runtime import Runtime
from engine.workers.child import Child
from engine.workers.messages import Answer, WorkOrder, unpack_answer
from engine.workers.resources import WorkerResources

REFILL = 8
"""A worker gets more images once 1 / REFILL of those it can hold are answered: more at a time are fewer messages."""
TRIALS = 64
"""Maximum number of groups in which a dead worker's images are retried: up to so many are retried one by one."""


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


Log = Callable[[str], None]

EXIT_S = 1.0
"""Seconds for a process that has closed its output to end by itself; killed earlier it would lose its exit code."""
MOST_DEATHS = 5
"""Deaths of a worker in a row, without an image answered in between, after which it is not replaced any more."""


@contextmanager
def open_processes(
    place: BundleRef,
    requested: DecodeOptions,
    rows: int | None,
    runtime: Runtime,
    team: Sequence[WorkerResources],
    log: Log,
) -> Iterator[ProcessSource]:
    """Check bundle and options before any process starts, and log how many there will be.

    All processes have ended when the context is left.
    """
    bundle = place.open()
    search_for(bundle, tokenizer := CaptionTokenizer(bundle), requested)
    log(describe(team))
    order = WorkOrder(
        bundle=place.local(bundle),
        digest=bundle.digest,
        environment=environment(runtime.backend),
        runtime=runtime,
        peers=len(team),
        rows=rows,
    )
    source = ProcessSource(bundle, tokenizer, order, team)
    try:
        yield source
    finally:
        source.end()


def describe(team: Sequence[WorkerResources]) -> str:
    """Describe the workers, such as `2 worker processes on cuda:0, cuda:1`."""
    who = f"{len(team)} worker processes" if len(team) > 1 else "a worker process"
    if all(resources.device for resources in team):
        return f"{who} on {', '.join(resources.device for resources in team)}"
    return f"{who} with {sum(resources.threads for resources in team)} threads in all"


class ProcessSource:
    """Captions made by worker processes, which start when `captions` is called; see Source."""

    def __init__(
        self, bundle: Bundle, tokenizer: CaptionTokenizer, order: WorkOrder, team: Sequence[WorkerResources]
    ) -> None:
        self.bundle = bundle
        self._tokenizer = tokenizer
        self.backend_name = order.runtime.backend
        self.environment = order.environment
        self.notes: list[ImageNote] = []
        self._order, self._team = order, team
        self._children: dict[int, Child] = {}
        self._deaths: Counter[int] = Counter()
        self._events: SimpleQueue[tuple[Child, bytes]]

    def resolve(self, requested: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        options = requested.over(self.bundle.generation)
        searches_for(self.bundle, self._tokenizer, options, prompts)
        return options

    def captions(self, options: DecodeOptions, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """See Source. An image that kills its worker even when it is alone is reported as unreadable."""
        images = list(pending.remaining())
        numbers = range(min(len(self._team), len(images)))
        self._order = replace(self._order, options=options, prompts=pending.prompts, peers=len(numbers))
        self._events = SimpleQueue()
        queue = WorkQueue(images, len(numbers))
        for number in numbers:
            self._start(number)
        while queue.unanswered:
            child, line = self._events.get()
            if line:
                answer = unpack_answer(line.decode("ascii"))
                self._process(child, answer, queue, pending, log)
                self._give(child, queue)
                yield from answer.captions
            else:
                self._replace(child, queue, pending, log)
                # idle workers send no messages, so that nothing else would give them the images of the dead one
                for other in self._children.values():
                    self._give(other, queue)
        self.end()

    def end(self) -> None:
        """Stop all workers and discard their results."""
        while self._children:
            self._children.popitem()[1].end()

    def _start(self, number: int) -> None:
        resources = self._team[number]
        order = replace(self._order, runtime=replace(self._order.runtime, threads=resources.threads))
        self._children[number] = Child(number, resources, order, self._events)

    def _process(self, child: Child, answer: Answer, queue: WorkQueue, pending: PendingImages, log: Log) -> None:
        child.wants = answer.wants or child.wants
        self.notes += answer.image_notes
        if answer.note:
            log(answer.note)
        for name, reason in answer.failures.items():
            pending.fail(ImageError(str(queue.answer(child.number, name).source), reason))
        for caption in answer.captions:
            queue.answer(child.number, caption.id)
        if answer.captions or answer.failures:
            del self._deaths[child.number]

    def _give(self, child: Child, queue: WorkQueue) -> None:
        if child.wants and (images := queue.give(child.number, child.wants)):
            child.submit(images)

    def _replace(self, child: Child, queue: WorkQueue, pending: PendingImages, log: Log) -> None:
        """Replace a dead worker, unless it dies repeatedly. Raises BackendError if no worker is left."""
        number = child.number
        del self._children[number]
        how = child.end(patience_s=EXIT_S)
        retried, given_up = queue.died(number)
        if given_up is not None:
            pending.fail(ImageError(str(given_up.source), f"its worker process died each time ({how})"))
        retry = f": its {len(retried)} images are retried" if retried else ""
        log(f"worker process {child.pid} died ({how}){retry if given_up is None else f' at {given_up.source}'}")
        if not queue.unanswered:
            return
        self._deaths[number] += 1
        if self._deaths[number] < MOST_DEATHS:
            self._start(number)
            return
        queue.workers -= 1
        if not queue.workers:
            raise BackendError(
                f"no worker process is left, the last one died {MOST_DEATHS} times in a row ({how}): if memory is "
                "short, lower --processes or --rows"
            )
        log(f"it died {MOST_DEATHS} times in a row: continuing with {queue.workers} worker processes")
