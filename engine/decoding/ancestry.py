"""Which cached positions are each beam's own past: a mask that replaces every reordering of keys and values.

A key stays where it was written. The cache of an image is thus a tree shared by its beams, and choosing beams
only reindexes the small mask kept here. Knows nothing of scores or of what the cache holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Ancestry:
    """Ancestry of B x K beams over W cached positions: `mask` bool[B,K,W]."""

    def __init__(self, num_slots: int, num_beams: int) -> None:
        """Start with nothing cached."""
        self.mask: NDArray[np.bool_] = np.zeros((num_slots, num_beams, 0), bool)

    @property
    def width(self) -> int:
        """Cached positions, settled and recent."""
        return int(self.mask.shape[2])

    def feed(self, own: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the mask bool[B,K,W+K] of a step that feeds K rows whose past among themselves is `own` bool[B,K,K].

        Beams see only themselves there (the identity); prompt tokens fed together also see the ones before.
        """
        return np.concatenate([self.mask, own], 2)

    def reset(self, slots: NDArray[np.int64]) -> None:
        """Forget the past of slots that hold a new image."""
        self.mask[slots] = False

    def choose(self, fed: NDArray[np.bool_], rows: NDArray[np.int64]) -> None:
        """Continue beam k of slot b from row `rows[b,k]` (i64[B,K]) of the step whose mask was `fed`."""
        slots, beams, width = fed.shape
        places = np.arange(slots)[:, None] * beams + rows
        self.mask = fed.reshape(-1, width).take(places.ravel(), axis=0).reshape(fed.shape)  # whole rows at a time

    def compact(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keep `slots` i64[B'] and only positions some beam descends from; return `columns` i64[B',W'].

        Slots are right-aligned: where one needs fewer than W' positions, its first ones repeat position 0 and
        are masked out. A shared prefix is thereby stored once a slot.
        """
        mask = self.mask[slots]
        alive = mask.any(1)
        count = alive.sum(1)
        width = int(count.max(initial=0))
        slot, position = np.nonzero(alive)
        first = np.cumsum(count) - count
        place = np.arange(len(slot)) - first[slot] + (width - count)[slot]
        columns = np.zeros((len(slots), width), np.int64)
        columns[slot, place] = position
        self.mask = np.zeros((len(slots), mask.shape[1], width), bool)
        self.mask[slot, :, place] = mask[slot, :, position]
        return columns
