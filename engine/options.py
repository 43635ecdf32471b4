"""How captions are decoded: the one place where a default lives; names and meaning are Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from engine.errors import UsageError

DEFAULT_NEW_TOKENS = 20
"""New tokens when nothing says otherwise (transformers 4.57, GenerationMixin._prepare_generated_length)."""

MAX_LENGTH_PENALTY = 10
"""Beyond it a length of 512 tokens raised to the penalty nears the limits of float32."""


OF_DRAWING = ("temperature", "top_k", "top_p", "seed")
"""Options that say nothing where captions are searched for."""

MIN_TEMPERATURE = 0.01
"""Below it nothing but the likeliest word is left: that is greedy decoding."""


@dataclass(frozen=True)
class DecodeOptions:
    """Options of one decoding, checked on construction (UsageError).

    A bundle may carry its checkpoint's own generation defaults: `options_from` lays them under what the caller
    asks for. With `do_sample`, `num_return_sequences` captions are drawn with one beam each; temperature, top_k and
    top_p count only then. `max_length` and `min_length` count the prompt, `max_new_tokens` and `min_new_tokens` do not
    and win where both are given.
    """

    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    prompt: str | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 1, "max_length": 2, "min_new_tokens": 0}
        lowest |= {"min_length": 0, "num_return_sequences": 1, "top_k": 1, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise UsageError(f"{name} must be a whole number of at least {low}, not {value!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UsageError(f"early_stopping must be true, false or never, not {self.early_stopping!r}")
        if not isinstance(self.length_penalty, int | float) or not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            most = f"-{MAX_LENGTH_PENALTY} and {MAX_LENGTH_PENALTY}"
            raise UsageError(f"length_penalty must be a number between {most}, not {self.length_penalty!r}")
        if not isinstance(self.temperature, int | float) or not MIN_TEMPERATURE <= self.temperature <= 100:
            raise UsageError(f"temperature must be a number from {MIN_TEMPERATURE} to 100, not {self.temperature!r}")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be a number above 0 and at most 1, not {self.top_p!r}")
        if not isinstance(self.prompt, str | None) or not isinstance(self.do_sample, bool):
            raise UsageError("prompt must be a text, and do_sample true or false")
        if self.do_sample and self.num_beams > 1:
            raise UsageError(f"drawn captions have one beam each, not {self.num_beams}: add --beams 1")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise UsageError(
                f"{self.num_return_sequences} captions an image need at least as many beams, not {self.num_beams}"
            )

    def max_total_length(self, prompt_length: int) -> int:
        """Return the largest number of tokens a caption may have, prompt of `prompt_length` tokens included."""
        if self.max_new_tokens is None and self.max_length is not None:
            return self.max_length
        return prompt_length + (self.max_new_tokens or DEFAULT_NEW_TOKENS)

    def min_total_length(self, prompt_length: int) -> int:
        """Return the number of tokens before which a caption may not end, prompt included."""
        return self.min_length if self.min_new_tokens is None else prompt_length + self.min_new_tokens


def options_from(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> DecodeOptions:
    """Lay `given` (None means not given) over `defaults`, a bundle's generation settings, over our own.

    A given max_new_tokens also beats a default max_length, and min_new_tokens a default min_length, as in
    Hugging Face. Raises UsageError on an unknown name, a value out of range, or one given that would do nothing.
    """
    known = {field.name for field in fields(DecodeOptions)}
    unknown = (set(defaults) | set(given)) - known
    if unknown:
        raise UsageError(f"unknown decoding options: {', '.join(sorted(unknown))}")
    asked = {name: value for name, value in given.items() if value is not None}
    options = replace(DecodeOptions(**defaults), **asked)
    idle = [name for name in OF_DRAWING if name in asked]
    if idle and not options.do_sample:
        raise UsageError(f"{', '.join(idle)}: only for drawn captions: add --sample --beams 1, or leave it out")
    return options
