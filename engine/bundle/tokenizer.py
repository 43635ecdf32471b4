"""The tokenizer of a bundle, and a detokeniser that removes the spaces WordPiece puts around punctuation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, WordPiece

from engine.bundle.manifest import Bundle
from engine.errors import BundleError, UsageError

CLEAN_UP = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
"""Replacements, applied in this order (transformers 4.57, PreTrainedTokenizerBase.clean_up_tokenization)."""

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
"""(marks, pattern, replacement). A text without any of the marks is not searched for the pattern."""


LOCATION = re.compile(r"<loc_\d+>")


class CaptionTokenizer:
    """The bundle's tokenizer.json with generate's conventions: the start token first, then the prompt."""

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
        self._is_byte_level = isinstance(self._tokenizer.decoder, ByteLevel)
        self.has_spaces = not is_joined
        """Whether tokens contain the text's own spaces, so that those around punctuation are not added by decoding."""
        added = self._tokenizer.get_added_tokens_decoder()
        # a pad id may be an ordinary token of GPT-2's vocabulary, which transformers does not skip
        self._skipped = {token for token in self._special if is_joined or (token in added and added[token].special)}
        words = (token for token in range(bundle.model.vocab_size) if self._decoded([token]))
        first_word = next(words, None) if is_joined else None
        if is_joined and first_word is None:
            raise BundleError(f"{bundle.path / 'tokenizer.json'}: every token is special: export the bundle again")
        self._pieces = None if first_word is None else _Pieces(self._decoded, first_word)

    def prompt_ids(self, prompt: str | None, first: int | None = None) -> tuple[int, ...]:
        """Return the ids that decoding starts with: the start token (BLIP: [DEC]), then the prompt.

        `first` is the forced first token. Models with tasks were trained with it before each text, so that it is also
        put before a prompt.
        """
        if not prompt:
            return (self._bundle.tokens.bos,)
        before = () if first is None or not self._bundle.tasks else (first,)
        return (self._bundle.tokens.bos, *before, *self._encoded(prompt, "the prompt"))

    def bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the ids of banned words or phrases, for Hugging Face's `bad_words_ids`.

        They are the ids of `tokenizer(words, add_special_tokens=False)`, which spells each at the beginning of a word.
        A byte-level tokenizer spells a word differently after a space, so that both spellings are banned. Raises
        UsageError for words that the vocabulary cannot spell.
        """
        banned = []
        for word in words:
            for spelling in spellings(word, is_byte_level=self._is_byte_level):
                ids = self._encoded(spelling, "the banned word")
                if not ids or (self._unknown is not None and self._unknown in ids):
                    raise UsageError(f"the vocabulary cannot spell the banned word {word!r}: remove it")
                banned.append(ids)
        return tuple(dict.fromkeys(banned))

    def _encoded(self, text: str, what: str) -> tuple[int, ...]:
        """Return the ids of a text. Raises UsageError for non-printable characters, special or unknown tokens."""
        if not text.isprintable():
            raise UsageError(f"{what} {text!r} contains non-printable characters: remove them")
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if self._special.intersection(ids):
            raise UsageError(f"{what} {text!r} spells a special token of the tokenizer: change it")
        if any(token >= self._bundle.model.vocab_size for token in ids):
            raise UsageError(
                f"{what} {text!r} contains a token that the model of {self._bundle.path} has no embedding for (its "
                f"vocabulary has {self._bundle.model.vocab_size} entries, the tokenizer more): choose other words"
            )
        return ids

    def tidy(self, raw: str) -> str:
        """Return a caption without superfluous spaces; see detokenise for tokenizers that add some.

        Location tokens of models with tasks are removed, too, if the tokenizer does not skip them as special tokens.
        """
        if self._bundle.tasks:
            raw = LOCATION.sub("", raw)
        return " ".join(raw.split()) if self.has_spaces else detokenise(raw)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the same text as transformers' tokenizer.decode(ids, skip_special_tokens=True)."""
        words = [i for i in ids if i not in self._skipped]
        text = self._pieces.first(words[0]) if words and self._pieces is not None else ""
        if text and self._pieces is not None:
            text += "".join([self._pieces[i] for i in words[1:]])
        else:
            text = self._decoded(words)
        return clean_up(text) if self._bundle.clean_up_tokenization_spaces else text

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def spellings(word: str, *, is_byte_level: bool) -> tuple[str, ...]:
    """Return the texts to encode for a banned word: it alone and, for a byte-level tokenizer, also after a space."""
    return (word, f" {word}") if is_byte_level and not word.startswith(" ") else (word,)


class _Pieces(dict[int, str]):
    """Cache: token id -> the text that a WordPiece decoder appends for it. A caption is the concatenation of these.

    The library decodes every token only once. Decoding each caption with it would take as long as the beam search's
    choice of candidates.
    """

    def __init__(self, decode: Callable[[list[int]], str], first_word: int) -> None:
        """`first_word` is the id of any token that is not special."""
        self._decode = decode
        self._before = first_word
        self._firsts: dict[int, str] = {}

    def first(self, token: int) -> str:
        """Return the text of the first token of a caption; empty if it is special."""
        if token not in self._firsts:
            self._firsts[token] = self._decode([token])
        return self._firsts[token]

    def __missing__(self, token: int) -> str:
        # the decoder treats the first token differently, so decode a pair and remove the first word
        piece = self[token] = self._decode([self._before, token]).removeprefix(self._decode([self._before]))
        return piece


def clean_up(text: str) -> str:
    """Remove some of the spaces around punctuation, as transformers does by default."""
    for old, new in CLEAN_UP:
        text = text.replace(old, new)
    return text


def detokenise(text: str) -> str:
    """Remove spaces around punctuation: `t2 - weighted` -> `t2-weighted`, `( arrow )` -> `(arrow)`, `3 . 5` -> `3.5`.

    The scorers delete punctuation without inserting a space: `t2 - weighted` is two words, `t2-weighted` is one.
    """
    present = set(text)
    for marks, pattern, replacement in DETOKENISE:
        if not marks.isdisjoint(present):
            text = pattern.sub(replacement, text)
    return " ".join(text.split())
