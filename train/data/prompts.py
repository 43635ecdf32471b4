"""The texts that captions start with: one an image, told to the model and never learned.

Knows nothing of layouts and of the decoding core.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.errors import DataError, UsageError
from engine.inputs.ids import join_some, shown
from train.data.dataset import Example
from train.data.problems import ACCENTS, WORDS

AROUND = 3
"""Tokens that need room beside a prompt: [DEC], one word and [SEP]."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Return the ids of a prompt behind [DEC], none for an empty one; as CaptionTokenizer.prompt_ids has them."""
    return tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else ()


def lost_in_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return what a text loses in the tokenizer: WORDS where the vocabulary cannot spell some of it, else ACCENTS where
    letters come back as others, else nothing. Case and white space do not count.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        return WORDS
    if text.isascii():
        return ""
    kept = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return "" if _letters(text) == _letters(kept) else ACCENTS


def _letters(text: str) -> str:
    """Return the letters of a text and their marks, in lower case."""
    folded = unicodedata.normalize("NFC", text.casefold())
    return "".join(one for one in folded if unicodedata.category(one)[0] in "LM")


def check_fit(
    examples: Iterable[Example], captions_file: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    """Refuse what the model could not be told: prompts that spell a special token of the tokenizer (DataError), or
    that leave no room for a caption within `max_tokens` tokens, [DEC] and [SEP] included (UsageError).
    """
    special = {tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    long: dict[str, int] = {}
    for example in examples:
        ids = prompt_ids(tokenizer, example.prompt)
        if special.intersection(ids):
            raise DataError(
                f"{captions_file}: the prompt of {shown(example.id)} spells a special token of the tokenizer: "
                f"{example.prompt}"
            )
        if len(ids) + AROUND > max_tokens:
            long[example.id] = len(ids)
    if long:
        raise UsageError(
            f"{captions_file}: prompts of up to {max(long.values())} tokens leave no room for a caption within "
            f"{max_tokens} ({join_some(long, 3)}): shorten them, or raise max_tokens if the checkpoint allows it"
        )
