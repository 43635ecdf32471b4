"""What a model says of an image: data only, so that everything may know it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Alternative:
    """One hypothesis of an image as text; see Hypothesis for the numbers."""

    text: str
    raw_text: str
    ids: tuple[int, ...]
    sum_log_prob: float
    score: float


@dataclass(frozen=True)
class Caption:
    """The caption of one image: its best alternative, and all num_return_sequences of them, best first.

    `text` is detokenised, `raw_text` is what transformers' tokenizer.decode gives for the same `ids`. `latency_s` is
    the seconds from when the decoded image was taken in until its caption was complete, beside others that share the
    device; 0 where the same pixels were captioned shortly before, None where it was not measured. `file_sha256` is the
    sha256 of the file that was read, in hexadecimal; None for an image that was not read from a file.
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
