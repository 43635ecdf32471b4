"""Caption and Alternative, the results of captioning, and their text without a prompt. Every module may import this."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Alternative:
    """One hypothesis for an image as text; see Hypothesis for `ids`, `sum_log_prob` and `score`."""

    text: str
    raw_text: str
    ids: tuple[int, ...]
    sum_log_prob: float
    score: float


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
    """

    id: str
    alternatives: tuple[Alternative, ...]
    latency_s: float | None = field(default=None, compare=False)
    file_sha256: str | None = field(default=None, compare=False)

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
