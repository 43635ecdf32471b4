"""Hugging Face's logits processors as lists of banned and penalised token ids.

Source of the rules: transformers 4.57, generation/logits_process.py (RepetitionPenalty, NoRepeatNGram, NoBadWords,
MinLength, MinNewTokensLength, SuppressTokens and SuppressTokensAtBegin), in the order of GenerationMixin's
_get_logits_processor: the penalty comes first and bans override it. Scores are not needed here: the decoder graph
applies the lists, so that log-probabilities over the vocabulary never leave the device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_MARKED = -1

Tokens = NDArray[np.integer[Any]]
Listed = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Bans of B x K beams as two arrays i64[N]: the row b * K + k, and an id that is banned there."""


def penalised(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the marks of penalised ids. The function is its own inverse. The mark of a banned id is the id itself."""
    return -2 - ids


@dataclass(frozen=True)
class Processors:
    """The logits processors of a search. Empty, 0 and 1.0 mean off.

    `suppressed` ids are banned everywhere, `begin_suppressed` ids as the first token after the prompt. The last id of
    a `banned_sequences` entry (two ids or more) is banned where the text ends in the others.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppressed: tuple[int, ...] = ()
    begin_suppressed: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()

    @property
    def has_penalty(self) -> bool:
        """Whether tokens that are already in the text are penalised."""
        return self.repetition_penalty != 1.0

    def marked_ids(
        self,
        tokens: Tokens,
        lengths: NDArray[np.int64],
        *,
        prompt_lengths: NDArray[np.int64],
        min_lengths: NDArray[np.int64],
        eos: int,
    ) -> NDArray[np.int64]:
        """Return the marks of B x K beams for StepInputs.marked_ids, i64[B,K,M] with M at least 1.

        The first lengths i64[B] ids of tokens i32[B,K,W'] are valid, prompt and start token included. `eos` is banned
        in rows shorter than min_lengths i64[B].
        """
        slots, beams, _ = tokens.shape
        # Lists instead of a mask over the vocabulary: of 30,524 ids a row bans a handful, and a mask of B x K x V
        # would have to be filled and copied to the device at every step.
        listed = [repeated_ngrams(tokens, lengths, self.no_repeat_ngram_size)]
        if len(short := np.flatnonzero(lengths < min_lengths)):
            listed.append(_in_slots(short, beams, (eos,)))
        if self.begin_suppressed and len(first := np.flatnonzero(lengths == prompt_lengths)):
            listed.append(_in_slots(first, beams, self.begin_suppressed))
        listed += completed_sequences(tokens, lengths, self.banned_sequences)
        rows, ids = _merged(listed)
        # the common case (n-gram ban alone): the table is as narrow as the longest list, often one column
        if not self.has_penalty and not self.suppressed:
            return _table(rows, ids, slots * beams).reshape(slots, beams, -1)
        always = np.array(self.suppressed, np.int64)
        columns = [np.broadcast_to(always, (slots * beams, len(always)))]
        if self.has_penalty:
            said, is_listed = _said_before(tokens, lengths, (rows, ids), always)
            columns.append(said)
            # what is in the text already has its mark there, banned or penalised; it must not get a second one
            rows, ids = rows[~is_listed], ids[~is_listed]
        known = np.concatenate(columns, 1)
        if len(rows):
            table = _table(rows, ids, slots * beams)
            # unused cells repeat a mark of their row: writing the same value twice does no harm, -1 would mark a token
            table = np.where(table == NOT_MARKED, known[:, :1], table)
            known = np.concatenate([known, table], 1)
        return known.reshape(slots, beams, -1)


def repeated_ngrams(tokens: Tokens, lengths: NDArray[np.int64], ngram_size: int) -> Listed:
    """Return the ids that would repeat an n-gram of their beam, rows in ascending order.

    Prompt and start token count. Nearly all rows have no such id, so a list is faster than a mask over the vocabulary.
    """
    slots, beams, _ = tokens.shape
    width = int(lengths.max(initial=0))
    if ngram_size == 0 or width < ngram_size:
        return _NOTHING
    if ngram_size == 1:
        repeats = np.ones((slots, beams, width), bool)
    else:  # find earlier occurrences of the last token: few positions, whose other n - 2 tokens are compared below
        repeats = tokens[:, :, :width] == tokens[np.arange(slots), :, lengths - 1][:, :, None]
    rows, places = np.divmod(np.flatnonzero(repeats), width)
    places -= max(0, ngram_size - 2)
    slot, beam = np.divmod(rows, beams)
    # the whole n-gram must lie within the text: the last token itself is no earlier occurrence
    is_same = (places >= 0) & (places + ngram_size <= lengths[slot])
    for j in range(ngram_size - 2):
        is_same &= tokens[slot, beam, places + j] == tokens[slot, beam, lengths[slot] - ngram_size + 1 + j]
    rows, slot, beam, places = rows[is_same], slot[is_same], beam[is_same], places[is_same]
    return rows, tokens[slot, beam, places + ngram_size - 1].astype(np.int64)


def completed_sequences(
    tokens: Tokens, lengths: NDArray[np.int64], sequences: tuple[tuple[int, ...], ...]
) -> list[Listed]:
    """Return the ids that would complete one of the sequences.

    A sequence of n ids applies only to rows of at least n ids, as in transformers 4.57. Release 5.24 also applies it to
    rows of n - 1 ids. Only a sequence that begins with the start token can match those, and resolve_search refuses it.
    """
    beams, listed = tokens.shape[1], []
    # sequences of one length are compared in one operation, because a list of bad words may be long
    for size, group in groupby(sorted(sequences, key=len), key=len):
        same_size = np.array(list(group))
        long_enough = np.flatnonzero(lengths >= size)
        places = lengths[long_enough, None] - (size - 1) + np.arange(size - 1)
        ends = tokens[long_enough[:, None], :, places].transpose(0, 2, 1).reshape(-1, 1, size - 1)
        row, which = np.nonzero((ends == same_size[:, :-1]).all(2))
        rows = (long_enough[:, None] * beams + np.arange(beams)).ravel()
        listed.append((rows[row], same_size[which, -1]))
    return listed


_NOTHING: Listed = np.zeros(0, np.int64), np.zeros(0, np.int64)


def _in_slots(slots: NDArray[np.int64], beams: int, ids: tuple[int, ...]) -> Listed:
    """Return bans of `ids` in all beams of `slots`."""
    rows = (slots[:, None] * beams + np.arange(beams)).ravel()
    return np.repeat(rows, len(ids)), np.tile(np.array(ids, np.int64), len(rows))


def _merged(listed: list[Listed]) -> Listed:
    """Return all bans as one list, rows in ascending order."""
    if len(listed) == 1:
        return listed[0]
    rows, ids = np.concatenate([rows for rows, _ in listed]), np.concatenate([ids for _, ids in listed])
    order = np.argsort(rows, kind="stable")
    return rows[order], ids[order]


def _table(rows: NDArray[np.int64], ids: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """Return bans (rows ascending) as i64[num_rows,M]; a row with fewer than M bans repeats its first one."""
    counts = np.bincount(rows, minlength=num_rows)
    table = np.full((num_rows, max(1, int(counts.max(initial=0)))), NOT_MARKED, np.int64)
    if len(rows):
        first = np.cumsum(counts) - counts
        table[rows] = ids[first[rows]][:, None]
        table[rows, np.arange(len(rows)) - first[rows]] = ids
    return table


def _said_before(
    tokens: Tokens, lengths: NDArray[np.int64], banned: Listed, always: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the marks i64[B*K,W'] of the ids in each row, and bool[N]: which of the N `banned` pairs are among them.

    An id in a row is penalised, or banned if `banned` or `always` lists it. The graph scatters all marks of a row at
    once, in no defined order, so one id must not have two different marks. The result is as wide as the longest caption
    possible, because every width is another shape for the device.
    """
    slots, beams, width = tokens.shape
    rows, ids = banned
    past = tokens.astype(np.int64).reshape(slots * beams, width)
    # cells after the text repeat its first id, whose mark is the same each time
    beyond = np.arange(width) >= np.repeat(lengths, beams)[:, None]
    past = np.where(beyond, past[:, :1], past)
    is_banned = np.isin(past, always) if len(always) else np.zeros(past.shape, bool)
    is_same = past[rows] == ids[:, None]
    listed, place = np.nonzero(is_same)
    is_banned[rows[listed], place] = True
    return np.where(is_banned, past, penalised(past)), is_same.any(1)


def process(
    log_probs: NDArray[np.float32],
    logits: NDArray[np.float32],
    marked_ids: NDArray[np.int64],
    penalties: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return log-probabilities f32[N,V] with the marks i64[N,M] of each row applied, as the decoder graph does it.

    penalties f32[2] apply to the raw logits f32[N,V], whose change is added, and to the log-probabilities.
    """
    processed = log_probs.copy()
    for row, marks in enumerate(marked_ids):
        said = penalised(marks[marks < NOT_MARKED])
        raw, now = logits[row, said], log_probs[row, said]
        now = now + (np.where(raw < 0, raw * penalties[0], raw / penalties[0]) - raw)
        processed[row, said] = np.where(now < 0, now * penalties[1], now / penalties[1])
        processed[row, marks[marks >= 0]] = -np.inf
    return processed


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
    # float64, because the sum of many small chances is compared with top_p and with the random number
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
    # rounding may leave the last sum just below 1, and a number between would draw a token that does not exist
    reached /= reached[:, -1:]
    return np.asarray((reached <= uniform[:, None]).sum(1), np.int64)


def generator(seed: int, key: object, copy: int) -> np.random.Generator:
    """Return the random generator of one caption: equal for equal seed, image and copy, in any process."""
    # not hash(): Python salts the hash of strings and bytes per process
    digest = hashlib.blake2b(repr((seed, key, copy)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
