"""Token ids <-> text for one bundle, and the detokeniser that undoes what WordPiece does to punctuation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece

from engine.bundle.manifest import Bundle
from engine.errors import BundleError, UsageError

CLEAN_UP = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
"""Replacements in order (transformers 4.57, PreTrainedTokenizerBase.clean_up_tokenization)."""

DETOKENISE: tuple[tuple[frozenset[str], re.Pattern[str], str], ...] = tuple(
    (frozenset(marks), re.compile(pattern), replacement)
    for marks, pattern, replacement in (
        (",;:!?%)]", r"\s+([,;:!?%)\]])", r"\1"),
        (".", r"\s+\.(?!\d)", "."),
        ("([", r"([(\[])\s+", r"\1"),
        ("-/", r"(?<=\w)\s*([-/])\s*(?=\w)", r"\1"),
        (".", r"(?<=\d)\s*\.\s*(?=\d)", "."),
        (",", r"(?<=\d)\s*,\s*(?=\d{3}\b)", ","),
        ("'", r"(?<=\w)\s*'\s*(?=(?:s|t|m|d|re|ve|ll)\b)", "'"),
    )
)
"""Patterns, each with the marks of which one must stand in a text that it changes."""


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
        self._unknown = getattr(self._tokenizer.model, "unk_token", None)
        if self._unknown is not None:
            self._unknown = self._tokenizer.token_to_id(self._unknown)
        self._special = {bundle.tokens.bos, bundle.tokens.eos, bundle.tokens.pad}
        is_joined = isinstance(self._tokenizer.decoder, WordPiece)
        words = (token for token in range(bundle.model.vocab_size) if self._decoded([token]))
        first_word = next(words, None) if is_joined else None
        if is_joined and first_word is None:
            raise BundleError(f"{bundle.path / 'tokenizer.json'}: every token is special: export the bundle again")
        self._pieces = None if first_word is None else _Pieces(self._decoded, first_word)

    def prompt_ids(self, prompt: str | None) -> tuple[int, ...]:
        """Return the ids decoding starts from: [DEC], then the prompt's own (BlipForConditionalGeneration.generate)."""
        return (self._bundle.tokens.bos, *(self._encoded(prompt, "the prompt") if prompt else ()))

    def bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the ids of words or phrases that no caption may hold, as they stand at the beginning of a word.

        Hugging Face's `bad_words_ids` of `tokenizer(words, add_special_tokens=False)`. Raises UsageError for what the
        vocabulary cannot spell.
        """
        found = []
        for word in words:
            ids = self._encoded(word, "the banned word")
            if not ids or (self._unknown is not None and self._unknown in ids):
                raise UsageError(f"the banned word {word!r} is none that this bundle could say: leave it out")
            found.append(ids)
        return tuple(found)

    def _encoded(self, text: str, what: str) -> tuple[int, ...]:
        """Return the ids of a text. Raises UsageError for control characters and special tokens."""
        if not text.isprintable():
            raise UsageError(f"{what} {text!r} holds characters that are no text")
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if self._special.intersection(ids):
            raise UsageError(f"{what} {text!r} spells a special token of the tokenizer")
        if any(token >= self._bundle.model.vocab_size for token in ids):
            raise UsageError(
                f"{what} {text!r} holds a token that the model of {self._bundle.path} has no embedding for (its "
                f"vocabulary has {self._bundle.model.vocab_size} entries, the tokenizer more): choose other words"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the raw text, as transformers' tokenizer.decode(ids, skip_special_tokens=True) gives it."""
        words = [i for i in ids if i not in self._special]
        text = self._pieces.first(words[0]) if words and self._pieces is not None else ""
        if text and self._pieces is not None:
            text += "".join([self._pieces[i] for i in words[1:]])
        else:
            text = self._decoded(words)
        return clean_up(text) if self._bundle.clean_up_tokenization_spaces else text

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class _Pieces(dict[int, str]):
    """What a WordPiece decoder adds for each token that is not the first; it joins these and no more.

    The library is asked once for each token: asked for each caption, it takes as long as choosing the caption's beams.
    """

    def __init__(self, decode: Callable[[list[int]], str], first_word: int) -> None:
        """`first_word` is any token that is not special."""
        self._decode = decode
        self._before = first_word
        self._firsts: dict[int, str] = {}

    def first(self, token: int) -> str:
        """Return what a token is at the beginning; nothing where it is special, and the next one is the first."""
        if token not in self._firsts:
            self._firsts[token] = self._decode([token])
        return self._firsts[token]

    def __missing__(self, token: int) -> str:
        piece = self[token] = self._decode([self._before, token]).removeprefix(self._decode([self._before]))
        return piece


def clean_up(text: str) -> str:
    """Undo some of the spacing around punctuation, as transformers does by default."""
    for old, new in CLEAN_UP:
        text = text.replace(old, new)
    return text


def detokenise(text: str) -> str:
    """Rejoin what WordPiece split: `t2 - weighted` -> `t2-weighted`, `( arrow )` -> `(arrow)`, `3 . 5` -> `3.5`.

    The scorers delete punctuation without inserting a space, so a split hyphen turns one word into two.
    """
    present = set(text)
    for marks, pattern, replacement in DETOKENISE:
        if not marks.isdisjoint(present):
            text = pattern.sub(replacement, text)
    return " ".join(text.split())
