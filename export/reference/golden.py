"""Golden recordings: synthetic pictures and settings, and what `generate` says of them; knows no bundle."""

from __future__ import annotations

import numpy as np
from PIL import Image

from engine.errors import CheckpointError
from engine.machine.verify import UNRECORDED, Golden
from engine.options import options_from
from export.reference.huggingface import Reference

NEUTRAL = {"min_length": 0, "length_penalty": 1.0, "early_stopping": False}
GOLDEN_SETTINGS = (
    NEUTRAL | {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 24},
    NEUTRAL | {"num_beams": 3, "no_repeat_ngram_size": 0, "max_new_tokens": 12, "prompt": "a picture of the"},
    NEUTRAL | {"num_beams": 4, "no_repeat_ngram_size": 3, "max_new_tokens": 30, "min_new_tokens": 30},
    NEUTRAL
    | {
        "num_beams": 4,
        "no_repeat_ngram_size": 2,
        "max_new_tokens": 20,
        "length_penalty": 2.0,
        "early_stopping": "never",
    },
    NEUTRAL | {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 24, "repetition_penalty": 1.5},
    NEUTRAL | {"num_beams": 3, "no_repeat_ngram_size": 3, "max_new_tokens": 24, "repetition_penalty": 2.5},
)
"""What they leave out is off, whatever a checkpoint's own defaults are: `Reference.generate` says so to generate. In
the last one the words that captions of the first began with are banned."""
GOLDEN_IMAGES = 3
LONGEST_PROMPT = 24
"""Room kept for the golden prompt where a checkpoint has few positions."""


def golden_pictures(size: int) -> np.ndarray:
    """Return smooth synthetic pictures u8[N,size,size,3], the same on every machine: sums of a few cosine waves."""
    rng = np.random.default_rng(20260101)
    y, x = np.mgrid[0:size, 0:size] / size
    pictures = []
    for _ in range(GOLDEN_IMAGES):
        channels = []
        for _ in range(3):
            waves = [np.cos(2 * np.pi * (fx * x + fy * y) + p) for fx, fy, p in rng.uniform(-4, 4, (4, 3))]
            channels.append(np.sum(waves, 0))
        picture = np.stack(channels, -1)
        span = picture.max() - picture.min()
        pictures.append(np.round((picture - picture.min()) / span * 255).astype(np.uint8))
    return np.stack(pictures)


def record_golden(reference: Reference) -> Golden:
    """Record `generate` on synthetic pictures in every one of GOLDEN_SETTINGS."""
    pictures = golden_pictures(reference.model.config.vision_config.image_size)
    pixel_values = reference.pixels([Image.fromarray(picture) for picture in pictures])
    room = max(1, reference.model.config.text_config.max_position_embeddings - LONGEST_PROMPT)
    lengths = ("max_new_tokens", "min_new_tokens")
    settings = [s | {name: min(s[name], room) for name in lengths if name in s} for s in GOLDEN_SETTINGS]
    all_ids, all_scores = [], []
    for setting in settings:
        if setting is settings[-1]:
            setting |= {"bad_words_ids": _first_words(all_ids[0], reference)}
        captions = [best for best, *_ in reference.generate(pixel_values, options_from({}, setting))]
        if not all(c.score is None or np.isfinite(c.score) for c in captions):
            raise CheckpointError("the model's scores are NaN or infinite: its weights are too large, or damaged")
        ids = np.full((len(captions), max(len(c.ids) for c in captions)), UNRECORDED, np.int64)
        for row, c in zip(ids, captions, strict=True):
            row[: len(c.ids)] = c.ids
        all_ids.append(ids)
        all_scores.append(np.array([np.nan if c.score is None else c.score for c in captions], np.float32))
    return Golden(pictures, settings, all_ids, all_scores)


def _first_words(ids: np.ndarray, reference: Reference) -> list[list[int]]:
    """Return what to ban, given captions i64[N,L]: the first id of one, the second and third together of the others."""
    ends = {reference.model.config.text_config.sep_token_id, UNRECORDED}
    (first, *others) = ids.tolist()
    words = [first[1:2], *(row[2:4] for row in others)]
    return [word for word in words if word and not ends.intersection(word)]
