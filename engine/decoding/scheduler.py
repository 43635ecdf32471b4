"""The scheduler owns the slots: it keeps them filled while images wait, and hands out captions as they close.

Beam search is exact for each image alone, so an image leaves at the very step Hugging Face's rule closes it and another
takes its slot. Knows nothing of files, pixels' origin or text.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.decoding.ancestry import Ancestry
from engine.decoding.backend import Backend, Encoded, StepInputs
from engine.decoding.beam import Beams, Hypothesis, Search, Start
from engine.decoding.device import DeviceQueue, Later
from engine.decoding.sampling import draw, generator

Key = TypeVar("Key")

SETTLE_EVERY = 8
"""Steps after which recent keys and values are folded into the settled ones (fewer copies of growing tensors)."""
PULL_AT_MOST = 4
"""Times encode_batch of images that are taken for one batch, where many need no decoding."""
SHRINK_SHARE = 0.25
"""Share of empty slots from which, with no image waiting, they are given up."""


class NothingYet:
    """Stands among the images for one that has not arrived: what is there is decoded meanwhile."""


NOTHING_YET = NothingYet()


class Waiting(NamedTuple, Generic[Key]):
    """An image to decode: whatever names it, pixels u8[height,width,3], and its own start (the search's where None)."""

    key: Key
    pixels: NDArray[np.uint8]
    start: Start | None = None


Arrival: TypeAlias = Waiting[Key] | NothingYet | None


class Scheduler:
    """Decodes any number of images with one search, in sets of `num_slots` slots.

    With several sets the device works on one of them while beams are chosen for another. Each set belongs to a backend,
    in turn where there are several.
    """

    def __init__(
        self,
        backend: Backend,
        search: Search,
        *,
        num_slots: int,
        encode_batch: int = 4,
        num_sets: int = 1,
        more_backends: Sequence[Backend] = (),
    ) -> None:
        self.backends = (backend, *more_backends)
        self.search = search
        self.num_slots = num_slots
        self.encode_batch = encode_batch
        self.num_sets = num_sets

    @property
    def side_by_side(self) -> int:
        """Images that are decoded at a time."""
        return self.num_sets * self.num_slots

    def run(self, images: Iterable[tuple[Key, NDArray[np.uint8]]]) -> Iterator[tuple[Key, list[Hypothesis]]]:
        """Caption (key, pixels u8[height,width,3]) pairs; yield (key, hypotheses) of each the moment it closes."""
        for closed in self.steps(Waiting(key, pixels) for key, pixels in images):
            yield from closed

    def steps(self, images: Iterable[Arrival[Key]]) -> Iterator[list[tuple[Key, list[Hypothesis]]]]:
        """Like `run`, but yield after every step what closed in it, often nothing.

        None among the images is one that needs no decoding: after many of these the caller gets its turn, too. After
        NOTHING_YET it gets its turn at once; the images must not yield it while none of theirs is being decoded.
        """
        captions = _CopiesOfImage[Key](self.search)
        with ExitStack() as held:
            devices = [
                held.enter_context(DeviceQueue(backend, in_thread=self.num_sets > 1)) for backend in self.backends
            ]
            newcomers = _Newcomers(iter(images), self.encode_batch, copies=captions.copies)
            sets: list[_Slots[Key]] = []
            while newcomers.may_come or any(slots.owners for slots in sets):
                if newcomers.may_come and len(sets) < self.num_sets:  # a small run needs no second set
                    sets.append(_Slots(devices[len(sets) % len(devices)], self.search, self.num_slots))
                for slots in sets:
                    closed = slots.finish_step()
                    yield [found for owner, hypotheses in closed for found in captions.add(*owner, hypotheses)]
                    slots.fill(newcomers)
                    slots.begin_step()

    def decode(self, pixel_values: NDArray[np.uint8]) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Caption images u8[N,height,width,3]; yield (index, hypotheses) as they close."""
        return self.run(enumerate(pixel_values))


class _Newcomer(NamedTuple, Generic[Key]):
    """One copy of an image: its owner (key and number of the copy), start, batch, and place in the batch."""

    owner: tuple[Key, int]
    start: Start | None
    encoded: Later[Encoded]
    place: int


class _Newcomers(Generic[Key]):
    """Images that wait for a slot, encoded in batches as they are asked for; `may_come` until there are no more."""

    def __init__(self, images: Iterator[Arrival[Key]], encode_batch: int, *, copies: int) -> None:
        self._images, self._encode_batch, self._copies = images, encode_batch, copies
        self._waiting: deque[_Newcomer[Key]] = deque()
        self.may_come = True

    def next(self, device: DeviceQueue) -> _Newcomer[Key] | None:
        """Return the next image, as part of a batch that `device` encodes.

        Each image comes as often as captions of it are drawn. None means there are no more, or many needed no decoding,
        or the next has not arrived.
        """
        if not self._waiting:
            pulled = self._pull()
            self.may_come = bool(pulled)
            batch = [image for image in pulled if isinstance(image, Waiting)]
            if not batch:
                return None
            encoded = device.encode(np.stack([image.pixels for image in batch]))
            for place, image in enumerate(batch):
                owners = ((image.key, copy) for copy in range(self._copies))
                self._waiting += [_Newcomer(owner, image.start, encoded, place) for owner in owners]
        return self._waiting.popleft()

    def _pull(self) -> list[Arrival[Key]]:
        """Take images until encode_batch of them have to be decoded, but no more than PULL_AT_MOST times as many."""
        pulled: list[Arrival[Key]] = []
        missing = self._encode_batch
        for image in itertools.islice(self._images, PULL_AT_MOST * self._encode_batch):
            pulled.append(image)
            missing -= isinstance(image, Waiting)
            if not missing or image is NOTHING_YET:
                break
        return pulled


class _CopiesOfImage(Generic[Key]):
    """Collects what an image's slots say: one of them as it is, several drawn captions by score."""

    def __init__(self, search: Search) -> None:
        self.copies = search.sampling.copies if search.sampling else 1
        self._found: dict[Key, list[tuple[int, Hypothesis]]] = {}

    def add(self, key: Key, copy: int, hypotheses: list[Hypothesis]) -> Iterator[tuple[Key, list[Hypothesis]]]:
        """Take in one slot's hypotheses; yield the image's when they are all there."""
        if self.copies == 1:
            yield key, hypotheses
            return
        found = self._found.setdefault(key, [])
        found.append((copy, hypotheses[0]))
        if len(found) == self.copies:
            del self._found[key]
            yield key, [one for _, one in sorted(found, key=lambda entry: (-entry[1].score, entry[0]))]


class _Slots(Generic[Key]):
    """Beams, ancestry and caches of B slots, moving in step; `owners` are the images in them, and which copy.

    `prompt_fed` i64[B] counts the prompt tokens each slot has fed. A newcomer's prompt rides along in its own slot, K
    tokens a step, so that prefill needs no pass of its own.
    """

    def __init__(self, device: DeviceQueue, search: Search, num_slots: int) -> None:
        self.device = device
        self.search = search
        self.owners: dict[int, tuple[Key, int]] = {}
        self.cache = device.allocate(num_slots)
        self.beams = Beams(search, num_slots)
        self.ancestry = Ancestry(num_slots, search.num_beams)
        self.prompt_fed = np.zeros(num_slots, np.int64)
        self.generators: list[np.random.Generator | None] = [None] * num_slots
        self.steps_since_settled = 0
        self._begun: tuple[StepInputs, Later[tuple[NDArray[np.float32], NDArray[np.int64]]]] | None = None

    def fill(self, newcomers: _Newcomers[Key]) -> None:
        """Put newcomers into the empty slots; give slots up where none will come any more."""
        filled, starts = [], []
        for slot in np.flatnonzero(self.beams.closed).tolist() if newcomers.may_come else ():
            newcomer = newcomers.next(self.device)
            if newcomer is None:
                break
            self.owners[slot] = newcomer.owner
            self.device.admit(self.cache, slot, newcomer.encoded, newcomer.place)  # before the next batch is encoded
            if self.search.sampling is not None:  # a caption that is drawn has a random generator of its own
                self.generators[slot] = generator(self.search.sampling.seed, *newcomer.owner)
            filled.append(slot)
            starts.append(newcomer.start or self.search.start)
        if filled:
            self.beams.start(np.array(filled), starts)
            self.ancestry.reset(np.array(filled))
            self.prompt_fed[filled] = 0
        if not newcomers.may_come:
            self._shrink()

    def _shrink(self) -> None:
        """Give up empty slots when they are many; the others may get new numbers."""
        occupied = np.flatnonzero(~self.beams.closed)
        count = len(occupied)
        if not count or count > (1 - SHRINK_SHARE) * len(self.prompt_fed):
            return
        keep = np.arange(count)
        keep[self.beams.closed[:count]] = occupied[occupied >= count]  # holes are filled from behind, the rest stays
        self._regroup(keep)
        self.owners = {new: self.owners[old] for new, old in enumerate(keep.tolist())}

    def begin_step(self) -> None:
        """Feed every slot once, where any holds an image."""
        if not self.owners:
            return
        if self.steps_since_settled == SETTLE_EVERY:
            self._regroup(np.arange(len(self.prompt_fed)))
        inputs = self._inputs(self._prefilling())
        self._begun = inputs, self.device.step(self.cache, inputs)

    def finish_step(self) -> list[tuple[tuple[Key, int], list[Hypothesis]]]:
        """Wait for the step that was begun and advance the beams; return owner and hypotheses of images that closed."""
        if self._begun is None:
            return []
        (inputs, later), self._begun = self._begun, None
        scores, ids = later.wait()
        if self.search.sampling is not None:
            scores, ids = self._draw(scores, ids)
        self.steps_since_settled += 1
        prefilling = self._prefilling()
        more_prompt = self._feed_prompt(prefilling)
        rows, tokens = np.divmod(ids, self.search.vocab_size)
        parents = rows.copy()
        parents[prefilling] = 0  # every row of a prompt belongs to beam 0
        was_closed = self.beams.closed.copy()
        chosen = self.beams.advance(scores, parents, tokens, ~more_prompt)
        parent_rows = rows[np.arange(len(rows))[:, None], chosen]
        parent_rows[more_prompt] = self.search.num_beams - 1  # the last prompt token fed, which saw all the others
        self.ancestry.choose(inputs.ancestry, parent_rows)
        closed = np.flatnonzero(self.beams.closed & ~was_closed).tolist()
        return [(self.owners.pop(slot), self.beams.results(slot)) for slot in closed]

    def _prefilling(self) -> NDArray[np.bool_]:
        """Return bool[B]: which slots have more of the prompt to feed."""
        return (self.prompt_fed < self.beams.prompt_lengths) & ~self.beams.closed

    def _feed_prompt(self, prefilling: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Count K prompt tokens as fed in bool[B] `prefilling` slots; return those with more of the prompt to feed."""
        fed = self.prompt_fed + np.where(prefilling, self.search.num_beams, 0)
        self.prompt_fed = fed
        return prefilling & (fed < self.beams.prompt_lengths)

    def _draw(
        self, scores: NDArray[np.float32], ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Leave one candidate a slot, drawn among f32[B,C] and i64[B,C]; slots that are empty or in a prompt take
        any.
        """
        assert self.search.sampling is not None
        drawing = ~self.beams.closed & (self.prompt_fed + 1 >= self.beams.prompt_lengths)
        chosen = np.zeros(len(scores), np.int64)
        uniform = np.array([self.generators[slot].random() for slot in np.flatnonzero(drawing)])  # type: ignore[union-attr]
        # scores are sums along the caption: the difference to the likeliest word is all that counts
        chosen[drawing] = draw(scores[drawing] - scores[drawing, :1], uniform, self.search.sampling)
        return np.take_along_axis(scores, chosen[:, None], 1), np.take_along_axis(ids, chosen[:, None], 1)

    def _regroup(self, keep: NDArray[np.int64]) -> None:
        self.ancestry.reset(np.flatnonzero(self.beams.closed))  # empty slots are fed, too, and need none of it
        self.device.regroup(self.cache, keep, self.ancestry.compact(keep))
        if len(keep) < len(self.prompt_fed):
            self.beams.keep(keep)
            self.prompt_fed = self.prompt_fed[keep]
            self.generators = [self.generators[slot] for slot in keep]
        self.steps_since_settled = 0

    def _inputs(self, prefilling: NDArray[np.bool_]) -> StepInputs:
        """Feed the last token of every beam, or the next K tokens of the prompt; empty slots are fed for nothing."""
        beams, num_beams = self.beams, self.search.num_beams
        input_ids = beams.last_tokens()
        positions = np.repeat(beams.lengths[:, None] - 1, num_beams, 1)
        scores = beams.scores.copy()
        scores[beams.closed] = -np.inf
        own_tokens = np.broadcast_to(np.eye(num_beams, dtype=bool), (len(input_ids), num_beams, num_beams))
        slots = np.flatnonzero(prefilling)
        if len(slots):
            own_tokens = own_tokens.copy()
            last = beams.prompt_lengths[slots, None] - 1
            at = self.prompt_fed[slots, None] + np.arange(num_beams)
            positions[slots] = fed = np.minimum(at, last)
            input_ids[slots] = beams.tokens[slots[:, None], 0, fed]
            scores[slots] = np.where(at == last, np.float32(0), np.float32(-np.inf))
            own_tokens[slots] |= np.tri(num_beams, dtype=bool) & (at <= last)[:, :, None]
        return StepInputs(
            input_ids=input_ids,
            positions=positions,
            scores=scores,
            marked_ids=beams.marked_ids(),
            penalties=self.search.penalties,
            ancestry=self.ancestry.feed(own_tokens),
            num_candidates=self.search.num_candidates,
        )
