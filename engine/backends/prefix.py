"""A backend without a KV cache: it stores the tokens of each row and recomputes their log-probabilities.

A slow reference for tests and for tracing a mismatch: it has no cached keys that could be wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.decoding.backend import BatchSizes, StepInputs
from engine.decoding.processors import process


@dataclass
class PrefixCache:
    """The image in every slot, and the token at every cached position, i64[B,W]."""

    images: list[NDArray[np.uint8] | None]
    tokens: NDArray[np.int64]

    @classmethod
    def allocate(cls, num_slots: int) -> PrefixCache:
        """See Backend.allocate."""
        return cls([None] * num_slots, np.zeros((num_slots, 0), np.int64))

    def feed(self, inputs: StepInputs) -> list[list[tuple[int, ...]]]:
        """Append the step's tokens; return the past of each row, itself included, as B lists of T prefixes."""
        self.tokens = np.concatenate([self.tokens, inputs.input_ids], 1)
        return [
            [tuple(tokens[past].tolist()) for past in rows]
            for tokens, rows in zip(self.tokens, inputs.ancestry, strict=True)
        ]

    def regroup(self, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        self.images = [self.images[slot] for slot in slots]
        self.tokens = np.take_along_axis(self.tokens[slots], columns, 1)


class PrefixBackend(ABC):
    """Implements Backend on top of `log_probs`, which subclasses provide."""

    name = "prefix"
    batch_sizes = BatchSizes(rows=32, encode_batch=4)

    def logits(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return raw logits f32[len(prefixes),V]; a backend without them returns log-probabilities."""
        return self.log_probs(image, prefixes)

    @abstractmethod
    def log_probs(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return f32[len(prefixes),V], the log-probabilities of the next id after each prefix."""

    def encode(self, pixel_values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See Backend.encode."""
        return pixel_values

    def allocate(self, num_slots: int) -> PrefixCache:
        """See Backend.allocate."""
        return PrefixCache.allocate(num_slots)

    def admit(self, cache: PrefixCache, slot: int, encoded: NDArray[np.uint8], image: int) -> None:
        """See Backend.admit."""
        cache.images[slot] = encoded[image]

    def step(self, cache: PrefixCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step: log-probabilities, marks, plus running scores, best C, written in the simplest way."""
        prefixes = cache.feed(inputs)
        all_scores = np.full((len(prefixes), inputs.num_candidates), -np.inf, np.float32)
        all_ids = np.zeros(all_scores.shape, np.int64)
        for slot in np.flatnonzero(np.isfinite(inputs.scores).any(1)):
            image = cache.images[slot]
            assert image is not None
            log_probs = self.log_probs(image, prefixes[slot])
            on_logits = inputs.penalties[0] != 1
            logits = self.logits(image, prefixes[slot]) if on_logits else log_probs
            log_probs = process(log_probs, logits, inputs.marked_ids[slot], inputs.penalties)
            totals = (log_probs + inputs.scores[slot][:, None]).ravel()
            best = np.argsort(-totals, kind="stable")[: inputs.num_candidates]
            all_scores[slot, : len(best)], all_ids[slot, : len(best)] = totals[best], best
        return all_scores, all_ids

    def regroup(self, cache: PrefixCache, slots: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        cache.regroup(slots, columns)
