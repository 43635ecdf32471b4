"""The scheduler owns the slots: it keeps them filled while images wait, and hands out captions as they close.

Beam search is exact for each image alone, so an image leaves at the very step Hugging Face's rule closes it and another
takes its slot. Knows nothing of files, pixels' origin or text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.decoding.ancestry import Ancestry
from engine.decoding.backend import Backend, Encoded, StepInputs
from engine.decoding.beam import Beams, Hypothesis, Search
from engine.decoding.sampling import draw, generator

Key = TypeVar("Key")
Owner = TypeVar("Owner")

SETTLE_EVERY = 8
"""Steps after which recent keys and values are folded into the settled ones (fewer copies of growing tensors)."""
PULL_AT_MOST = 4
"""Times encode_batch of images that are taken for one batch, where many need no decoding."""
SHRINK_SHARE = 0.25
"""Share of empty slots from which, with no image waiting, they are given up."""


class Scheduler:
    """Decodes any number of images with one backend and one search, `num_slots` of them side by side."""

    def __init__(self, backend: Backend, search: Search, *, num_slots: int, encode_batch: int = 4) -> None:
        self.backend = backend
        self.search = search
        self.num_slots = num_slots
        self.encode_batch = encode_batch

    def run(self, images: Iterable[tuple[Key, NDArray[np.uint8]]]) -> Iterator[tuple[Key, list[Hypothesis]]]:
        """Caption (key, pixels u8[height,width,3]) pairs; yield (key, hypotheses) of each the moment it closes."""
        for closed in self.steps(images):
            yield from closed

    def steps(
        self, images: Iterable[tuple[Key, NDArray[np.uint8]] | None]
    ) -> Iterator[list[tuple[Key, list[Hypothesis]]]]:
        """Like `run`, but yield after every step what closed in it, often nothing.

        None among the images is one that needs no decoding: after many of these the caller gets its turn, too.
        """
        waiting = self._encoded_ahead(iter(images))
        slots = _Slots(self.backend, self.search, self.num_slots)
        keys: dict[int, tuple[Key, int]] = {}
        captions = _CopiesOfImage[Key](self.search)
        arrivals = True
        while arrivals or keys:
            for slot in slots.empty() if arrivals else ():
                try:
                    newcomer = next(waiting)
                except StopIteration:
                    arrivals = False
                    break
                if newcomer is None:
                    break
                key, copy, encoded, image = newcomer
                keys[slot] = key, copy
                slots.admit(slot, encoded, image)
                slots.draw_from(slot, key, copy)
            if not arrivals:
                keys = slots.shrink(keys)
            closed = slots.step() if keys else []
            yield [found for slot in closed for found in captions.add(*keys.pop(slot), slots.beams.results(slot))]

    def decode(self, pixel_values: NDArray[np.uint8]) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Caption images u8[N,height,width,3]; yield (index, hypotheses) as they close."""
        return self.run(enumerate(pixel_values))

    def _encoded_ahead(
        self, images: Iterator[tuple[Key, NDArray[np.uint8]] | None]
    ) -> Iterator[tuple[Key, int, Encoded, int] | None]:
        """Encode in batches, as images are asked for; yield each as often as captions are drawn, None without any."""
        copies = self.search.sampling.copies if self.search.sampling else 1
        while pulled := self._pull(images):
            batch = [image for image in pulled if image is not None]
            if not batch:
                yield None
                continue
            encoded = self.backend.encode(np.stack([pixels for _, pixels in batch]))
            for i, (key, _) in enumerate(batch):
                for copy in range(copies):
                    yield key, copy, encoded, i

    def _pull(
        self, images: Iterator[tuple[Key, NDArray[np.uint8]] | None]
    ) -> list[tuple[Key, NDArray[np.uint8]] | None]:
        """Take images until encode_batch of them have to be decoded, but no more than PULL_AT_MOST times as many."""
        pulled: list[tuple[Key, NDArray[np.uint8]] | None] = []
        missing = self.encode_batch
        for image in itertools.islice(images, PULL_AT_MOST * self.encode_batch):
            pulled.append(image)
            missing -= image is not None
            if not missing:
                break
        return pulled


class _CopiesOfImage(Generic[Key]):
    """Collects what an image's slots say: one of them as it is, several drawn captions by score."""

    def __init__(self, search: Search) -> None:
        self._copies = search.sampling.copies if search.sampling else 1
        self._found: dict[Key, list[tuple[int, Hypothesis]]] = {}

    def add(self, key: Key, copy: int, hypotheses: list[Hypothesis]) -> Iterator[tuple[Key, list[Hypothesis]]]:
        """Take in one slot's hypotheses; yield the image's when they are all there."""
        if self._copies == 1:
            yield key, hypotheses
            return
        found = self._found.setdefault(key, [])
        found.append((copy, hypotheses[0]))
        if len(found) == self._copies:
            del self._found[key]
            yield key, [one for _, one in sorted(found, key=lambda entry: (-entry[1].score, entry[0]))]


