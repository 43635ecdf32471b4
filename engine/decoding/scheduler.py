"""The beam loop, with continuous batching: each turn ends a step of all slots on the device, advances their beams
(beam.py), yields the images that close, and fills their slots with waiting images.

Images in a batch never influence each other, so an image leaves at the very step at which Hugging Face's rule closes
it, and the next image takes its slot. `generate` instead runs every image of a batch until the last one is finished.
This module does not depend on files, on text or on where pixels come from.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.decoding.ancestry import Ancestry
from engine.decoding.backend import Backend, Encoded, StepInputs
from engine.decoding.beam import Beams, Hypothesis, Search, Start
from engine.decoding.device import DeviceQueue, Future, StepResult
from engine.decoding.processors import draw, generator

Key = TypeVar("Key")

SETTLE_EVERY = 8
"""Steps between two folds of the recent block of the KV cache into the large one. A step copies only the recent block,
a fold copies both: more steps mean fewer folds and a larger recent block.
"""
PULL_AT_MOST = 4
"""At most this many times encode_batch images are taken from the source for one batch; many may need no decoding."""
SHRINK_SHARE = 0.25
"""Share of empty slots from which they are removed, when no image waits. Lower, and the caches are copied too often."""


class NothingYet:
    """Stands for an image that has not arrived yet; the images that are there are decoded meanwhile."""


NOTHING_YET = NothingYet()


class Request(NamedTuple, Generic[Key]):
    """An image to decode: the caller's key, pixels u8[height,width,3], and its Start (None: the search's)."""

    key: Key
    pixels: NDArray[np.uint8]
    start: Start | None = None


Arrival: TypeAlias = Request[Key] | NothingYet | None


class Scheduler:
    """Decodes any number of images with one search, in sets of `num_slots` slots.

    With several sets the device works on one while the host chooses beams for another. Sets are assigned to the
    backends in turn. The set whose step is done first continues first, so that no backend waits for another.
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
        with_attention: bool = False,
    ) -> None:
        """With `with_attention`, the backends must be an AttentionBackend that is prepared for it."""
        self.backends = (backend, *more_backends)
        self.search = search
        self.num_slots = num_slots
        self.encode_batch = encode_batch
        self.num_sets = num_sets
        self.with_attention = with_attention

    @property
    def concurrency(self) -> int:
        """Number of images decoded in parallel."""
        return self.num_sets * self.num_slots

    def run(self, images: Iterable[tuple[Key, NDArray[np.uint8]]]) -> Iterator[tuple[Key, list[Hypothesis]]]:
        """Caption (key, pixels u8[height,width,3]) pairs; yield (key, hypotheses) as each image closes."""
        for closed in self.steps(Request(key, pixels) for key, pixels in images):
            yield from closed

    def steps(self, images: Iterable[Arrival[Key]]) -> Iterator[list[tuple[Key, list[Hypothesis]]]]:
        """Like `run`, but yield the list of images that closed, often empty, after every step.

        None among the images stands for one that needs no decoding. After PULL_AT_MOST batches of these control returns
        to the caller, who may have results of its own to write. After NOTHING_YET it returns at once; the images must
        not yield it while none of theirs is being decoded.
        """
        captions = _CopiesOfImage[Key](self.search)
        with ExitStack() as held:
            devices = [
                held.enter_context(DeviceQueue(backend, in_thread=self.num_sets > 1)) for backend in self.backends
            ]
            queue = _RequestQueue(iter(images), self.encode_batch, copies=captions.copies)
            sets: list[_Slots[Key]] = []
            done: SimpleQueue[int] = SimpleQueue()  # the sets whose step can be finished without waiting
            while queue.may_come or any(slots.owners for slots in sets):
                turn = [slots for slots in sets if not slots.is_stepping]
                if queue.may_come and len(sets) < self.num_sets:
                    # one for each backend; a small run never opens a second set of a backend
                    for device in devices[: self.num_sets - len(sets)]:
                        on_done = partial(done.put, len(sets))
                        slots: _Slots[Key] = _Slots(
                            device, self.search, self.num_slots, on_done, with_attention=self.with_attention
                        )
                        sets.append(slots)
                        turn.append(slots)
                elif len(turn) < len(sets):
                    turn.append(sets[done.get()])
                for slots in turn:
                    closed = slots.finish_step()
                    # yielded even when empty: a caller with results of its own must get control at every step
                    yield [found for owner, hypotheses in closed for found in captions.add(*owner, hypotheses)]
                self._fill(turn, queue)
                for slots in turn:
                    slots.begin_step()
            # several sets may have taken the last images, none of which needs decoding, without a yield in between
            yield []

    def _fill(self, turn: Sequence[_Slots[Key]], queue: _RequestQueue[Key]) -> None:
        """Fill the empty slots of the sets `turn`, of several one batch at a time.

        Otherwise the first set would take all images of a small run, and the other backends would have none.
        """
        if len(turn) == 1:
            turn[0].fill(queue)
            return
        hungry = deque(turn)
        queue.is_paused = False
        while hungry and not queue.is_paused:  # after NOTHING_YET the caller must get control before another image
            slots = hungry.popleft()
            if slots.fill(queue, self.encode_batch):
                slots.device.start()  # encodes while the host reads the next images
                hungry.append(slots)

    def decode(self, pixel_values: NDArray[np.uint8]) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Caption images u8[N,height,width,3]; yield (index, hypotheses) as they close."""
        return self.run(enumerate(pixel_values))


class _QueuedRequest(NamedTuple, Generic[Key]):
    """A queued request, one per copy of an image: owner (key and copy number), Start, encoded batch, position in it."""

    owner: tuple[Key, int]
    start: Start | None
    encoded: Future[Encoded]
    position: int


class _RequestQueue(Generic[Key]):
    """Requests that wait for a slot, encoded in batches on demand by the device that wants one.

    `may_come` is false once the source is exhausted and no request waits. `is_paused` is set when the source yields
    NOTHING_YET.
    """

    def __init__(self, images: Iterator[Arrival[Key]], encode_batch: int, *, copies: int) -> None:
        self._images, self._encode_batch, self._copies = images, encode_batch, copies
        self._waiting: dict[DeviceQueue, deque[_QueuedRequest[Key]]] = {}
        self._is_exhausted = self.is_paused = False

    @property
    def may_come(self) -> bool:
        """Whether there may be another request."""
        return not self._is_exhausted or any(self._waiting.values())

    def next(self, device: DeviceQueue) -> _QueuedRequest[Key] | None:
        """Return the next request; `device` encodes its batch if necessary.

        With sampling each image is returned once per caption to draw. None means that the source is exhausted, that
        many images in a row need no decoding, or that the next image has not arrived.
        """
        waiting = self._waiting.setdefault(device, deque())
        if not waiting:
            pulled = self._pull()
            self._is_exhausted = not pulled
            batch = [image for image in pulled if isinstance(image, Request)]
            if not batch:
                # what another device has encoded, but has no slot for
                return next((others.popleft() for others in self._waiting.values() if others), None)
            encoded = device.encode(np.stack([image.pixels for image in batch]))
            for position, image in enumerate(batch):
                owners = ((image.key, copy) for copy in range(self._copies))
                waiting += [_QueuedRequest(owner, image.start, encoded, position) for owner in owners]
        return waiting.popleft()

    def _pull(self) -> list[Arrival[Key]]:
        """Take images until encode_batch of them need decoding, but at most PULL_AT_MOST times as many."""
        pulled: list[Arrival[Key]] = []
        missing = self._encode_batch
        for image in itertools.islice(self._images, PULL_AT_MOST * self._encode_batch):
            pulled.append(image)
            missing -= isinstance(image, Request)
            self.is_paused = image is NOTHING_YET
            if not missing or self.is_paused:
                break
        return pulled


class _CopiesOfImage(Generic[Key]):
    """Collects the results of an image's slots: one slot's as they are, several drawn captions sorted by score."""

    def __init__(self, search: Search) -> None:
        self.copies = search.sampling.copies if search.sampling else 1
        self._found: dict[Key, list[tuple[int, Hypothesis]]] = {}

    def add(self, key: Key, copy: int, hypotheses: list[Hypothesis]) -> Iterator[tuple[Key, list[Hypothesis]]]:
        """Add the hypotheses of one slot; yield those of the image once all its copies are finished."""
        if self.copies == 1:
            yield key, hypotheses
            return
        found = self._found.setdefault(key, [])
        found.append((copy, hypotheses[0]))
        if len(found) == self.copies:
            del self._found[key]
            yield key, [one for _, one in sorted(found, key=lambda entry: (-entry[1].score, entry[0]))]


class _Slots(Generic[Key]):
    """Beams, ancestry mask and KV cache of B slots that advance together; `owners` maps a slot to its image and copy.

    `prompt_fed` i64[B] counts the prompt tokens that each slot has fed. The prompt of a new image is fed in its own
    slot, K tokens per step, while the other slots decode: prefill needs no separate pass.
    """

    def __init__(
        self,
        device: DeviceQueue,
        search: Search,
        num_slots: int,
        on_done: Callable[[], None] | None = None,
        *,
        with_attention: bool = False,
    ) -> None:
        """Allocate the slots. `on_done` is called after each step on the device."""
        self.device = device
        self._on_done = on_done
        self.search = search
        self.owners: dict[int, tuple[Key, int]] = {}
        self.cache = device.allocate(num_slots)
        self.beams = Beams(search, num_slots, keeps_rows=with_attention)
        self._with_attention = with_attention
        self._attention: NDArray[np.float32] | None = None
        """f32[B,max_length,K,S]: the attention of the token that each row was fed at each position; None at first."""
        self.ancestry = Ancestry(num_slots, search.num_beams)
        self.prompt_fed = np.zeros(num_slots, np.int64)
        self.generators: list[np.random.Generator | None] = [None] * num_slots
        self.steps_since_settled = 0
        self._begun: tuple[StepInputs, Future[StepResult]] | None = None

    @property
    def is_stepping(self) -> bool:
        """Whether a step was begun and not finished."""
        return self._begun is not None

    def fill(self, queue: _RequestQueue[Key], at_most: int | None = None) -> int:
        """Fill empty slots with waiting images; remove empty slots when the source is exhausted.

        Returns the number of slots that were filled, at most `at_most` (None: all).
        """
        filled, starts = [], []
        for slot in np.flatnonzero(self.beams.closed)[:at_most].tolist() if queue.may_come else ():
            request = queue.next(self.device)
            if request is None:
                break
            self.owners[slot] = request.owner
            # at once, because `encoded` is valid only until the next batch is encoded
            self.device.admit(self.cache, slot, request.encoded, request.position)
            if self.search.sampling is not None:  # each drawn caption has its own random generator
                self.generators[slot] = generator(self.search.sampling.seed, *request.owner)
            filled.append(slot)
            starts.append(request.start or self.search.start)
        if filled:
            # all at once: numpy's overhead per call would otherwise be paid for each new image
            self.beams.start(np.array(filled), starts)
            self.ancestry.reset(np.array(filled))
            self.prompt_fed[filled] = 0
        if not queue.may_come:
            self._shrink()
        return len(filled)

    def _shrink(self) -> None:
        """Remove empty slots when they are many; images may move to another slot."""
        occupied = np.flatnonzero(~self.beams.closed)
        count = len(occupied)
        if not count or count > (1 - SHRINK_SHARE) * len(self.prompt_fed):
            return
        keep = np.arange(count)
        keep[self.beams.closed[:count]] = occupied[occupied >= count]  # only the last images move
        self._regroup(keep)
        self.owners = {new: self.owners[old] for new, old in enumerate(keep.tolist())}

    def begin_step(self) -> None:
        """Start a step of all slots, if any of them holds an image."""
        if not self.owners:
            return
        # before the step, not after it: images that closed in between leave no positions to fold
        if self.steps_since_settled == SETTLE_EVERY:
            self._regroup(np.arange(len(self.prompt_fed)))
        inputs = self._inputs(self._prefilling())
        step = self.device.step(self.cache, inputs, self._on_done, with_attention=self._with_attention)
        self._begun = inputs, step

    def finish_step(self) -> list[tuple[tuple[Key, int], list[Hypothesis]]]:
        """Wait for the step in progress and advance the beams; return (owner, hypotheses) of the images that closed."""
        if self._begun is None:
            return []
        (inputs, future), self._begun = self._begun, None
        scores, ids, attention = future.wait()
        if self.search.sampling is not None:
            scores, ids = self._draw(scores, ids)
        self.steps_since_settled += 1
        # slots are filled only after this, so the state here is still the one that the step's inputs were made of
        prefilling = self._prefilling()
        if attention is not None:
            self._keep_attention(inputs.positions, attention, prefilling)
        more_prompt = self._feed_prompt(prefilling)
        rows, tokens = np.divmod(ids, self.search.vocab_size)
        if self.search.is_forcing:
            scores, rows, tokens = self.beams.forced(scores, rows, tokens)
        parents = rows.copy()
        parents[prefilling] = 0  # the rows of a prompt are tokens of beam 0, not beams
        was_closed = self.beams.closed.copy()
        # slots with prompt left to feed stand still: their candidates continue a token that is not the prompt's last
        chosen = self.beams.advance(scores, parents, tokens, ~more_prompt)
        parent_rows = rows[np.arange(len(rows))[:, None], chosen]
        parent_rows[more_prompt] = self.search.num_beams - 1  # the last prompt token, which attends to all before it
        self.ancestry.choose(inputs.ancestry, parent_rows)
        closed = np.flatnonzero(self.beams.closed & ~was_closed).tolist()
        return [(self.owners.pop(slot), self._results(slot)) for slot in closed]

    def _keep_attention(
        self, positions: NDArray[np.int64], attention: NDArray[np.float32], prefilling: NDArray[np.bool_]
    ) -> None:
        """Store the attention f32[B,K,S] of a step that fed the tokens at `positions` i64[B,K].

        Rows that were fed a prompt hold one token each, which precedes every beam.
        """
        slots, rows, width = attention.shape
        if self._attention is None:  # pages that no caption reaches are never touched
            self._attention = np.zeros((slots, self.beams.tokens.shape[2], rows, width), np.float32)
        self._attention[np.arange(slots)[:, None], positions, np.arange(rows)] = attention
        # the rows after the end of a prompt repeat its last token without seeing all tokens before it
        fed = self.prompt_fed[:, None] + np.arange(rows) < self.beams.prompt_lengths[:, None]
        slot, row = np.nonzero(fed & prefilling[:, None])
        self._attention[slot, positions[slot, row]] = attention[slot, row][:, None]

    def _results(self, slot: int) -> list[Hypothesis]:
        """Return the hypotheses of a closed slot, the best with its attention if that is kept."""
        best, *others = self.beams.results(slot)
        if self._attention is not None:
            rows = self.beams.fed_rows(slot)
            best = replace(best, attention=self._attention[slot, np.arange(len(rows)), rows])
        return [best, *others]

    def _prefilling(self) -> NDArray[np.bool_]:
        """Return bool[B], true for slots with prompt tokens left to feed."""
        return (self.prompt_fed < self.beams.prompt_lengths) & ~self.beams.closed

    def _feed_prompt(self, prefilling: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Count K prompt tokens as fed in `prefilling` slots bool[B]; return those with prompt tokens left."""
        fed = self.prompt_fed + np.where(prefilling, self.search.num_beams, 0)
        self.prompt_fed = fed
        return prefilling & (fed < self.beams.prompt_lengths)

    def _draw(
        self, scores: NDArray[np.float32], ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Draw one of the C candidates of each slot (scores f32[B,C], ids i64[B,C]); return both with C = 1.

        Slots that are empty or still feed their prompt take the first candidate, which is not used.
        """
        assert self.search.sampling is not None
        drawing = ~self.beams.closed & (self.prompt_fed + 1 >= self.beams.prompt_lengths)
        chosen = np.zeros(len(scores), np.int64)
        uniform = np.array([self.generators[slot].random() for slot in np.flatnonzero(drawing)])  # type: ignore[union-attr]
        # scores are sums over the caption: only the differences to the most likely token matter for the draw
        chosen[drawing] = draw(scores[drawing] - scores[drawing, :1], uniform, self.search.sampling)
        return np.take_along_axis(scores, chosen[:, None], 1), np.take_along_axis(ids, chosen[:, None], 1)

    def _regroup(self, keep: NDArray[np.int64]) -> None:
        self.ancestry.reset(np.flatnonzero(self.beams.closed))  # empty slots are fed too, but need no past
        self.device.regroup(self.cache, keep, self.ancestry.compact(keep))
        if len(keep) < len(self.prompt_fed):
            self.beams.keep(keep)
            self.prompt_fed = self.prompt_fed[keep]
            self.generators = [self.generators[slot] for slot in keep]
            if self._attention is not None:
                self._attention = self._attention[keep]
        self.steps_since_settled = 0

    def _inputs(self, prefilling: NDArray[np.bool_]) -> StepInputs:
        """Return the inputs of a step: the last token of every beam, or the next K tokens of the prompt.

        Empty slots are fed as well: removing them from the batch would copy the whole cache.
        """
        beams, num_beams = self.beams, self.search.num_beams
        input_ids = beams.last_tokens()
        positions = np.repeat(beams.lengths[:, None] - 1, num_beams, 1)
        scores = beams.scores.copy()
        # an empty slot holds the beams of its last image, whose continuations are not used
        scores[beams.closed] = -np.inf
        own_tokens = np.broadcast_to(np.eye(num_beams, dtype=bool), (len(input_ids), num_beams, num_beams))
        slots = np.flatnonzero(prefilling)
        if len(slots):
            own_tokens = own_tokens.copy()
            last = beams.prompt_lengths[slots, None] - 1
            # a prompt whose length is no multiple of K repeats its last token in the rows left over; `at` goes past it
            at = self.prompt_fed[slots, None] + np.arange(num_beams)
            positions[slots] = fed = np.minimum(at, last)
            input_ids[slots] = beams.tokens[slots[:, None], 0, fed]
            # only continuations of the last prompt token are candidates
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
