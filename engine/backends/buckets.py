"""A backend in front of another one that pads every step to one of few shapes.

TensorRT chooses its kernels for profiles and takes no empty tensors, captured CUDA graphs fit one shape each, and
libraries on a GPU tune themselves by shape: all want few of them. What is added is masked, so captions stay the same.
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
"""Instead of -inf for whole rows: where all candidates are -inf, TopK of some GPU libraries gives chance ids."""
SHRINK = 4
"""At the end of a run slots are given up by this factor at a time: each other number of them would be a new shape."""
MOST_SHRUNK = 16
"""By so much in all."""
Number = TypeVar("Number", bound=np.generic)


class FillableBackend(Backend, Protocol):
    """A backend whose caches hold positions that nobody looks at: zeros or old ones, never chance numbers."""

    def allocate(self, num_slots: int, settled: int = 0) -> Cache:
        """See Backend.allocate; F = `settled`, R = 0."""
        ...

    def set_recent(self, cache: Cache, recent: int) -> None:
        """Make R = `recent`, whatever was there."""
        ...

    def step(
        self, cache: Cache, inputs: StepInputs, at: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step. With `at` R stays as it is: the new keys and values take the recent places from there."""
        ...

    def regroup(
        self, cache: Cache, slots: NDArray[np.int64], columns: NDArray[np.int64], *, keep_recent: bool = False
    ) -> None:
        """See Backend.regroup; with `keep_recent` R stays as it is, and nobody looks at what is there."""
        ...


@dataclass
class PaddedCache:
    """The other backend's cache, and what is really in it: B of `padded_slots` slots, F of `padded_settled` positions,
    R recent ones, M of `padded_marks` marked ids. What is padded never becomes less but for slots.
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
    """Implements Backend on top of another one.

    Recent positions are as many as a step can ever have, settled positions and marked ids are padded to sizes of
    `bucket_size`. Settled positions are padded in front, slots, recent positions and marked ids behind.
    """

    def __init__(self, inner: FillableBackend) -> None:
        self.inner = inner
        self.name: str = inner.name
        self.batch_sizes: BatchSizes = inner.batch_sizes
        self.shapes: set[tuple[int, ...]] = set()
        """Of the steps so far: B, T, positions, marked ids, candidates."""

    def encode(self, pixel_values: NDArray[np.uint8]) -> Encoded:
        """See Backend.encode."""
        return self.inner.encode(pixel_values)

    def allocate(self, num_slots: int) -> PaddedCache:
        """See Backend.allocate."""
        inner = self.inner.allocate(num_slots, FEWEST_SETTLED)
        self.inner.set_recent(inner, SETTLE_EVERY)  # TensorRT takes no empty tensor, and T is not known yet
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
    """Return an array with `more` slots behind, filled with a value."""
    if more == 0:
        return array
    return np.concatenate([array, np.full((more, *array.shape[1:]), value, array.dtype)])