class _Slots:
    """Beams, ancestry and caches of B slots, moving in step.

    `prompt_fed` i64[B] counts the prompt tokens each slot has fed. A newcomer's prompt rides along in its own slot, K
    tokens a step, so that prefill needs no pass of its own.
    """

    def __init__(self, backend: Backend, search: Search, num_slots: int) -> None:
        self.backend = backend
        self.search = search
        self.cache = backend.allocate(num_slots)
        self.beams = Beams(search, num_slots)
        self.ancestry = Ancestry(num_slots, search.num_beams)
        self.prompt_fed = np.zeros(num_slots, np.int64)
        self.generators: list[np.random.Generator | None] = [None] * num_slots
        self.steps_since_settled = 0

    def empty(self) -> list[int]:
        """Return the slots without an image to decode."""
        return np.flatnonzero(self.beams.closed).tolist()

    def admit(self, slot: int, encoded: Encoded, image: int) -> None:
        """Put a newcomer into an empty slot."""
        self.backend.admit(self.cache, slot, encoded, image)
        self.beams.start(np.array([slot]))
        self.ancestry.reset(np.array([slot]))
        self.prompt_fed[slot] = 0

    def draw_from(self, slot: int, key: object, copy: int) -> None:
        """Give a newcomer's slot the random generator of its caption, if captions are drawn."""
        if self.search.sampling is not None:
            self.generators[slot] = generator(self.search.sampling.seed, key, copy)

    def shrink(self, keys: dict[int, Owner]) -> dict[int, Owner]:
        """Give up empty slots when they are many; return `keys` {slot: owner} under the new slot numbers."""
        occupied = np.flatnonzero(~self.beams.closed)
        count = len(occupied)
        if count > (1 - SHRINK_SHARE) * len(self.prompt_fed):
            return keys
        keep = np.arange(count)
        keep[self.beams.closed[:count]] = occupied[occupied >= count]  # holes are filled from behind, the rest stays
        self._regroup(keep)
        return {new: keys[old] for new, old in enumerate(keep.tolist())}

    def step(self) -> list[int]:
        """Feed every slot once and advance its beams; return the slots whose image closed."""
        if self.steps_since_settled == SETTLE_EVERY:
            self._regroup(np.arange(len(self.prompt_fed)))
        prefilling = (self.prompt_fed < len(self.search.prompt)) & ~self.beams.closed
        inputs = self._inputs(prefilling)
        scores, ids = self.backend.step(self.cache, inputs)
        if self.search.sampling is not None:
            scores, ids = self._draw(scores, ids)
        self.steps_since_settled += 1
        more_prompt = self._feed_prompt(prefilling)
        rows, tokens = np.divmod(ids, self.search.vocab_size)
        parents = np.where(prefilling[:, None], 0, rows)  # every row of a prompt belongs to beam 0
        was_closed = self.beams.closed.copy()
        chosen = self.beams.advance(scores, parents, tokens, ~more_prompt)
        parent_rows = np.take_along_axis(rows, chosen, 1)
        parent_rows[more_prompt] = self.search.num_beams - 1  # the last prompt token fed, which saw all the others
        self.ancestry.choose(inputs.ancestry, parent_rows)
        return np.flatnonzero(self.beams.closed & ~was_closed).tolist()

    def _feed_prompt(self, prefilling: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Count K prompt tokens as fed in bool[B] `prefilling` slots; return those with more of the prompt to feed."""
        fed = self.prompt_fed + np.where(prefilling, self.search.num_beams, 0)
        self.prompt_fed = fed
        return prefilling & (fed < len(self.search.prompt))

    def _draw(
        self, scores: NDArray[np.float32], ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Leave one candidate a slot, drawn among f32[B,C] and i64[B,C]; slots that are empty or in a prompt take
        any.
        """
        assert self.search.sampling is not None
        drawing = ~self.beams.closed & (self.prompt_fed + 1 >= len(self.search.prompt))
        chosen = np.zeros(len(scores), np.int64)
        uniform = np.array([self.generators[slot].random() for slot in np.flatnonzero(drawing)])  # type: ignore[union-attr]
        # scores are sums along the caption: the difference to the likeliest word is all that counts
        chosen[drawing] = draw(scores[drawing] - scores[drawing, :1], uniform, self.search.sampling)
        return np.take_along_axis(scores, chosen[:, None], 1), np.take_along_axis(ids, chosen[:, None], 1)

    def _regroup(self, keep: NDArray[np.int64]) -> None:
        self.backend.regroup(self.cache, keep, self.ancestry.compact(keep))
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
        scores = np.where(beams.closed[:, None], np.float32(-np.inf), beams.scores)
        own_tokens = np.repeat(np.eye(num_beams, dtype=bool)[None], len(input_ids), 0)
        if prefilling.any():
            last = len(self.search.prompt) - 1
            at = self.prompt_fed[prefilling][:, None] + np.arange(num_beams)
            positions[prefilling] = np.minimum(at, last)
            input_ids[prefilling] = np.array(self.search.prompt)[positions[prefilling]]
            scores[prefilling] = np.where(at == last, np.float32(0), np.float32(-np.inf))
            own_tokens[prefilling] |= np.tri(num_beams, dtype=bool) & (at <= last)[:, :, None]
        return StepInputs(
            input_ids=input_ids,
            positions=positions,
            scores=scores,
            banned_ids=beams.banned_ids(),
            ancestry=self.ancestry.feed(own_tokens),
            num_candidates=self.search.num_candidates,
        )
