"""Sampling instead of searching: one caption drawn a slot, for candidates that differ more than beams do.

The warpers are Hugging Face's in its order: temperature, top-k, top-p (transformers 4.57,
generation/logits_process.py). Every caption has a random generator of its own, seeded by its image, so that company in
other slots changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn: `copies` an image, from the `top_k` likeliest words whose probabilities reach `top_p`."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    copies: int


def probabilities(log_probs: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Return the chances f64[B,C] of the C likeliest words of each row, given f32[B,C] in descending order."""
    scaled = log_probs.astype(np.float64) / sampling.temperature
    chances = np.exp(scaled - scaled[:, :1])
    chances /= chances.sum(1, keepdims=True)
    before = np.cumsum(chances, 1) - chances  # a word stays while those before it fall short of top_p
    chances[:, 1:][before[:, 1:] >= sampling.top_p] = 0.0
    chances /= chances.sum(1, keepdims=True)
    return chances


def draw(log_probs: NDArray[np.float32], uniform: NDArray[np.float64], sampling: Sampling) -> NDArray[np.int64]:
    """Return which of the C words each row takes, i64[B], for random numbers f64[B] in [0, 1)."""
    reached = np.cumsum(probabilities(log_probs, sampling), 1)
    reached /= reached[:, -1:]
    return np.asarray((reached <= uniform[:, None]).sum(1), np.int64)


def generator(seed: int, key: object, copy: int) -> np.random.Generator:
    """Return the random generator of one caption: the same for the same seed, image and copy, wherever it is drawn."""
    digest = hashlib.blake2b(repr((seed, key, copy)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
