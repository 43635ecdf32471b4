"""Beam search over the images in B slots: running beams, finished hypotheses, and the rule that closes an image.

Source of every rule: transformers 4.57, generation/utils.py, GenerationMixin._beam_search and the functions it calls.
The arithmetic is float32, as there, since a rounding difference can turn a tie. Images never influence each other.
This module does not depend on models or caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.decoding.processors import Processors, Sampling
from engine.errors import UsageError
from engine.options import DecodeOptions

NEVER = np.float32(-1e9)
"""Added to a score to rule it out. Finite, as in Hugging Face, so that two ruled-out scores still have an order."""


def _ruled_out(where: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return f32, NEVER where true and 0 elsewhere, to be added to scores."""
    ruled_out: NDArray[np.float32] = NEVER * where
    return ruled_out


@dataclass(frozen=True)
class _Candidates:
    """The C best continuations per slot: summed scores f32[B,C], continued beams i64[B,C], new ids i64[B,C]."""

    scores: NDArray[np.float32]
    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class Start:
    """The prompt of a caption, and its length limits as totals that include the prompt."""

    prompt: tuple[int, ...]
    max_length: int
    min_length: int


@dataclass(frozen=True)
class Search:
    """The settings of one search. An image may have its own Start, whose length is at most `max_length`.

    `forced_first` is the token that follows a start token without a prompt, `forced_last` the one that ends captions of
    the maximum length (None: any).
    """

    prompt: tuple[int, ...]
    num_beams: int
    max_length: int
    min_length: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    no_repeat_ngram_size: int
    num_return_sequences: int
    eos: int
    vocab_size: int
    sampling: Sampling | None = None
    repetition_penalty: float = 1.0
    suppressed: tuple[int, ...] = ()
    begin_suppressed: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    forced_first: int | None = None
    forced_last: int | None = None

    @cached_property
    def is_forcing(self) -> bool:
        """Whether the first or the last token of captions is forced."""
        return (self.forced_first, self.forced_last) != (None, None)

    @cached_property
    def start(self) -> Start:
        """The Start of images that have none of their own."""
        return Start(self.prompt, self.max_length, self.min_length)

    @cached_property
    def processors(self) -> Processors:
        """The logits processors of this search."""
        return Processors(
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            suppressed=self.suppressed,
            begin_suppressed=self.begin_suppressed,
            banned_sequences=self.banned_sequences,
        )

    @cached_property
    def penalties(self) -> NDArray[np.float32]:
        """Return f32[2], the repetition penalty on raw logits and on log-probabilities; 1 is off.

        Hugging Face applies it to raw logits in greedy search and sampling, and to log-probabilities in beam search.
        """
        on_logits = self.num_beams == 1
        return np.array([self.repetition_penalty, 1.0] if on_logits else [1.0, self.repetition_penalty], np.float32)

    @property
    def num_candidates(self) -> int:
        """Candidates per image and step: 2K, so that K can continue even if K of them end; 1 in greedy search, top_k
        when sampling.
        """
        if self.sampling is not None:
            return self.sampling.top_k
        return 1 if self.num_beams == 1 else 2 * self.num_beams


TRACE_DIGITS = 6
"""Decimals of token_log_probs, which are differences of float32 sums: later digits are rounding errors."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished caption: ids (prompt and end included), summed log-probability, score, log-probability of each token.

    score = sum_log_prob / new tokens ** length_penalty, Hugging Face's `sequences_scores`.
    token_log_probs are those of the new tokens, end included, as the search summed them: bans and min_length, which
    only rule other tokens out, do not change them, a repetition penalty does. They equal the transition scores of
    Hugging Face's compute_transition_scores, rounded to TRACE_DIGITS.
    attention is f32[T,S] for all T ids but the last, see AttentionBackend, or None if it was not asked for.
    """

    ids: tuple[int, ...]
    sum_log_prob: float
    score: float
    token_log_probs: tuple[float, ...] = ()
    attention: NDArray[np.float32] | None = field(default=None, compare=False)


