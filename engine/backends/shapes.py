"""Tensor sizes on a GPU: few of them, and all within the profiles that TensorRT plans are built for.

Shape letters as in engine.decoding.backend. Independent of any runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from engine.bundle.manifest import NUM_CANDIDATES, TASK_IDS, Bundle, cache_names, step_inputs
from engine.decoding.backend import AttentionBackend, Backend, BatchSizes, Cache, Encoded, StepInputs
from engine.decoding.scheduler import SETTLE_EVERY
from engine.errors import BackendError

Shape = tuple[int, ...]
ShapeRange = dict[str, tuple[Shape, Shape, Shape]]
"""Input name -> smallest, usual and largest shape; for num_candidates the values instead."""

FEWEST_SETTLED, FEWEST_MARKS = 64, 8
"""Smallest padded sizes of folded positions and of marked ids. 256 images at 4 beams reach 64 folded positions soon;
smaller sizes would only be used for a few steps.
"""
ROWS = 1024
"""Beams in flight per set on a GPU. A guess: never measured."""
SETS = 2
"""Number of sets of slots that alternate on a GPU."""
ENCODE_BATCH = 64
"""Images encoded at once on a GPU. A guess: never measured. 16 images are by arithmetic too few for the 108 processors
of an A100.
"""
PROMPT_MARGIN = 16
"""Positions reserved for a prompt."""
MARKS_MARGIN = 16
"""Marked ids in addition to a caption's own tokens: the end token and banned words."""
MOST_DRAWN = 100
"""Largest --top-k for sampling; TensorRT's TopK takes 3840 at most."""


