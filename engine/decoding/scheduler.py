"""The scheduler owns the slots: it feeds a batch of images through the backend until every one is closed.

A fixed batch for now: slots whose image closed are dropped at the next regrouping, not refilled before the batch ends.
Knows nothing of files, pixels' origin or text.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Backend, Cache, StepInputs
from engine.decoding.ancestry import Ancestry
from engine.decoding.beam import Beams, Hypothesis, Search

SETTLE_EVERY = 8
"""Steps after which recent keys and values are folded into the settled ones (fewer copies of growing tensors)."""
DROP_SHARE = 0.25
"""Share of closed slots from which they are dropped at once instead of at the next settling."""


class Scheduler:
    """Decodes batches of images with one backend and one search."""

    def __init__(self, backend: Backend, search: Search) -> None:
        self.backend = backend
        self.search = search

    def decode(self, pixel_values: NDArray[np.uint8]) -> Iterator[tuple[int, list[Hypothesis]]]:
        """Caption images u8[B,height,width,3]; yield (index, hypotheses) of each when its slot is dropped."""
        slots = np.arange(len(pixel_values))
        cache = self.backend.encode(pixel_values)
        beams = Beams(self.search, len(slots))
        ancestry = Ancestry(len(slots), self.search.num_beams)
        fed, rows = self._step(cache, beams, ancestry, self._prefill_inputs(beams, ancestry))
        steps = 1
        while True:
            ancestry.choose(fed, rows)
            keep = self._slots_to_keep(beams, steps)
            if keep is not None:
                for slot in np.flatnonzero(beams.closed):
                    yield int(slots[slot]), beams.results(int(slot))
                if not len(keep):
                    return
                self.backend.regroup(cache, keep, ancestry.compact(keep))
                beams.keep(keep)
                slots, steps = slots[keep], 0
            fed, rows = self._step(cache, beams, ancestry, self._step_inputs(beams, ancestry))
            steps += 1

    @staticmethod
    def _slots_to_keep(beams: Beams, steps: int) -> NDArray[np.int64] | None:
        """Return the open slots when it is time to regroup (settling is due, enough slots closed), else None."""
        if steps < SETTLE_EVERY and beams.closed.mean() < DROP_SHARE:
            return None
        return np.flatnonzero(~beams.closed)

    def _step(
        self, cache: Cache, beams: Beams, ancestry: Ancestry, inputs: StepInputs
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Run one step and advance the beams; return the step's ancestry mask and the row each beam continues."""
        scores, ids = self.backend.step(cache, inputs)
        rows, tokens = np.divmod(ids, self.search.vocab_size)
        parents = rows if ancestry.width else np.zeros_like(rows)  # every row of a prefill belongs to beam 0
        chosen = beams.advance(scores, parents, tokens)
        return inputs.ancestry, np.take_along_axis(rows, chosen, 1)

    def _prefill_inputs(self, beams: Beams, ancestry: Ancestry) -> StepInputs:
        """Feed the prompt, all but its last token for the cache only."""
        images, length = len(beams.tokens), len(self.search.prompt)
        positions = np.broadcast_to(np.arange(length), (images, length))
        scores = np.full((images, length), -np.inf, np.float32)
        scores[:, -1] = 0.0
        banned = np.repeat(beams.banned_ids()[:, :1], length, 1)
        own = np.tri(length, dtype=bool)
        return StepInputs(
            input_ids=beams.tokens[:, 0, :length],
            positions=positions,
            scores=scores,
            banned_ids=banned,
            ancestry=ancestry.feed(own),
            num_candidates=self.search.num_candidates,
        )

    def _step_inputs(self, beams: Beams, ancestry: Ancestry) -> StepInputs:
        """Feed the last token of every beam; a closed slot is fed on for nothing until it is dropped."""
        images, rows = beams.scores.shape
        return StepInputs(
            input_ids=beams.last_tokens(),
            positions=np.broadcast_to(beams.lengths[:, None] - 1, (images, rows)),
            scores=np.where(beams.closed[:, None], np.float32(-np.inf), beams.scores),
            banned_ids=beams.banned_ids(),
            ancestry=ancestry.feed(np.eye(rows, dtype=bool)),
            num_candidates=self.search.num_candidates,
        )
