"""Token ids <-> text for one bundle, and the detokeniser that undoes what WordPiece does to punctuation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from engine.bundle.manifest import Bundle
from engine.errors import BundleError, UsageError

CLEAN_UP = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
"""Replacements in order (transformers 4.57, PreTrainedTokenizerBase.clean_up_tokenization)."""

DETOKENISE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+([,;:!?%)\]])", r"\1"),
        (r"\s+\.(?!\d)", "."),
        (r"([(\[])\s+", r"\1"),
        (r"(?<=\w)\s*([-/])\s*(?=\w)", r"\1"),
        (r"(?<=\d)\s*\.\s*(?=\d)", "."),
        (r"(?<=\d)\s*,\s*(?=\d{3}\b)", ","),
        (r"(?<=\w)\s*'\s*(?=(?:s|t|m|d|re|ve|ll)\b)", "'"),
    )
)


class CaptionTokenizer:
    """The bundle's tokenizer.json with BLIP's conventions: [DEC] first, [SEP] last."""

    def __init__(self, bundle: Bundle) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
        except Exception as error:
            raise BundleError(f"{bundle.path / 'tokenizer.json'} cannot be read ({error}): export again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._bundle = bundle

    def prompt_ids(self, prompt: str | None) -> tuple[int, ...]:
        """Return the ids decoding starts from: [DEC], then the prompt's own (BlipForConditionalGeneration.generate)."""
        if prompt and not prompt.isprintable():
            raise UsageError(f"the prompt {prompt!r} holds characters that are no text")
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        special = {self._bundle.tokens.bos, self._bundle.tokens.eos, self._bundle.tokens.pad}
        if special.intersection(ids):
            raise UsageError(f"the prompt {prompt!r} spells a special token of the tokenizer")
        return (self._bundle.tokens.bos, *ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the raw text, as transformers' tokenizer.decode(ids, skip_special_tokens=True) gives it."""
        tokens = self._bundle.tokens
        words = [i for i in ids if i not in (tokens.bos, tokens.eos, tokens.pad)]
        text: str = self._tokenizer.decode(words, skip_special_tokens=True)
        return clean_up(text) if self._bundle.clean_up_tokenization_spaces else text


def clean_up(text: str) -> str:
    """Undo some of the spacing around punctuation, as transformers does by default."""
    for old, new in CLEAN_UP:
        text = text.replace(old, new)
    return text


def detokenise(text: str) -> str:
    """Rejoin what WordPiece split: `t2 - weighted` -> `t2-weighted`, `( arrow )` -> `(arrow)`, `3 . 5` -> `3.5`.

    The scorers delete punctuation without inserting a space, so a split hyphen turns one word into two.
    """
    for pattern, replacement in DETOKENISE:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())
