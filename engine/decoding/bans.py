"""Which token ids a row may not take next: Hugging Face's logits processors as lists of banned ids.

Source of the rules: transformers 4.57, generation/logits_process.py (NoRepeatNGramLogitsProcessor,
MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor). Knows nothing of scores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOT_BANNED = -1


def repeated_ngram_bans(tokens: NDArray[np.int64], lengths: NDArray[np.int64], ngram_size: int) -> NDArray[np.int64]:
    """Return i64[B,K,W]: for each beam the ids that would complete an n-gram it already holds, else NOT_BANNED.

    tokens i64[B,K,W'] hold lengths i64[B] valid ids each, prompt and [DEC] included; both count.
    """
    width = int(lengths.max())
    if ngram_size == 0 or width < ngram_size:
        return np.full((*tokens.shape[:2], 0), NOT_BANNED, np.int64)
    windows = width - ngram_size + 1
    repeats = np.broadcast_to(np.arange(windows) + ngram_size <= lengths[:, None], (len(tokens), windows))
    repeats = np.repeat(repeats[:, None], tokens.shape[1], 1)
    for j in range(ngram_size - 1):
        at = np.maximum(lengths - ngram_size + 1 + j, 0)[:, None, None]
        suffix = np.take_along_axis(tokens, np.broadcast_to(at, (*tokens.shape[:2], 1)), 2)
        repeats = repeats & (tokens[:, :, j : j + windows] == suffix)
    return np.where(repeats, tokens[:, :, ngram_size - 1 : width], NOT_BANNED)


def banned_ids(
    tokens: NDArray[np.int64], lengths: NDArray[np.int64], *, ngram_size: int, min_length: int, eos: int
) -> NDArray[np.int64]:
    """Return every ban of B x K beams as StepInputs.banned_ids wants them: i64[B,K,M], M at least 1.

    `eos` is banned in rows whose length is below min_length.
    """
    bans = repeated_ngram_bans(tokens, lengths, ngram_size)
    too_short = np.where(lengths < min_length, eos, NOT_BANNED)
    too_short = np.broadcast_to(too_short[:, None, None], (*tokens.shape[:2], 1))
    bans = np.concatenate([bans, too_short], 2)
    bans = -np.sort(-bans, 2)  # bans first, NOT_BANNED last
    most = max(1, int((bans != NOT_BANNED).sum(2).max()))
    bans = bans[:, :, :most]
    return np.where(bans == NOT_BANNED, bans[:, :, :1], bans)
