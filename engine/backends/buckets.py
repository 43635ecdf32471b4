"""A backend in front of another one that pads every step to one of few shapes.

TensorRT chooses its kernels for profiles and takes no empty tensors, captured CUDA graphs fit one shape each, and
libraries on a GPU tune themselves by shape: all want few of them. What is added is masked, so captions stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.backends.shapes import FEWEST_BANS, FEWEST_SETTLED, FILLER, bucket_size
from engine.decoding.backend import Backend, BatchSizes, Cache, Encoded, StepInputs

NEVER = -1e9
"""Instead of -inf for whole rows: where all candidates are -inf, TopK of some GPU libraries gives chance ids."""
Number = TypeVar("Number", bound=np.generic)


class FillableBackend(Backend, Protocol):
    """A backend whose caches can start with positions that nobody looks at: zeros or copies, never chance numbers."""

    def allocate(self, num_slots: int, settled: int = 0, recent: int = 0) -> Cache:
        """See Backend.allocate; F = `settled`, R = `recent`."""
        ...

    def regroup(self, cache: Cache, slots: NDArray[np.int64], columns: NDArray[np.int64], recent: int = 0) -> None:
        """See Backend.regroup; afterwards R = `recent`."""
        ...


@dataclass
class PaddedCache:
    """The other backend's cache, and what is really in it: B of `padded_slots` slots, F of `padded_settled`
    positions.
    """

    inner: Cache
    slots: int
    padded_slots: int
    settled: int
    padded_settled: int


class PaddedBackend:
    """Implements Backend on top of another one.

    Slots, settled positions and bans are padded to sizes of `bucket_size`; recent positions grow by T a step and need
    no padding beyond FILLER. Settled positions are padded in front, slots and bans behind.
    """

    def __init__(self, inner: FillableBackend) -> None:
        self.inner = inner
        self.name: str = inner.name
        self.batch_sizes: BatchSizes = inner.batch_sizes

    def encode(self, pixel_values: NDArray[np.uint8]) -> Encoded:
        """See Backend.encode."""
        return self.inner.encode(pixel_values)

    def allocate(self, num_slots: int) -> PaddedCache:
        """See Backend.allocate."""
        padded = bucket_size(num_slots, 1)
        return PaddedCache(self.inner.allocate(padded, FEWEST_SETTLED, FILLER), num_slots, padded, 0, FEWEST_SETTLED)

    def admit(self, cache: PaddedCache, slot: int, encoded: Encoded, image: int) -> None:
        """See Backend.admit."""
        self.inner.admit(cache.inner, slot, encoded, image)

    def step(self, cache: PaddedCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step."""
        slots, rows, width = inputs.ancestry.shape
        more = cache.padded_slots - slots
        front = cache.padded_settled - cache.settled
        ancestry = np.zeros((cache.padded_slots, rows, width + front + FILLER), bool)
        ancestry[:slots, :, front : front + cache.settled] = inputs.ancestry[:, :, : cache.settled]
        ancestry[:slots, :, cache.padded_settled + FILLER :] = inputs.ancestry[:, :, cache.settled :]
        bans = inputs.banned_ids
        repeats = bucket_size(bans.shape[2], FEWEST_BANS) - bans.shape[2]
        bans = np.concatenate([bans, np.repeat(bans[:, :, :1], repeats, 2)], 2)
        scores, ids = self.inner.step(
            cache.inner,
            StepInputs(
                input_ids=_padded(inputs.input_ids, more, 0),
                positions=_padded(inputs.positions, more, 0),
                scores=_padded(np.maximum(inputs.scores, np.float32(NEVER)), more, NEVER),
                banned_ids=_padded(bans, more, -1),
                ancestry=ancestry,
                num_candidates=inputs.num_candidates,
            ),
        )
        return scores[:slots], ids[:slots]

    def regroup(self, cache: PaddedCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        kept, settled = columns.shape
        padded_slots = min(cache.padded_slots, bucket_size(kept, 1))
        padded_settled = bucket_size(settled, FEWEST_SETTLED)
        front = cache.padded_settled - cache.settled
        moved = np.where(columns < cache.settled, columns + front, columns + front + FILLER)
        places = np.zeros((padded_slots, padded_settled), np.int64)
        places[:kept, padded_settled - settled :] = moved
        self.inner.regroup(cache.inner, np.append(slots, np.arange(kept, padded_slots)), places, FILLER)
        cache.slots, cache.padded_slots = kept, padded_slots
        cache.settled, cache.padded_settled = settled, padded_settled


def _padded(array: NDArray[Number], more: int, value: float) -> NDArray[Number]:
    """Return an array with `more` slots behind, filled with a value."""
    if more == 0:
        return array
    return np.concatenate([array, np.full((more, *array.shape[1:]), value, array.dtype)])
