"""From decoding options to a Search: lengths become totals and are checked against the model's limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from engine.decoding.beam import Search
from engine.decoding.processors import Sampling
from engine.errors import UsageError
from engine.options import DecodeOptions

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
    )


def _distinct(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))
