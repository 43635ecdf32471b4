"""The texts that captions start with: one an image, told to the model and never learned.

Knows nothing of layouts and of the decoding core.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from engine.errors import DataError, UsageError
from engine.inputs.ids import join_some, shown
from train.data.dataset import Example

AROUND = 3
"""Tokens that need room beside a prompt: [DEC], one word and [SEP]."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Return the ids of a prompt behind [DEC], none for an empty one; as CaptionTokenizer.prompt_ids has them."""
    return tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else ()


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
