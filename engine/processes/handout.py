"""Which worker gets which image, and what becomes of the images of a worker that has died; knows no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from engine.inputs.images import ImageFile

REFILL = 8
"""A worker is asked for more once this part of what it wants is answered: fewer messages."""
TRIALS = 64
"""Groups in which a dead worker's images are tried again: up to so many images are tried one by one."""


class HandOut:
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