class Beams:
    """The search state of B slots.

    tokens     i32[B,K,max_length]  running beams, best first; the first `lengths` i64[B] ids of each row are valid
    scores     f32[B,K]             their summed log-probabilities
    traces     f32[B,K,max_length]  the same after each new token; undefined within the prompt and after `lengths`
    rows       i16[B,K,max_length]  the row that fed each token, if they are kept; 0 within the prompt
    closed     bool[B]              true if the slot's image is finished (`results` may be read) or the slot is empty
    prompt_lengths, max_lengths, min_lengths  i64[B]  the Start of each image

    Only the scores of hypotheses are kept in order, best first. The tokens of a hypothesis stay in the row where they
    were written (`_hypothesis_places` i64[B,K] maps rank to row) until a better hypothesis needs the row. So
    sorting hypotheses moves no tokens.
    """

    def __init__(self, search: Search, num_slots: int, *, keeps_rows: bool = False) -> None:
        """Create B closed slots; `start` opens them. With `keeps_rows`, `fed_rows` may be called."""
        beams, width = search.num_beams, search.max_length
        self.search = search
        self.tokens = np.full((num_slots, beams, width), search.eos, np.int32)
        self._next_tokens = self.tokens.copy()  # second buffer: a step reads one and writes the other
        self.traces = np.zeros((num_slots, beams, width), np.float32)
        self._next_traces = self.traces.copy()
        self._keeps_rows = keeps_rows
        self.rows = np.zeros((num_slots, beams, width if keeps_rows else 0), np.int16)
        self._next_rows = self.rows.copy()
        self._hypothesis_rows = self.rows.copy()
        self.lengths = np.zeros(num_slots, np.int64)
        self.scores = np.zeros((num_slots, beams), np.float32)
        self.closed = np.ones(num_slots, bool)
        self.prompt_lengths = np.zeros(num_slots, np.int64)
        self.max_lengths = np.zeros(num_slots, np.int64)
        self.min_lengths = np.zeros(num_slots, np.int64)
        self._finished = np.zeros((num_slots, beams), bool)
        self._hypothesis_tokens = self.tokens.copy()
        self._hypothesis_traces = self.traces.copy()
        self._hypothesis_lengths = np.zeros((num_slots, beams), np.int64)
        self._hypothesis_sums = np.zeros((num_slots, beams), np.float32)
        self._hypothesis_scores = np.zeros((num_slots, beams), np.float32)
        self._hypothesis_places = np.zeros((num_slots, beams), np.int64)
        self.start(np.arange(num_slots))
        self.closed[:] = True

    def start(self, slots: NDArray[np.int64], starts: Sequence[Start] | None = None) -> None:
        """Open slots i64[N] for new images, each with the prompt of its Start (default: the search's Start).

        Beam 0 scores 0 and the others are ruled out: with K equal beams the first step would find every candidate K
        times. A rank that no hypothesis ever takes holds the prompt followed by the end token, with the score NEVER,
        which is what Hugging Face returns there.
        """
        starts = starts or [self.search.start]  # broadcasts over all slots
        lengths = np.array([len(start.prompt) for start in starts])
        ended = np.full((len(starts), lengths.max() + 1), self.search.eos)
        for row, start in zip(ended, starts, strict=True):
            row[: len(start.prompt)] = start.prompt
        self.tokens[slots, :, : ended.shape[1]] = ended[:, None]  # ids after `lengths` are never read
        self.prompt_lengths[slots] = self.lengths[slots] = lengths
        self.max_lengths[slots] = [start.max_length for start in starts]
        self.min_lengths[slots] = [start.min_length for start in starts]
        self.scores[slots] = NEVER
        self.scores[slots, 0] = 0.0
        self.closed[slots] = False
        self._finished[slots] = False
        self._hypothesis_tokens[slots, :, : ended.shape[1]] = ended[:, None]
        self._hypothesis_traces[slots] = NEVER
        self._hypothesis_lengths[slots] = lengths[:, None] + 1
        self._hypothesis_sums[slots] = NEVER
        self._hypothesis_scores[slots] = NEVER
        self._hypothesis_places[slots] = np.arange(self.search.num_beams)

    def marked_ids(self) -> NDArray[np.int64]:
        """Return i64[B,K,M], the banned and penalised ids of each running beam (see StepInputs.marked_ids)."""
        # tokens that may not come first are banned after a forced first token, which images with a prompt do not have
        has_forced = (self.search.forced_first is not None) & (self.prompt_lengths == 1)
        starts = self.prompt_lengths + has_forced
        return self.search.processors.marked_ids(
            self.tokens,
            self.lengths,
            prompt_lengths=starts,
            min_lengths=self.min_lengths,
            eos=self.search.eos,
        )

    def last_tokens(self) -> NDArray[np.int64]:
        """Return i64[B,K], the last id of each running beam."""
        return self.tokens[np.arange(len(self.lengths)), :, self.lengths - 1].astype(np.int64)

    def forced(
        self, scores: NDArray[np.float32], rows: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Replace the candidates of slots whose next token is forced: every beam continues with it, at no cost.

        The arguments are summed scores f32[B,C], fed rows i64[B,C] and new ids i64[B,C] of the candidates. The first
        token is forced after a start token alone, the last one at the maximum length, which has precedence.
        """
        search = self.search
        forced = np.full(len(self.lengths), -1)
        if search.forced_first is not None:
            forced[self.lengths == 1] = search.forced_first
        if search.forced_last is not None:
            forced[self.lengths == self.max_lengths - 1] = search.forced_last
        if not len(slots := np.flatnonzero(forced >= 0)):
            return scores, rows, tokens
        scores, rows, tokens = scores.copy(), rows.copy(), tokens.copy()
        beams = search.num_beams
        tokens[slots] = forced[slots, None]
        scores[slots, beams:] = -np.inf
        scores[slots, :beams] = self.scores[slots]
        # the beams of a new image were all fed as the row of the best candidate, which holds the last prompt token
        is_new = self.lengths[slots] == self.prompt_lengths[slots]
        rows[slots, :beams] = np.where(is_new[:, None], rows[slots, :1], np.arange(beams))
        return scores, rows, tokens

    def advance(
        self,
        scores: NDArray[np.float32],
        parents: NDArray[np.int64],
        tokens: NDArray[np.int64],
        active: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Advance the search by one step, given the C best continuations of each image in descending order of score.

        scores f32[B,C] are summed log-probabilities, parents i64[B,C] the continued beams, tokens i64[B,C] the new
        ids. Only slots that are open and `active` bool[B] move. Returns i64[B,K]: the candidate that each running
        beam now is. Afterwards `closed` is true for images that this step finished.
        """
        moving = active & ~self.closed
        # reaching the maximum length ends a caption like the end token does (HF's MaxLengthCriteria)
        hits = (tokens == self.search.eos) | (self.lengths + 1 >= self.max_lengths)[:, None]
        candidates = _Candidates(scores, parents, tokens)
        advance = self._advance_greedy if self.search.num_beams == 1 else self._advance_beams
        chosen, closing = advance(candidates, hits, moving)
        self.closed |= closing & moving
        return chosen

    def _advance_greedy(
        self, candidates: _Candidates, hits: NDArray[np.bool_], moving: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Take the best continuation; the caption ends when it hits (GenerationMixin._sample)."""
        chosen = np.zeros((len(hits), 1), np.int64)
        self._add_hypotheses(candidates, hits & moving[:, None])
        self._run_on(candidates, chosen, moving)
        return chosen, hits[:, 0]

    def _advance_beams(
        self, candidates: _Candidates, hits: NDArray[np.bool_], moving: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Turn hits among the K best candidates into hypotheses, and continue with the K best others."""
        beams = self.search.num_beams
        # a hit stays in the list with NEVER added, so that K candidates are always left, as in HF
        running = _Candidates(candidates.scores + _ruled_out(hits), candidates.parents, candidates.tokens)
        # stable: among equal scores the candidate that came first wins
        chosen = np.argsort(-running.scores, axis=1, kind="stable")[:, :beams]
        # a hit ranked below K is dropped for good (HF's top_num_beam_mask)
        best_rank = np.arange(hits.shape[1]) < beams
        self._add_hypotheses(candidates, hits & best_rank & moving[:, None])
        self._run_on(running, chosen, moving)
        return chosen, ~self._can_improve() | hits.all(1)

    def _run_on(self, candidates: _Candidates, chosen: NDArray[np.int64], moving: NDArray[np.bool_]) -> None:
        """Replace the running beams of moving slots by the `chosen` candidates i64[B,K], one token longer."""
        slots = np.flatnonzero(moving)
        of_slot, chosen = slots[:, None], chosen[slots]
        count, beams, width = self.tokens.shape
        rows = np.arange(count * beams).reshape(count, beams)
        rows[slots] = of_slot * beams + candidates.parents[of_slot, chosen]
        # All rows move in one `take` into the second buffer. mode="clip" skips a bounds check that would need another
        # buffer of this size; the indices are in range by construction.
        histories: list[tuple[NDArray[Any], NDArray[Any]]] = [
            (self.tokens, self._next_tokens),
            (self.traces, self._next_traces),
        ]
        if self._keeps_rows:
            histories.append((self.rows, self._next_rows))
        for old, new in histories:
            old.reshape(-1, width).take(rows.ravel(), axis=0, out=new.reshape(-1, width), mode="clip")
        self.tokens, self._next_tokens = self._next_tokens, self.tokens
        self.traces, self._next_traces = self._next_traces, self.traces
        if self._keeps_rows:
            self.rows, self._next_rows = self._next_rows, self.rows
            self.rows[slots, :, self.lengths[slots] - 1] = candidates.parents[of_slot, chosen]
        self.tokens[slots, :, self.lengths[slots]] = candidates.tokens[of_slot, chosen]
        self.scores[slots] = candidates.scores[of_slot, chosen]
        self.traces[slots, :, self.lengths[slots]] = self.scores[slots]
        self.lengths += moving

    def _add_hypotheses(self, candidates: _Candidates, ending: NDArray[np.bool_]) -> None:
        """Merge the `ending` candidates bool[B,C] into the K best hypotheses (HF's _update_finished_beams).

        A hypothesis that drops out of the K best frees its row, and a new one is written into that row.
        """
        scores, parents, tokens = candidates.scores, candidates.parents, candidates.tokens
        image = np.flatnonzero(ending.any(1))
        if not len(image):
            return
        beams = self.search.num_beams
        penalty = self._length_term(self.lengths[image] + 1, self.prompt_lengths[image])
        new_scores = scores[image] / penalty[:, None] + _ruled_out(~ending[image])
        # old hypotheses come first, so that the stable sort keeps them where a new one has an equal score
        merged = np.concatenate([self._hypothesis_scores[image], new_scores], 1)
        if beams == 1:  # greedy search has one caption, which also replaces a placeholder of a higher score
            best = np.ones((len(image), 1), np.int64)
        else:
            best = np.argsort(-merged, axis=1, kind="stable")[:, :beams]
        of_image = np.arange(len(image))[:, None]
        places = self._hypothesis_places[image]
        is_kept = np.zeros((len(image), beams + scores.shape[1]), bool)
        is_kept[of_image, best] = True
        # Both lists are ordered by image, and per image as many rows are freed as candidates need one: the n-th
        # candidate of the flat list takes the n-th freed row.
        freed = places[~is_kept[:, :beams]]
        taking, rank = np.nonzero(best >= beams)
        new_places = places[of_image, np.minimum(best, beams - 1)]
        new_places[taking, rank] = freed
        self._hypothesis_places[image] = new_places
        self._hypothesis_scores[image] = merged[of_image, best]
        slot, candidate = image[taking], best[taking, rank] - beams
        self._hypothesis_tokens[slot, freed] = self.tokens[slot, parents[slot, candidate]]
        self._hypothesis_tokens[slot, freed, self.lengths[slot]] = tokens[slot, candidate]
        self._hypothesis_traces[slot, freed] = self.traces[slot, parents[slot, candidate]]
        self._hypothesis_traces[slot, freed, self.lengths[slot]] = scores[slot, candidate]
        if self._keeps_rows:
            self._hypothesis_rows[slot, freed] = self.rows[slot, parents[slot, candidate]]
            self._hypothesis_rows[slot, freed, self.lengths[slot] - 1] = parents[slot, candidate]
        self._hypothesis_lengths[slot, freed] = self.lengths[slot] + 1
        self._hypothesis_sums[slot, freed] = scores[slot, candidate]
        self._finished[slot, freed] = ending[slot, candidate]

    def _can_improve(self) -> NDArray[np.bool_]:
        """Return bool[B], whether a running beam may still beat the worst hypothesis (_check_early_stop_heuristic)."""
        search = self.search
        # an image never closes before it has K hypotheses
        full = np.all(self._finished, axis=1)
        if search.early_stopping is True:
            still_filling: NDArray[np.bool_] = ~full
            return still_filling
        lengths = self.lengths
        # Log-probabilities are negative: with a positive penalty a sum looks best at the greatest length. "never" takes
        # that bound, False (the default heuristic) divides by the present length and may stop a little too early.
        if search.early_stopping == "never" and search.length_penalty > 0:
            lengths = self.max_lengths
        # only the best running beam is compared: with one length for all, no other can get a better score
        best = self.scores[:, 0] / self._length_term(lengths, self.prompt_lengths)
        worst = self._hypothesis_scores[:, -1]
        can_improve: NDArray[np.bool_] = ~full | (best > worst)
        return can_improve

    def _length_term(self, lengths: NDArray[np.int64], prompts: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return f32, (generated tokens) ** length_penalty; 1 for slots that have generated none yet."""
        # float64 first, like Python's `**` in HF, then rounded: f32 ** f32 differs in the last digit
        generated = np.maximum(lengths - prompts, 1).astype(np.float64)
        term: NDArray[np.float32] = np.power(generated, self.search.length_penalty).astype(np.float32)
        return term

    def results(self, slot: int) -> list[Hypothesis]:
        """Return the num_return_sequences best hypotheses of a closed slot, best first."""
        assert self.closed[slot]
        best = enumerate(self._hypothesis_places[slot, : self.search.num_return_sequences].tolist())
        return [
            Hypothesis(
                tuple(self._hypothesis_tokens[slot, place, : self._hypothesis_lengths[slot, place]].tolist()),
                float(self._hypothesis_sums[slot, place]),
                float(self._hypothesis_scores[slot, rank]),
                self._token_log_probs(slot, place),
            )
            for rank, place in best
        ]

    def fed_rows(self, slot: int) -> NDArray[np.int64]:
        """Return i64[T], the row that fed each id but the last of a closed slot's best hypothesis."""
        assert self._keeps_rows
        place = self._hypothesis_places[slot, 0]
        return self._hypothesis_rows[slot, place, : self._hypothesis_lengths[slot, place] - 1].astype(np.int64)

    def _token_log_probs(self, slot: int, place: int) -> tuple[float, ...]:
        """Return the log-probability of each new token of a hypothesis, see Hypothesis."""
        new = slice(self.prompt_lengths[slot], self._hypothesis_lengths[slot, place])
        sums = self._hypothesis_traces[slot, place, new].astype(np.float64)
        sums = np.maximum(sums, NEVER)  # the sum is -inf where all tokens are banned, and has no difference
        return tuple((np.diff(sums, prepend=0.0).round(TRACE_DIGITS) + 0.0).tolist())  # + 0.0: no negative zeros

    def keep(self, slots: NDArray[np.int64]) -> None:
        """Keep only the slots at `slots` i64[B']."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[slots])


T = TypeVar("T")


def resolve_search(
    options: DecodeOptions,
    *,
    prompt: tuple[int, ...],
    eos: int,
    vocab_size: int,
    max_positions: int,
    bad_words_ids: tuple[tuple[int, ...], ...] = (),
) -> Search:
    """Return the Search of `options` after the ids `prompt`. Raises UsageError if the model's sizes do not allow it.

    `bad_words_ids` are the token ids of options.bad_words, which are texts.
    """
    most, least = options.max_total_length(len(prompt)), options.min_total_length(len(prompt))
    if not len(prompt) < most <= max_positions:
        raise UsageError(
            f"a caption of up to {most} tokens ({len(prompt)} of them the prompt) does not fit: this bundle takes "
            f"{len(prompt) + 1} to {max_positions}, set --max-new-tokens"
        )
    if least > most:
        raise UsageError(f"the minimum length ({least} tokens) is larger than the maximum ({most}): change one of them")
    if 2 * options.num_beams > vocab_size:
        most = vocab_size // 2  # a step needs 2 candidates per beam
        raise UsageError(f"{options.num_beams} beams are too many for a vocabulary of {vocab_size}: use at most {most}")
    # at most one of the two is set (DecodeOptions.over)
    bad_words_ids = options.bad_words_ids or bad_words_ids
    banned = [(one,) for one in (*(options.suppress_tokens or ()), *(options.begin_suppress_tokens or ()))]
    if beyond := {one for ids in (*bad_words_ids, *banned) for one in ids if one >= vocab_size}:
        raise UsageError(f"banned token id {max(beyond)} is not in the vocabulary: ids must be below {vocab_size}")
    for ids in bad_words_ids:
        if len(ids) > 1 and ids[0] == prompt[0]:  # transformers 4.57 ignores it for the first word, 5.24 applies it
            raise UsageError(
                f"bad_words_ids {list(ids)} begins with the start token {ids[0]}, which releases of transformers treat "
                f"differently: remove the start token, or list the id in begin_suppress_tokens to ban it as first word"
            )
    words = [ids for ids in bad_words_ids if ids != (eos,)]  # Hugging Face ignores a ban of the end token
    forced_first = options.forced_bos_token_id if len(prompt) == 1 else None
    forced_last = options.forced_eos_token_id
    _check_forced(options, {"bos": forced_first, "eos": forced_last}, eos, vocab_size)
    if forced_last in (options.begin_suppress_tokens or ()) and most == len(prompt) + 1 + (forced_first is not None):
        raise UsageError(
            f"forced_eos_token_id {forced_last} is also in begin_suppress_tokens, and captions have one token: raise "
            "--max-new-tokens"
        )
    sampling = None
    if options.do_sample:
        top_k, copies = min(options.top_k, vocab_size), options.num_return_sequences
        sampling = Sampling(options.temperature, top_k, options.top_p, options.seed, copies)
    return Search(
        prompt=prompt,
        num_beams=options.num_beams,
        max_length=most,
        min_length=least,
        length_penalty=float(options.length_penalty),
        early_stopping=options.early_stopping,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        num_return_sequences=1 if sampling else options.num_return_sequences,
        eos=eos,
        vocab_size=vocab_size,
        sampling=sampling,
        repetition_penalty=float(options.repetition_penalty),
        suppressed=_distinct([*(options.suppress_tokens or ()), *(ids[0] for ids in words if len(ids) == 1)]),
        begin_suppressed=_distinct(options.begin_suppress_tokens or ()),
        banned_sequences=_distinct(ids for ids in words if len(ids) > 1),
        forced_first=forced_first,
        forced_last=forced_last,
    )


def _check_forced(options: DecodeOptions, forced: Mapping[str, int | None], eos: int, vocab_size: int) -> None:
    """Raise UsageError for forced tokens that leave no caption: unknown, banned, or an end token as the first one."""
    for name, token in forced.items():
        if token is None:
            continue
        option = f"forced_{name}_token_id {token}"
        if token >= vocab_size:
            raise UsageError(f"{option} is not in the vocabulary: ids must be below {vocab_size}")
        if token in (options.suppress_tokens or ()):  # Hugging Face bans these after it has forced a token
            raise UsageError(f"{option} is also in suppress_tokens, so no caption is possible: remove it from one")
        if name == "bos" and token == eos:
            raise UsageError(f"{option} is the end token, so every caption would be empty: remove it")


def _distinct(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
