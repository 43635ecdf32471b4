"""Worker processes on one machine: hands out images, replaces dead workers, retries their images alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

from engine.bundle.manifest import Bundle
from engine.bundle.open import BundlePlace, open_place, where_read
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
"""A worker is asked for more once this part of what it wants is answered: fewer messages."""
TRIALS = 64
"""Groups in which a dead worker's images are tried again: up to so many images are tried one by one."""


class WorkQueue:
    """The images of a run, each waiting, held by one of `workers` workers, or answered.

    Of the images that a dead worker held nobody knows which one killed it, if any did. They are tried again last, in
    small groups, each alone with one worker; if that dies, too, the group is divided, and a single image is given up.
    """

    def __init__(self, images: Sequence[ImageFile], workers: int) -> None:
        self.workers = workers
        self._waiting = deque(images)
        self._suspects: deque[list[ImageFile]] = deque()
        self._held: dict[int, dict[str, ImageFile]] = {}
        self._on_trial: set[int] = set()
        self.unanswered = len(images)

    def give(self, worker: int, wants: int) -> list[ImageFile]:
        """Return more images for a worker that wants to hold `wants` of them, often none."""
        held = self._held.setdefault(worker, {})
        if held and worker in self._on_trial:
            return []
        self._on_trial.discard(worker)
        given = self._next_waiting(len(held), wants)
        if not given and not held and self._suspects:
            given = self._suspects.popleft()
            self._on_trial.add(worker)
        held.update((image.id, image) for image in given)
        return given

    def _next_waiting(self, held: int, wants: int) -> list[ImageFile]:
        in_work = self.unanswered - sum(map(len, self._suspects))
        fair = -(-in_work // self.workers)  # a small run is for all workers, not for the first that is ready
        room = min(wants, fair) - held
        waiting = len(self._waiting)
        if room < max(1, min(wants // REFILL, -(-waiting // self.workers))):
            return []
        return [self._waiting.popleft() for _ in range(min(room, waiting))]

    def answer(self, worker: int, image_id: str) -> ImageFile:
        """Note that a worker has answered an image, which is returned."""
        self.unanswered -= 1
        return self._held[worker].pop(image_id)

    def died(self, worker: int) -> tuple[list[ImageFile], ImageFile | None]:
        """Take the images of a dead worker back; return those to be tried again, and the one that is given up."""
        held = list(self._held.pop(worker, {}).values())
        if worker in self._on_trial and len(held) == 1:
            self.unanswered -= 1
            return [], held[0]
        size = -(-len(held) // TRIALS)
        self._suspects += [held[start : start + size] for start in range(0, len(held), size or 1)]
        return held, None


Log = Callable[[str], None]

EXIT_S = 1.0
"""Seconds for a process that has closed its output to end by itself, so that its exit code is its own."""
MOST_DEATHS = 5
"""Times a worker may die one after another, without an image answered between, before it is not replaced any more."""


@contextmanager
def open_processes(
    place: BundlePlace | None,
    asked: DecodeOptions,
    rows: int | None,
    runtime: Runtime,
    shares: Sequence[WorkerResources],
    log: Log,
) -> Iterator[ProcessSource]:
    """Check bundle and options, which processes start for only then; `log` gets how many there will be. All of them
    have ended when this is left.
    """
    bundle = open_place(place)
    search_for(bundle, tokenizer := CaptionTokenizer(bundle), asked)
    log(describe(shares))
    order = WorkOrder(
        bundle=where_read(place, bundle),
        digest=bundle.digest,
        environment=environment(runtime.backend),
        runtime=runtime,
        peers=len(shares),
        rows=rows,
    )
    source = ProcessSource(bundle, tokenizer, order, shares)
    try:
        yield source
    finally:
        source.end()


def describe(shares: Sequence[WorkerResources]) -> str:
    """Return in words who will work."""
    who = f"{len(shares)} worker processes" if len(shares) > 1 else "a worker process"
    if all(share.device for share in shares):
        return f"{who} on {', '.join(share.device for share in shares)}"
    return f"{who} with {sum(share.threads for share in shares)} threads in all"


class ProcessSource:
    """Worker processes, started when captions are asked for."""

    def __init__(
        self, bundle: Bundle, tokenizer: CaptionTokenizer, order: WorkOrder, shares: Sequence[WorkerResources]
    ) -> None:
        self.bundle = bundle
        self._tokenizer = tokenizer
        self.backend_name = order.runtime.backend
        self.environment = order.environment
        self.notes: list[ImageNote] = []
        self._order, self._shares = order, shares
        self._children: dict[int, Child] = {}
        self._deaths: Counter[int] = Counter()
        self._events: SimpleQueue[tuple[Child, bytes]]

    def resolve(self, asked: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        options = asked.over(self.bundle.generation)
        searches_for(self.bundle, self._tokenizer, options, prompts)
        return options

    def captions(self, options: DecodeOptions, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """See Source. An image that its worker dies of, alone, too, is one that cannot be read."""
        images = list(pending.remaining())
        places = range(min(len(self._shares), len(images)))
        self._order = replace(self._order, options=options, prompts=pending.prompts, peers=len(places))
        self._events = SimpleQueue()
        queue = WorkQueue(images, len(places))
        for place in places:
            self._start(place)
        while queue.unanswered:
            child, line = self._events.get()
            if line:
                answer = unpack_answer(line.decode("ascii"))
                self._take_in(child, answer, queue, pending, log)
                self._give(child, queue)
                yield from answer.captions
            else:
                self._replace(child, queue, pending, log)
                for other in self._children.values():  # what it held may be for others, which wait for nothing else
                    self._give(other, queue)
        self.end()

    def end(self) -> None:
        """Kill all workers: what they still do is for nobody."""
        while self._children:
            self._children.popitem()[1].end()

    def _start(self, place: int) -> None:
        share = self._shares[place]
        order = replace(self._order, runtime=replace(self._order.runtime, threads=share.threads))
        self._children[place] = Child(place, share, order, self._events)

    def _take_in(self, child: Child, answer: Answer, queue: WorkQueue, pending: PendingImages, log: Log) -> None:
        child.wants = answer.wants or child.wants
        self.notes += answer.image_notes
        if answer.note:
            log(answer.note)
        for name, reason in answer.failures.items():
            pending.fail(ImageError(str(queue.answer(child.place, name).source), reason))
        for caption in answer.captions:
            queue.answer(child.place, caption.id)
        if answer.captions or answer.failures:
            del self._deaths[child.place]

    def _give(self, child: Child, queue: WorkQueue) -> None:
        if child.wants and (images := queue.give(child.place, child.wants)):
            child.ask(images)

    def _replace(self, child: Child, queue: WorkQueue, pending: PendingImages, log: Log) -> None:
        """Bury a worker and start another in its place. Raises BackendError when none is left."""
        place = child.place
        del self._children[place]
        how = child.end(patience_s=EXIT_S)
        again, given_up = queue.died(place)
        if given_up is not None:
            pending.fail(ImageError(str(given_up.source), f"the process that was to caption it died each time ({how})"))
        held = f": its {len(again)} images are done again" if again else ""
        log(f"worker process {child.pid} died ({how}){held if given_up is None else f' of {given_up.source}'}")
        if not queue.unanswered:
            return
        self._deaths[place] += 1
        if self._deaths[place] < MOST_DEATHS:
            self._start(place)
            return
        queue.workers -= 1
        if not queue.workers:
            raise BackendError(
                f"no worker process lives, the last ones died {MOST_DEATHS} times in a row ({how}): is memory short? "
                "Fewer --processes or --rows need less"
            )
        log(f"it died {MOST_DEATHS} times in a row: going on with {queue.workers} worker processes")
