"""Tensor sizes on a GPU: few of them, and all within the profiles that TensorRT plans are built for.

Shape letters as in engine.decoding.backend. Independent of any runtime.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.bundle.graphs import NUM_CANDIDATES, cache_names, step_inputs
from engine.bundle.manifest import Bundle
from engine.decoding.backend import BatchSizes
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
"""Sets of slots that take turns on a GPU."""
ENCODE_BATCH = 16
"""Images encoded at once on a GPU. A guess: never measured."""
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
                raise BackendError(f"{name.replace('_', ' ')} is {size}, at most {most} is possible: {hint}")

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
        three = tuple(
            (size, model.num_heads, length, model.head_width) for size, length in zip(slots, positions, strict=True)
        )
        return dict.fromkeys(names[part], three)

    slots = (1, bounds.slots, bounds.slots)
    usual_beams = bounds.usual_beams or bounds.beams
    rows = (1, usual_beams, bounds.beams)
    settled = (FEWEST_SETTLED, min(4 * FEWEST_SETTLED, bounds.settled), bounds.settled)
    recent = (SETTLE_EVERY, SETTLE_EVERY * usual_beams, bounds.recent)
    marks = (FEWEST_MARKS, FEWEST_MARKS, bounds.marked_ids)
    width = tuple(sum(three) for three in zip(settled, recent, rows, strict=True))
    row = tuple(zip(slots, rows, strict=True))
    sizes: dict[str, tuple[Shape, ...]] = {
        "input_ids": row,
        "positions": row,
        "scores": row,
        "marked_ids": tuple((*two, m) for two, m in zip(row, marks, strict=True)),
        "ancestry": tuple((*two, w) for two, w in zip(row, width, strict=True)),
    }
    encoded = (1, bounds.encode_batch, bounds.encode_batch)
    return {
        "encoder": {"pixel_values": tuple((n, image.height, image.width, 3) for n in encoded)},
        "decoder": {
            **{name: sizes[field] for name, field in step_inputs(bundle.format).items() if field in sizes},
            NUM_CANDIDATES: ((1,), (2 * usual_beams,), (bounds.candidates,)),
            **keys("cross", slots, (model.encoder_positions,) * 3),
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
