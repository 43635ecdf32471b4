"""The ancestry mask: which cached positions belong to each beam's own past.

Hugging Face reorders the whole KV cache after every step, so that row k holds the past of beam k. Here a key stays
where it was written. The cache of an image is a tree that its beams share, and choosing beams only reindexes this
small boolean mask. This module does not depend on scores or on the content of the cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Ancestry:
    """Ancestry of B x K beams over W cached positions: `mask` bool[B,K,W], true for positions in a beam's past."""

    def __init__(self, num_slots: int, num_beams: int) -> None:
        """Start with an empty cache."""
        self.mask: NDArray[np.bool_] = np.zeros((num_slots, num_beams, 0), bool)

    @property
    def width(self) -> int:
        """Number of cached positions, folded (F) and recent (R) together."""
        return int(self.mask.shape[2])

    def feed(self, own: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the mask bool[B,K,W+K] of a step that feeds K new tokens per slot.

        `own` bool[B,K,K] says which of the fed tokens see each other: the identity for beams, which never see one
        another, and a lower triangle for prompt tokens that are fed together.
        """
        return np.concatenate([self.mask, own], 2)

    def reset(self, slots: NDArray[np.int64]) -> None:
        """Clear the past of slots that now hold a new image."""
        # the former image's keys stay in the cache until the next fold; erasing them would be one more copy
        self.mask[slots] = False

    def choose(self, fed: NDArray[np.bool_], rows: NDArray[np.int64]) -> None:
        """Let beam k of slot b continue row `rows[b,k]` (i64[B,K]) of the step whose mask was `fed` bool[B,K,W+K]."""
        slots, beams, width = fed.shape
        flat_rows = np.arange(slots)[:, None] * beams + rows
        # `take` on the flattened mask copies whole rows, which is several times faster than fancy indexing in 3-D
        self.mask = fed.reshape(-1, width).take(flat_rows.ravel(), axis=0).reshape(fed.shape)

    def compact(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keep `slots` i64[B'] and, of each, the positions that some beam still descends from.

        Returns `columns` i64[B',W'], the old position of each kept one. Slots are right-aligned: a slot that needs
        fewer than W' positions starts with repeats of position 0, which are masked out. Since beams share positions, a
        common prefix is stored once per slot.
        """
        mask = self.mask[slots]
        # a position that no beam descends from can never be needed again: beams only continue running beams
        alive = mask.any(1)
        count = alive.sum(1)
        width = int(count.max(initial=0))
        slot, position = np.nonzero(alive)
        first = np.cumsum(count) - count
        # the n-th living position of a slot gets column n, plus the padding that right-aligns the slot
        place = np.arange(len(slot)) - first[slot] + (width - count)[slot]
        columns = np.zeros((len(slots), width), np.int64)
        columns[slot, place] = position
        self.mask = np.zeros((len(slots), mask.shape[1], width), bool)
        self.mask[slot, :, place] = mask[slot, :, position]
        return columns