@dataclass(frozen=True)
class Bounds:
    """The largest sizes: B slots, T rows per image (its beams), F folded positions, M marked ids, N images per encode.

    Recent positions and candidates follow from the beams. Plans are tuned for `usual_beams` (None: `beams`).
    """

    slots: int
    beams: int
    settled: int
    marked_ids: int
    encode_batch: int = ENCODE_BATCH
    usual_beams: int | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        beams: int | None = None,
        max_new_tokens: int | None = None,
        rows: int = ROWS,
        usual_beams: int | None = None,
    ) -> Bounds:
        """Return the bounds for one kind of search; defaults come from the bundle's generation settings.

        The number of slots is `rows` divided by `usual_beams` (None: `beams`). Folded positions are bounded by every
        position of every beam, marked ids by every token of a caption plus the bans of the generation settings; both
        with a margin.
        """
        given = {"num_beams": beams, "max_new_tokens": max_new_tokens}
        options = bundle.options(**{name: value for name, value in given.items() if value is not None})
        longest = min(bundle.model.max_positions, options.max_total_length(1) + PROMPT_MARGIN)
        slots = max(1, rows // (usual_beams or options.num_beams))
        return cls(
            slots=slots,
            beams=options.num_beams,
            settled=bucket_size(longest * options.num_beams, FEWEST_SETTLED),
            marked_ids=bucket_size(longest + MARKS_MARGIN + options.most_banned, FEWEST_MARKS),
            usual_beams=usual_beams,
        )

    @property
    def recent(self) -> int:
        """The largest R: the recent block of PaddedBackend."""
        return SETTLE_EVERY * self.beams

    @property
    def candidates(self) -> int:
        """The largest C: 2K for beam search, MOST_DRAWN for sampling."""
        return max(2 * self.beams, MOST_DRAWN)

    def refuse_beyond(self, hint: str, **wanted: int) -> None:
        """Raise BackendError, ending in `hint`, if a size (named like its field) exceeds the bound."""
        for name, size in wanted.items():
            most = getattr(self, name)
            if size > most:
                raise BackendError(f"{name.replace('_', ' ')} is {size}, but the maximum is {most}: {hint}")

    def settings(self) -> dict[str, int]:
        """Return the bounds for JSON."""
        return asdict(self)


def gpu_batch_sizes(bundle: Bundle, free_bytes: int | None, bounds: Bounds | None = None) -> BatchSizes:
    """Return batch sizes for a GPU with `free_bytes`, within `bounds` if given. A guess: never measured."""
    return BatchSizes(
        rows=SETS * (bounds.slots * (bounds.usual_beams or bounds.beams) if bounds else ROWS),
        encode_batch=bounds.encode_batch if bounds else ENCODE_BATCH,
        slots=SETS * bounds.slots if bounds else None,
        sets=SETS,
        memory_bytes=free_bytes,
        item_bytes=2 if bundle.precision == "fp16" else 4,
    )


def bucket_size(size: int, smallest: int) -> int:
    """Return the first of 1, 1.5, 2, 3, 4, 6 ... times `smallest` that is >= `size`: at most a third is padding."""
    step = smallest
    while step < size:
        if size <= step * 3 // 2:
            return step * 3 // 2
        step *= 2
    return step


def profiles(bundle: Bundle, bounds: Bounds) -> dict[str, ShapeRange]:
    """Return graph name -> profile: the smallest, usual and largest shape of every input with a dynamic size."""
    model, image = bundle.model, bundle.image
    names = {part: cache_names(model.num_layers, part) for part in ("cross", "settled", "recent")}

    def keys(part: str, slots: Shape, positions: Shape) -> dict[str, Any]:
        min_opt_max = tuple(
            (size, model.num_heads, length, model.head_width) for size, length in zip(slots, positions, strict=True)
        )
        return dict.fromkeys(names[part], min_opt_max)

    slots = (1, bounds.slots, bounds.slots)
    usual_beams = bounds.usual_beams or bounds.beams
    rows = (1, usual_beams, bounds.beams)
    settled = (FEWEST_SETTLED, min(4 * FEWEST_SETTLED, bounds.settled), bounds.settled)
    recent = (SETTLE_EVERY, SETTLE_EVERY * usual_beams, bounds.recent)
    marks = (FEWEST_MARKS, FEWEST_MARKS, bounds.marked_ids)
    width = tuple(map(sum, zip(settled, recent, rows, strict=True)))
    row = tuple(zip(slots, rows, strict=True))
    sizes: dict[str, tuple[Shape, ...]] = {
        "input_ids": row,
        "positions": row,
        "scores": row,
        "marked_ids": tuple((*two, m) for two, m in zip(row, marks, strict=True)),
        "ancestry": tuple((*two, w) for two, w in zip(row, width, strict=True)),
    }
    encoded = (1, bounds.encode_batch, bounds.encode_batch)
    # one plan for all tasks, whose ids differ in number
    lengths = bundle.encoder_positions()
    positions = lengths[0], model.encoder_positions, lengths[-1]
    ids = tuple((count - model.encoder_positions + len(bundle.task_ids),) for count in positions)
    return {
        "encoder": {
            "pixel_values": tuple((n, image.height, image.width, 3) for n in encoded),
            **({TASK_IDS: ids} if bundle.tasks else {}),
        },
        "decoder": {
            **{name: sizes[field] for name, field in step_inputs(bundle.format).items() if field in sizes},
            NUM_CANDIDATES: ((1,), (2 * usual_beams,), (bounds.candidates,)),
            **keys("cross", slots, positions),
            **keys("settled", slots, settled),
            **keys("recent", slots, recent),
        },
        "regroup": {
            "slots": tuple((size,) for size in slots),
            "columns": tuple(zip(slots, settled, strict=True)),
            **keys("settled", slots, settled),
            **keys("recent", slots, recent),
        },
    }


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
        past = cache.padded_settled + cache.padded_recent
        ancestry = np.zeros((cache.padded_slots, rows, past + rows), bool)  # padding is False: never attended to
        ancestry[:slots, :, front : cache.padded_settled + cache.recent] = inputs.ancestry[:, :, :-rows]
        ancestry[:slots, :, past:] = inputs.ancestry[:, :, -rows:]
        marks = inputs.marked_ids
        cache.padded_marks = max(cache.padded_marks, bucket_size(marks.shape[2], FEWEST_MARKS))
        # pad with a copy of the first id: marking an id twice changes nothing
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

    def prepare_attention(self, layers: Sequence[int]) -> None:
        """See AttentionBackend.prepare_attention; for an inner backend that is one."""
        cast("AttentionBackend", self.inner).prepare_attention(layers)

    def attention(self, cache: PaddedCache) -> NDArray[np.float32]:
        """See AttentionBackend.attention."""
        return cast("AttentionBackend", self.inner).attention(cache.inner)[: cache.slots]

    def regroup(self, cache: PaddedCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        num_slots, settled = columns.shape
        padded_slots = cache.padded_slots
        while padded_slots > cache.fewest_slots and num_slots <= -(-padded_slots // SHRINK):
            padded_slots = max(cache.fewest_slots, -(-padded_slots // SHRINK))
        padded_settled = max(cache.padded_settled, bucket_size(settled, FEWEST_SETTLED))
        front = cache.padded_settled - cache.settled
        padded_columns = np.zeros((padded_slots, padded_settled), np.int64)
        padded_columns[:num_slots, padded_settled - settled :] = columns + front
        kept_slots = np.append(slots, np.arange(num_slots, padded_slots))
        self.inner.regroup(cache.inner, kept_slots, padded_columns, keep_recent=True)
        cache.slots, cache.padded_slots = num_slots, padded_slots
        cache.settled, cache.padded_settled, cache.recent = settled, padded_settled, 0


def _padded(array: NDArray[Number], more: int, value: float) -> NDArray[Number]:
    """Return the array with `more` slots appended, filled with `value`."""
    if more == 0:
        return array
    return np.concatenate([array, np.full((more, *array.shape[1:]), value, array.dtype)])
