"""Caption and Alternative, the results of captioning: for repeated images, in order, and as text without a prompt.

Every module may import this.
"""

from __future__ import annotations

import math
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Alternative:
    """One hypothesis for an image as text.

    text             detokenised text
    raw_text         text as transformers' tokenizer.decode returns it for the same `ids`
    ids              token ids, prompt and end included
    sum_log_prob     summed log-probability of the new tokens
    score            sum_log_prob / new tokens ** length_penalty, Hugging Face's `sequences_scores`
    token_log_probs  log-probability of each new token, end included; empty in journals of earlier versions
    """

    text: str
    raw_text: str
    ids: tuple[int, ...]
    sum_log_prob: float
    score: float
    token_log_probs: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Alternative:
        """Return an alternative from JSON, where tuples are lists. Raises KeyError, TypeError or ValueError."""
        return cls(
            text=str(entry["text"]),
            raw_text=str(entry["raw_text"]),
            ids=tuple(int(token) for token in entry["ids"]),
            sum_log_prob=float(entry["sum_log_prob"]),
            score=float(entry["score"]),
            token_log_probs=tuple(map(float, entry.get("token_log_probs", ()))),  # missing in earlier journals
        )


@dataclass(frozen=True)
class Confidence:
    """How sure the model is of a caption. A higher value is surer. None means unknown.

    score            the score of the search
    margin           the score minus that of the second alternative; None without a second
    agreement        mean F1 of the words (lower case, split at white space) that the caption shares with each other
                     alternative, 0 to 1; None without a second
    mean_token_prob  mean probability of the new tokens, end included, 0 to 1
    min_token_prob   lowest probability of a new token
    """

    score: float
    margin: float | None
    agreement: float | None
    mean_token_prob: float | None
    min_token_prob: float | None


@dataclass(frozen=True)
class Attention:
    """Where the tokens of a caption look in the image; see docs/attention.md for what that shows and what not.

    tokens   the caption's T ids without the start token; a prompt and the end token are included
    maps     f16[T,rows,columns]: map t is the cross-attention of the step that chose token t, over the grid of the
             image encoder. Weights on other positions, such as the class token, are missing, so that a map sums to less
             than 1
    words    the caption's words
    word_of  for each token the index of its word, or -1 for special tokens
    layers   the decoder layers that were averaged, counted from 0
    crop     empty if the encoder saw the whole image, else its crop: height, width, and ImageSpec.resize
    """

    tokens: tuple[int, ...]
    maps: NDArray[np.float16]
    words: tuple[str, ...]
    word_of: tuple[int, ...]
    layers: tuple[int, ...]
    crop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Caption:
    """The caption of one image. `text`, `raw_text`, `ids` and `score` are those of the best alternative.

    id            the image's id
    alternatives  num_return_sequences hypotheses, best first
    text          detokenised text
    raw_text      text as transformers' tokenizer.decode returns it for the same `ids`
    latency_s     seconds from when the image was read until its caption was finished, while other images share the
                  device; 0 if the same pixels were captioned shortly before, None if it was not measured
    file_sha256   sha256 of the file in hexadecimal, or None if the image was not read from a file
    attention     where its tokens look, or None if that was not asked for
    """

    id: str
    alternatives: tuple[Alternative, ...]
    latency_s: float | None = field(default=None, compare=False)
    file_sha256: str | None = field(default=None, compare=False)
    attention: Attention | None = field(default=None, compare=False)

    @property
    def best(self) -> Alternative:
        return self.alternatives[0]

    @property
    def text(self) -> str:
        return self.best.text

    @property
    def raw_text(self) -> str:
        return self.best.raw_text

    @property
    def ids(self) -> tuple[int, ...]:
        return self.best.ids

    @property
    def score(self) -> float:
        return self.best.score

    @property
    def confidence(self) -> Confidence:
        best, *others = self.alternatives
        chances = [math.exp(min(0.0, log_prob)) for log_prob in best.token_log_probs]
        return Confidence(
            score=best.score,
            margin=best.score - others[0].score if others else None,
            agreement=sum(shared_words(best.text, other.text) for other in others) / len(others) if others else None,
            mean_token_prob=sum(chances) / len(chances) if chances else None,
            min_token_prob=min(chances, default=None),
        )


REMEMBERED = 4096
"""Number of distinct images whose captions are kept for repeats; they take a few megabytes."""
REMEMBERED_MAPS = 256
"""The same with attention, which takes about 25 kB per caption."""


class Finished(NamedTuple):
    """The result of decoding one image."""

    alternatives: tuple[Alternative, ...]
    attention: Attention | None = None

    def caption_of(self, name: str, latency_s: float, file_sha256: str | None) -> Caption:
        """Return this as the caption of an image."""
        return Caption(name, self.alternatives, latency_s, file_sha256, self.attention)


class Repeats:
    """Cache of captions by pixels, so that equal images are captioned once; it keeps the last `remembered` ones."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._waiting: dict[bytes, list[tuple[int, str, str | None, float]]] = {}
        self._known: dict[bytes, Finished] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether any image is waiting for a caption."""
        return bool(self._waiting)

    def known(self, digest: bytes) -> Finished | None:
        """Return the result of these pixels, or None if it is not known yet."""
        return self._known.get(digest)

    def wait(self, digest: bytes, index: int, name: str, file_sha256: str | None = None) -> bool:
        """Make image `index` wait for the caption of these pixels; return whether it is the first that waits for it."""
        self._waiting.setdefault(digest, []).append((index, name, file_sha256, time.perf_counter()))
        return len(self._waiting[digest]) == 1

    def resolve(self, digest: bytes, finished: Finished) -> Iterator[tuple[int, Caption]]:
        """Yield the index and the caption of every image that waited for these pixels."""
        now = time.perf_counter()
        self._known[digest] = finished
        if len(self._known) > self._remembered:
            del self._known[next(iter(self._known))]  # dicts keep their order: the oldest
        for index, name, file_sha256, since in self._waiting.pop(digest):
            yield index, finished.caption_of(name, now - since, file_sha256)


class InOrder:
    """Puts captions that finish in any order into the order of their images."""

    def __init__(self) -> None:
        self._early: dict[int, Caption] = {}
        self._next = 0

    def add(self, index: int, caption: Caption) -> None:
        """Add the caption of image `index`."""
        self._early[index] = caption

    def ready(self) -> Iterator[Caption]:
        """Yield the captions that are next in order."""
        while self._next in self._early:
            yield self._early.pop(self._next)
            self._next += 1


def shared_words(first: str, second: str) -> float:
    """Return the F1 of the words that two texts share, each counted as often as both have it; 1 if both are empty."""
    words = [Counter(text.lower().split()) for text in (first, second)]
    total = sum(count.total() for count in words)
    return 2 * (words[0] & words[1]).total() / total if total else 1.0


def changed_words(first: str, second: str) -> float:
    """Return how much a caption changed, 0 to 1: 1 - F1 of its words, case aside."""
    return 1 - shared_words(first, second)


def after_prompt(caption: str, prompt: str) -> str | None:
    """Return the text after the prompt, or None if the caption does not begin with it.

    Case, accents and white space are ignored, because a tokenizer changes them: "T2-weighted" matches "t2 - weighted".
    """
    expected, seen = _letters(prompt), ""
    for end, character in enumerate(caption):
        if seen == expected:
            return caption[end:].strip()
        seen += _letters(character)
        if not expected.startswith(seen):
            return None
    return "" if seen == expected else None


def _letters(text: str) -> str:
    """Return a text without case, accents and white space."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in decomposed if not char.isspace() and not unicodedata.combining(char))
