"""What a backend does for the decoding core, and the shape letters used everywhere; knows no runtime.

Shape letters:
  B  slots: images decoded side by side       K  beams an image
  T  tokens fed a slot in one step, K         P  length of the prompt
  H  attention heads        d  width of a head        L  decoder layers
  S  encoder positions      V  vocabulary             M  width of the list of marked ids
  F  settled positions      R  recent positions       C  candidates kept an image
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Encoded = Any
"""A backend's own handle on the cross-attention keys and values of a batch of images, not yet in a slot."""

Cache = Any
"""A backend's own handle on the keys and values of B slots; the decoding core only passes it around."""


@dataclass(frozen=True)
class StepInputs:
    """One decoding step for B slots.

    input_ids      i64[B,T]      tokens fed
    positions      i64[B,T]      their positions in the caption, 0 for [DEC]
    scores         f32[B,T]      running log-probability of each row; -inf for a row whose continuations nobody wants
    marked_ids     i64[B,T,M]    x >= 0: the log-probability of id x becomes -inf; x < -1: the row said id -2 - x
                                 before, and the penalties apply; no id has two different marks, a row with fewer
                                 than M repeats some; -1 throughout in a row without marks
    penalties      f32[2]        repetition penalties on raw logits and on log-probabilities; 1 is none
    ancestry       bool[B,T,F+R+T]  which cached and fed positions are a row's own past, itself included
    num_candidates C             how many continuations to return for each slot
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    marked_ids: NDArray[np.int64]
    penalties: NDArray[np.float32]
    ancestry: NDArray[np.bool_]
    num_candidates: int


@dataclass(frozen=True)
class BatchSizes:
    """What keeps a device busy: beams decoded side by side, and images encoded at once; at most `slots` images.

    They are divided into `sets` that take turns, so that the device works on one while the host chooses beams for
    another. `memory_bytes` is what the device has for keys and values of `item_bytes` each; None means the host's free
    memory.
    """

    rows: int
    encode_batch: int
    slots: int | None = None
    sets: int = 1
    memory_bytes: int | None = None
    item_bytes: int = 4


class Backend(Protocol):
    """Runs the three graphs of a bundle. Keys and values stay with it, behind `Encoded` and `Cache`."""

    name: str
    batch_sizes: BatchSizes

    def encode(self, pixel_values: NDArray[np.uint8]) -> Encoded:
        """Encode images u8[N,height,width,3] into their cross-attention keys and values, good until the next call."""
        ...

    def allocate(self, num_slots: int) -> Cache:
        """Return a cache of num_slots empty slots (F = R = 0)."""
        ...

    def admit(self, cache: Cache, slot: int, encoded: Encoded, image: int) -> None:
        """Put image `image` of an encoded batch into a slot, whoever was there before.

        Self-attention positions stay as they are: the ancestry mask of the newcomer hides them.
        """
        ...

    def step(self, cache: Cache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Feed T tokens a slot, append their keys and values to the recent ones in `cache`, and return the best
        candidates: scores f32[B,C] in descending order and ids i64[B,C], an id being row * V + token.
        """
        ...

    def regroup(self, cache: Cache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """Keep the slots at `slots` i64[B'] and, of each, the positions `columns` i64[B',F'].

        Slot i of the kept ones comes from its own place or from one that nobody moves to: slots[i] is i, or j > i with
        slots[j] either j or not kept.

        Positions count settled ones first, then recent ones; all that are kept become settled (R = 0). A
        position may be named more than once, to fill up a row; the ancestry mask hides it.
        """
        ...
