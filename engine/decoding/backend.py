"""The interface between the decoding core and a runtime, and the shape letters used in all docstrings.

Shape letters:
  B  slots: images decoded in parallel        K  beams per image
  T  tokens fed per slot in one step, T = K   P  length of the prompt
  H  attention heads        d  size of a head         L  decoder layers
  S  encoder positions      V  vocabulary size        M  width of the list of marked ids
  F  folded positions       R  recent positions       C  candidates kept per image

The KV cache of self-attention has two blocks. A step appends its keys and values to the `recent` block, which is
small. Every few steps `regroup` folds the recent block into the large one, called `settled` in the graphs. Growing the
large block at every step would copy it every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Encoded = Any
"""A backend's handle to the cross-attention keys and values of a batch of images that are not yet in a slot."""

Cache = Any
"""A backend's handle to the KV cache of B slots; the decoding core only passes it on."""


@dataclass(frozen=True)
class StepInputs:
    """One decoding step for B slots.

    input_ids      i64[B,T]      tokens fed
    positions      i64[B,T]      their positions in the caption, 0 for the start token
    scores         f32[B,T]      summed log-probability of each row; -inf for a row whose continuations are not used
    marked_ids     i64[B,T,M]    banned and penalised ids. x >= 0: id x gets the log-probability -inf. x < -1: id
                                 -2 - x is already in the row's text, and the repetition penalty applies. No id has two
                                 different marks. A row with fewer than M marks repeats some, a row without marks holds
                                 -1 throughout
    penalties      f32[2]        repetition penalties on raw logits and on log-probabilities; 1 is off
    ancestry       bool[B,T,F+R+T]  which cached and fed positions belong to a row's past, itself included
    num_candidates C             continuations to return per slot
    """

    # Scores and marks are sent and only candidates come back: logits over the vocabulary never leave the device, which
    # for 64 beams of BLIP would be 8 MB a step.
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    marked_ids: NDArray[np.int64]
    penalties: NDArray[np.float32]
    ancestry: NDArray[np.bool_]
    num_candidates: int


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes that keep a device busy.

    `rows` beams are in flight at once, for at most `slots` images, and `encode_batch` images are encoded per call. The
    slots are divided into `sets` that take turns: the device works on one set while the host chooses beams for
    another. `memory_bytes` is the device's memory for the KV cache, in elements of `item_bytes`; None means the host's
    free memory.
    """

    rows: int
    encode_batch: int
    slots: int | None = None
    sets: int = 1
    memory_bytes: int | None = None
    item_bytes: int = 4


class Backend(Protocol):
    """Runs the three graphs of a bundle. Keys and values never leave it: callers hold `Encoded` and `Cache` handles."""

    name: str
    batch_sizes: BatchSizes

    def encode(self, pixel_values: NDArray[np.uint8]) -> Encoded:
        """Encode images u8[N,height,width,3] into cross-attention keys and values, valid until the next call.

        Those of a backend that is one of several for a run must be valid until they are dropped: another backend may
        admit them later.
        """
        ...

    def allocate(self, num_slots: int) -> Cache:
        """Return a cache of num_slots empty slots (F = R = 0)."""
        ...

    def admit(self, cache: Cache, slot: int, encoded: Encoded, image: int) -> None:
        """Put image number `image` of an encoded batch into a slot and overwrite the image that was there.

        Self-attention positions of the slot's previous image stay in the cache: the ancestry mask hides them.
        """
        ...

    def step(self, cache: Cache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Feed T tokens per slot and append their keys and values to the recent block of `cache`.

        Returns the best candidates of each slot: scores f32[B,C] in descending order and ids i64[B,C], where an id is
        row * V + token.
        """
        ...

    def regroup(self, cache: Cache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """Keep the slots at `slots` i64[B'] and, of each, the positions `columns` i64[B',F'], all folded (R = 0).

        Columns count folded positions first, then recent ones. A position may occur more than once to fill up a row;
        the ancestry mask hides the repeats. Kept slot i is either old slot i or an old slot j > i, and in that case
        no other slot moves to j: slots may be copied in place, in ascending order.
        """
        ...


class AttentionBackend(Backend, Protocol):
    """A backend that can also return where the tokens look (engine/backends/attention.py)."""

    def prepare_attention(self, layers: Sequence[int]) -> None:
        """Load what `attention` needs to average over these decoder layers, before caches are allocated."""
        ...

    def attention(self, cache: Cache) -> NDArray[np.float32]:
        """Return f32[B,T,S], the weights of the tokens fed by the latest step of `cache` over the image's positions.

        They are averaged over heads and the layers of prepare_attention. The step that feeds a token chooses the next.
        """
        ...
