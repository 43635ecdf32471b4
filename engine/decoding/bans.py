"""Which token ids a row may not take next: Hugging Face's logits processors as lists of banned ids.

Source of the rules: transformers 4.57, generation/logits_process.py (NoRepeatNGramLogitsProcessor,
MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor). Knows nothing of scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_BANNED = -1


def repeated_ngrams(
    tokens: NDArray[np.integer[Any]], lengths: NDArray[np.int64], ngram_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bans of B x K beams as two lists i64[N]: the row b * K + k, ascending, and an id it may not take.

    An id is banned that would complete an n-gram the beam already holds. tokens i32[B,K,W'] hold lengths i64[B] valid
    ids each, prompt and [DEC] included; both count. Nearly all rows have none, so that a list is what is quick.
    """
    slots, beams, _ = tokens.shape
    width = int(lengths.max(initial=0))
    if ngram_size == 0 or width < ngram_size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if ngram_size == 1:
        repeats = np.ones((slots, beams, width), bool)
    else:  # where the last token stands elsewhere, too: few places, of which the rest is looked at one by one
        repeats = tokens[:, :, :width] == tokens[np.arange(slots), :, lengths - 1][:, :, None]
    rows, places = np.divmod(np.flatnonzero(repeats), width)
    places -= max(0, ngram_size - 2)
    slot, beam = np.divmod(rows, beams)
    is_same = (places >= 0) & (places + ngram_size <= lengths[slot])
    for j in range(ngram_size - 2):
        is_same &= tokens[slot, beam, places + j] == tokens[slot, beam, lengths[slot] - ngram_size + 1 + j]
    rows, slot, beam, places = rows[is_same], slot[is_same], beam[is_same], places[is_same]
    return rows, tokens[slot, beam, places + ngram_size - 1].astype(np.int64)


def banned_ids(
    tokens: NDArray[np.integer[Any]], lengths: NDArray[np.int64], *, ngram_size: int, min_length: int, eos: int
) -> NDArray[np.int64]:
    """Return every ban of B x K beams as StepInputs.banned_ids wants them: i64[B,K,M], M at least 1.

    `eos` is banned in rows whose length is below min_length.
    """
    slots, beams, _ = tokens.shape
    rows, ids = repeated_ngrams(tokens, lengths, ngram_size)
    if short := np.flatnonzero(lengths < min_length).tolist():
        ends = (np.array(short)[:, None] * beams + np.arange(beams)).ravel()
        rows, ids = np.concatenate([rows, ends]), np.concatenate([ids, np.full(len(ends), eos)])
        order = np.argsort(rows, kind="stable")
        rows, ids = rows[order], ids[order]
    counts = np.bincount(rows, minlength=slots * beams)
    most = max(1, int(counts.max(initial=0)))
    bans = np.full((slots * beams, most), NOT_BANNED, np.int64)
    if len(rows):
        first = np.cumsum(counts) - counts
        bans[rows] = ids[first[rows]][:, None]  # a row with bans is filled up with its first
        bans[rows, np.arange(len(rows)) - first[rows]] = ids
    return bans.reshape(slots, beams, most)
