"""Record golden captions: what Hugging Face's `generate` returns for synthetic images under several settings.

`engine verify` replays the recording of a bundle. This module does not depend on bundles.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.machine.verify import TASK, UNRECORDED, Golden, Ids
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
        "max_length": 21,
        "length_penalty": 2.0,
        "early_stopping": "never",
        "num_return_sequences": 3,
    },
    NEUTRAL | {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 24, "repetition_penalty": 1.5},
    NEUTRAL
    | {
        "num_beams": 3,
        "no_repeat_ngram_size": 3,
        "max_new_tokens": 24,
        "min_length": 6,
        "repetition_penalty": 2.5,
        "early_stopping": True,
    },
)
"""Settings that are recorded. Each decoding option, except those for sampling, is in one of them or in BANS.

An option that a setting lacks is off, even if the checkpoint's default differs: `Reference.generate` passes it to
generate explicitly."""
BANS = {1: ("bad_words",), 3: ("suppress_tokens",), 5: ("bad_words_ids", "begin_suppress_tokens")}
"""Options that ban ids, by the index of the setting that gets them.

The ids are taken from the captions without the ban, so that each ban changes a caption."""
GOLDEN_IMAGES = 3
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
"""Options that are recorded as the checkpoint has them: without them its captions would make no sense."""
LONGEST_PROMPT = 24
"""Positions reserved for the golden prompt if a checkpoint has few positions."""


def golden_pictures(size: int) -> np.ndarray:
    """Return smooth synthetic images u8[N,size,size,3], sums of a few cosine waves. They are equal on every machine."""
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
    """Record the captions of `generate` on the golden images under each of GOLDEN_SETTINGS.

    Tokens that the checkpoint forces are forced in each. The settings of a model with tasks are for its tasks in turn.
    Raises CheckpointError if the model's scores are not finite.
    """
    sizes, tasks = reference.sizes, list(reference.tasks)
    own = reference.family.generation_config(reference.model).to_diff_dict()
    forced = {name: own[name] for name in FORCED if own.get(name) is not None}
    pictures = golden_pictures(sizes.image_size)
    pixel_values = reference.normalised(pictures)
    limits = dict.fromkeys(("max_length", "min_length"), sizes.max_positions)
    limits |= dict.fromkeys(("max_new_tokens", "min_new_tokens"), max(1, sizes.max_positions - LONGEST_PROMPT))
    settings: list[dict[str, Any]] = [
        setting | {name: min(setting[name], limit) for name, limit in limits.items() if name in setting} | forced
        for setting in GOLDEN_SETTINGS
    ]
    golden = Golden(pictures, settings, [], [])
    for number, setting in enumerate(settings):
        if tasks:
            setting[TASK] = tasks[number % len(tasks)]
            reference = replace(reference, task=setting[TASK])
        captions = reference.generate(pixel_values, golden.options(number))
        if number in BANS:
            prompt, first = setting.get("prompt"), forced.get("forced_bos_token_id")
            _, start = reference.family.prompt_arguments(reference.tokenizer, prompt, 1, first)
            bans = _bans([best.ids[start:] for best, *_ in captions], reference, set(forced.values()))
            setting |= {name: bans[name] for name in BANS[number] if bans[name]}
            captions = reference.generate(pixel_values, golden.options(number))
        if not all(best.score is None or np.isfinite(best.score) for best, *_ in captions):
            raise CheckpointError("the model's scores are NaN or infinite: its weights are too large, or damaged")
        golden.ids.append(_table([best.ids for best, *_ in captions]))
        scores = [np.nan if best.score is None else best.score for best, *_ in captions]
        golden.scores.append(np.array(scores, np.float32))
        if len(captions[0]) > 1:
            alternatives = _table([caption.ids for _, *others in captions for caption in others])
            golden.alternatives[number] = alternatives.reshape(len(captions), len(captions[0]) - 1, -1)
    return golden


def _table(captions: list[Ids]) -> np.ndarray:
    """Return the ids of captions as i64[N,L], padded with UNRECORDED."""
    table = np.full((len(captions), max(map(len, captions))), UNRECORDED, np.int64)
    for row, ids in zip(table, captions, strict=True):
        row[: len(ids)] = ids
    return table


def _bans(captions: list[Ids], reference: Reference, forced: set[int]) -> dict[str, Any]:
    """Return a value for each option of BANS that bans something in these captions (without their prompts).

    Tokens that are `forced` are not banned.
    """
    tokens = reference.sizes.tokens
    words = [[token for token in ids if token not in (tokens.eos, *forced)] for ids in captions]
    first, *others = words
    distinct = list(dict.fromkeys(token for ids in words for token in ids))
    return {
        "bad_words_ids": [ids for ids in (first[:1], *(ids[1:3] for ids in others)) if ids],
        "suppress_tokens": distinct[1:2] or [tokens.pad],
        "begin_suppress_tokens": list(dict.fromkeys(ids[0] for ids in words if ids)) or [tokens.eos],
        "bad_words": _spelled(words, reference),
    }


def _spelled(captions: list[list[int]], reference: Reference) -> list[str]:
    """Return a text of up to 3 ids of a caption, one of whose spellings has the same ids.

    If there is none (captions of word pieces or special ids only), return a word of the vocabulary, so that some text
    is banned.
    """
    tokenizer = reference.tokenizer
    spans = [ids[i : i + n] for ids in captions for n in (1, 2, 3) for i in range(len(ids) + 1 - n)]
    known = ([token] for token in range(reference.sizes.vocab_size))
    for ids in itertools.chain(spans, known):
        text = tokenizer.decode(ids).strip()
        is_plain = text.isalpha() and not set(ids) & set(tokenizer.all_special_ids)
        if is_plain and ids in reference.spellings(text):
            return [text]
    return []
