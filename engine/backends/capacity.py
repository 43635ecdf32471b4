"""How many images are decoded in parallel: enough to keep the device busy, and no more than fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

from engine.bundle.manifest import ModelDims
from engine.decoding.backend import BatchSizes
from engine.decoding.beam import Search
from engine.decoding.scheduler import SETTLE_EVERY
from engine.host import available_memory

MEMORY_SHARE = 0.25
"""Share of the available memory that the KV cache may take."""
COPIES = 3
"""Versions of a growing tensor that are alive at once: the old one, the new one, and one that is being regrouped."""


def slots_for(
    search: Search,
    models: Sequence[ModelDims],
    batch_sizes: BatchSizes,
    *,
    rows: int | None = None,
    memory_bytes: int | None = None,
) -> int:
    """Return the number of slots B for about `rows` beams in flight; each slot has a KV cache in every model.

    `rows` None means the backend's preferred number, limited to MEMORY_SHARE of `memory_bytes` (None: the memory that
    is available now, on the device or on the host). An explicit `rows` is not limited.
    """
    if rows is not None:
        return max(1, rows // search.num_beams)
    memory_bytes = batch_sizes.memory_bytes if memory_bytes is None else memory_bytes
    memory_bytes = available_memory() if memory_bytes is None else memory_bytes
    a_slot = sum(slot_bytes(search, model, batch_sizes.item_bytes) for model in models)
    affordable = int(MEMORY_SHARE * memory_bytes) // a_slot
    return max(1, min(batch_sizes.rows // search.num_beams, affordable, batch_sizes.slots or affordable))


def slot_bytes(search: Search, model: ModelDims, item_bytes: int = 4) -> int:
    """Return an estimate of the most bytes that the KV cache of one slot takes, in elements of `item_bytes`.

    Folded positions are those that some beam descends from. In theory that is max_length for every beam; in practice
    beams share their past except for the last few tokens. The estimate is max_length plus 2 * SETTLE_EVERY steps of K.
    """
    position = 2 * model.num_layers * model.num_heads * model.head_width * item_bytes
    grown = search.max_length + 2 * SETTLE_EVERY * search.num_beams
    return position * (model.encoder_positions + COPIES * grown)
