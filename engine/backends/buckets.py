"""A backend wrapper that pads every step to one of a few shapes.

On a GPU every new shape costs time: TensorRT builds kernels for profiles and rejects empty tensors, a captured CUDA
graph fits one shape, and libraries tune themselves per shape. Padding is masked, so captions do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.backends.shapes import FEWEST_MARKS, FEWEST_SETTLED, bucket_size
from engine.decoding.backend import Backend, BatchSizes, Cache, Encoded, StepInputs
from engine.decoding.scheduler import SETTLE_EVERY

NEVER = -1e9
"""Replaces -inf for whole rows: if all candidates are -inf, TopK of some GPU libraries returns arbitrary ids."""
SHRINK = 4
"""At the end of a run the number of slots is divided by this at a time, since every number is another shape."""
MOST_SHRUNK = 16
"""The most that the number of slots is divided by in all."""
Number = TypeVar("Number", bound=np.generic)


class FillableBackend(Backend, Protocol):
    """A backend whose caches may hold unused positions: zeros or old values, never uninitialised memory (NaN)."""

    def allocate(self, num_slots: int, settled: int = 0) -> Cache:
        """See Backend.allocate; F = `settled`, R = 0."""
        ...

    def set_recent(self, cache: Cache, recent: int) -> None:
        """Allocate a recent block of R = `recent` positions; its content is not used."""
        ...

    def step(
        self, cache: Cache, inputs: StepInputs, at: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step. With `at`, R stays: the new keys and values overwrite recent positions from `at` on."""
        ...

    def regroup(
        self, cache: Cache, slots: NDArray[np.int64], columns: NDArray[np.int64], *, keep_recent: bool = False
    ) -> None:
        """See Backend.regroup. With `keep_recent`, R stays, and the content of the recent block is not used."""
        ...


@dataclass
class PaddedCache:
    """The inner backend's cache and how much of it is used: B of `padded_slots` slots, F of `padded_settled` folded
    positions, R of `padded_recent` recent ones. `padded_marks` is M. Padded sizes only grow, except slots.
    """

    inner: Cache
    slots: int
    padded_slots: int
    settled: int
    padded_settled: int
    recent: int
    padded_recent: int
    padded_marks: int
    fewest_slots: int


class PaddedBackend:
    """Implements Backend on top of a FillableBackend.

    The recent block always has its final size. Folded positions and marked ids are padded to sizes of `bucket_size`.
    Folded positions are padded in front; slots, recent positions and marked ids at the end.
    """

    def __init__(self, inner: FillableBackend) -> None:
        self.inner = inner
        self.name: str = inner.name
        self.batch_sizes: BatchSizes = inner.batch_sizes
        self.shapes: set[tuple[int, ...]] = set()
        """Shapes of all steps so far: B, T, positions, marked ids, candidates."""

    def encode(self, pixel_values: NDArray[np.uint8]) -> Encoded:
        """See Backend.encode."""
        return self.inner.encode(pixel_values)

    def allocate(self, num_slots: int) -> PaddedCache:
        """See Backend.allocate."""
        inner = self.inner.allocate(num_slots, FEWEST_SETTLED)
        self.inner.set_recent(inner, SETTLE_EVERY)  # TensorRT rejects empty tensors; T is not known yet
        return PaddedCache(
            inner=inner,
            slots=num_slots,
            padded_slots=num_slots,
            settled=0,
            padded_settled=FEWEST_SETTLED,
            recent=0,
            padded_recent=SETTLE_EVERY,
            padded_marks=FEWEST_MARKS,
            fewest_slots=-(-num_slots // MOST_SHRUNK),
        )

    def admit(self, cache: PaddedCache, slot: int, encoded: Encoded, image: int) -> None:
        """See Backend.admit."""
        self.inner.admit(cache.inner, slot, encoded, image)

    def step(self, cache: PaddedCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step."""
        slots, rows, _ = inputs.ancestry.shape
        more = cache.padded_slots - slots
        front = cache.padded_settled - cache.settled
        if cache.padded_recent != SETTLE_EVERY * rows:  # in the first step
            cache.padded_recent = SETTLE_EVERY * rows
            self.inner.set_recent(cache.inner, cache.padded_recent)
        own = cache.padded_settled + cache.padded_recent
        ancestry = np.zeros((cache.padded_slots, rows, own + rows), bool)
        ancestry[:slots, :, front : cache.padded_settled + cache.recent] = inputs.ancestry[:, :, :-rows]
        ancestry[:slots, :, own:] = inputs.ancestry[:, :, -rows:]
        marks = inputs.marked_ids
        cache.padded_marks = max(cache.padded_marks, bucket_size(marks.shape[2], FEWEST_MARKS))
        marks = np.concatenate([marks, np.repeat(marks[:, :, :1], cache.padded_marks - marks.shape[2], 2)], 2)
        self.shapes.add((*ancestry.shape, cache.padded_marks, inputs.num_candidates))
        scores, ids = self.inner.step(
            cache.inner,
            StepInputs(
                input_ids=_padded(inputs.input_ids, more, 0),
                positions=_padded(inputs.positions, more, 0),
                scores=_padded(np.maximum(inputs.scores, np.float32(NEVER)), more, NEVER),
                marked_ids=_padded(marks, more, -1),
                penalties=inputs.penalties,
                ancestry=ancestry,
                num_candidates=inputs.num_candidates,
            ),
            at=cache.recent,
        )
        cache.recent += rows
        return scores[:slots], ids[:slots]

    def regroup(self, cache: PaddedCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        kept, settled = columns.shape
        padded_slots = cache.padded_slots
        while padded_slots > cache.fewest_slots and kept <= -(-padded_slots // SHRINK):
            padded_slots = max(cache.fewest_slots, -(-padded_slots // SHRINK))
        padded_settled = max(cache.padded_settled, bucket_size(settled, FEWEST_SETTLED))
        front = cache.padded_settled - cache.settled
        places = np.zeros((padded_slots, padded_settled), np.int64)
        places[:kept, padded_settled - settled :] = columns + front
        kept_slots = np.append(slots, np.arange(kept, padded_slots))
        self.inner.regroup(cache.inner, kept_slots, places, keep_recent=True)
        cache.slots, cache.padded_slots = kept, padded_slots
        cache.settled, cache.padded_settled, cache.recent = settled, padded_settled, 0


def _padded(array: NDArray[Number], more: int, value: float) -> NDArray[Number]:
    """Return the array with `more` slots appended, filled with `value`."""
    if more == 0:
        return array
    return np.concatenate([array, np.full((more, *array.shape[1:]), value, array.dtype)])
