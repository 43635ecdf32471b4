"""Sampling: one caption is drawn per slot, for candidates that differ more than beams do.

The warpers and their order are Hugging Face's: temperature, top-k, top-p (transformers 4.57,
generation/logits_process.py). Every caption has its own random generator, seeded by the content of its image, so that
it does not depend on the images in other slots.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """Sampling settings: `copies` captions per image, drawn from the `top_k` most likely tokens up to mass `top_p`."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    copies: int


def probabilities(log_probs: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Return the probabilities f64[B,C] of the C most likely tokens of each row, given f32[B,C] in descending order."""
    scaled = log_probs.astype(np.float64) / sampling.temperature
    chances = np.exp(scaled - scaled[:, :1])
    chances /= chances.sum(1, keepdims=True)
    before = np.cumsum(chances, 1) - chances  # a token stays if the mass of more likely ones is below top_p
    chances[:, 1:][before[:, 1:] >= sampling.top_p] = 0.0
    chances /= chances.sum(1, keepdims=True)
    return chances


def draw(log_probs: NDArray[np.float32], uniform: NDArray[np.float64], sampling: Sampling) -> NDArray[np.int64]:
    """Return the token each row draws, i64[B] in [0, C), for random numbers f64[B] in [0, 1)."""
    reached = np.cumsum(probabilities(log_probs, sampling), 1)
    reached /= reached[:, -1:]
    return np.asarray((reached <= uniform[:, None]).sum(1), np.int64)


def generator(seed: int, key: object, copy: int) -> np.random.Generator:
    """Return the random generator of one caption: equal for equal seed, image and copy, in any process."""
    # not hash(): Python salts the hash of strings and bytes per process
    digest = hashlib.blake2b(repr((seed, key, copy)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
