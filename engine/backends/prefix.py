"""A backend without keys and values: it keeps the tokens each row has seen and asks for their next log-probabilities.

The slow twin of the real ones, for tests and for tracing a mismatch: nothing cached can be stale in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import StepInputs


@dataclass
class PrefixCache:
    """The images u8[B,height,width,3] and the token at every cached position, i64[B,W]."""

    images: NDArray[np.uint8]
    tokens: NDArray[np.int64]

    def feed(self, inputs: StepInputs) -> list[list[tuple[int, ...]]]:
        """Append the step's tokens and return each row's own past, itself included: B lists of T prefixes."""
        self.tokens = np.concatenate([self.tokens, inputs.input_ids], 1)
        return [
            [tuple(tokens[past].tolist()) for past in rows]
            for tokens, rows in zip(self.tokens, inputs.ancestry, strict=True)
        ]

    def regroup(self, images: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        self.images = self.images[images]
        self.tokens = np.take_along_axis(self.tokens[images], columns, 1)


class PrefixBackend(ABC):
    """Implements Backend on top of `log_probs`."""

    name = "prefix"

    @abstractmethod
    def log_probs(self, image: NDArray[np.uint8], prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return f32[len(prefixes),V]: the log-probabilities of the id after each prefix."""

    def encode(self, pixel_values: NDArray[np.uint8]) -> PrefixCache:
        """See Backend.encode."""
        return PrefixCache(pixel_values, np.zeros((len(pixel_values), 0), np.int64))

    def step(self, cache: PrefixCache, inputs: StepInputs) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See Backend.step: log-probabilities, bans, + running scores, best C, written the plain way."""
        all_scores, all_ids = [], []
        for i, prefixes in enumerate(cache.feed(inputs)):
            log_probs = self.log_probs(cache.images[i], prefixes)
            for row, banned in enumerate(inputs.banned_ids[i]):
                log_probs[row, banned[banned >= 0]] = -np.inf
            totals = (log_probs + inputs.scores[i][:, None]).ravel()
            best = np.argsort(-totals, kind="stable")[: inputs.num_candidates]
            all_scores.append(totals[best])
            all_ids.append(best)
        return np.array(all_scores, np.float32), np.array(all_ids, np.int64)

    def regroup(self, cache: PrefixCache, images: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """See Backend.regroup."""
        cache.regroup(images, columns)
