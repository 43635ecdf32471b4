"""How many images are decoded side by side: as many as keep the device busy, and as memory holds."""

from __future__ import annotations

from collections.abc import Sequence

from engine.bundle.manifest import ModelDims
from engine.decoding.backend import BatchSizes
from engine.decoding.beam import Search
from engine.decoding.scheduler import SETTLE_EVERY
from engine.host import available_memory

MEMORY_SHARE = 0.25
"""Share of the available memory that keys and values may take."""
COPIES = 3
"""Of a growing tensor at most this many are alive at once: the old one, the new one, and one being regrouped."""


def slots_for(
    search: Search,
    models: Sequence[ModelDims],
    batch_sizes: BatchSizes,
    *,
    rows: int | None = None,
    memory_bytes: int | None = None,
) -> int:
    """Return the number of slots B for about `rows` beams side by side, in each of which all `models` keep keys.

    `rows` None means as many as the device likes, bounded by MEMORY_SHARE of `memory_bytes` (None: what is
    available now, on the device or on the host). An explicit `rows` is taken at its word.
    """
    if rows is not None:
        return max(1, rows // search.num_beams)
    memory_bytes = batch_sizes.memory_bytes if memory_bytes is None else memory_bytes
    memory_bytes = available_memory() if memory_bytes is None else memory_bytes
    a_slot = sum(slot_bytes(search, model, batch_sizes.item_bytes) for model in models)
    affordable = int(MEMORY_SHARE * memory_bytes) // a_slot
    return max(1, min(batch_sizes.rows // search.num_beams, affordable, batch_sizes.slots or affordable))


def slot_bytes(search: Search, model: ModelDims, item_bytes: int = 4) -> int:
    """Return the bytes of keys and values a slot holds at most, items of `item_bytes`.

    Settled positions are those some beam descends from: at most all of every beam, in practice a shared past and
    a few of each; the bound taken is max_length and SETTLE_EVERY steps of K.
    """
    position = 2 * model.num_layers * model.num_heads * model.head_width * item_bytes
    grown = search.max_length + 2 * SETTLE_EVERY * search.num_beams
    return position * (model.encoder_positions + COPIES * grown)
