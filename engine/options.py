"""How captions are decoded: Hugging Face's options, a bundle's own settings, and what is asked for over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.declarations import as_tuples, declared, option
from engine.errors import UsageError

DEFAULT_NEW_TOKENS = 20
"""New tokens when nothing says otherwise (transformers 4.57, GenerationMixin._prepare_generated_length)."""

MAX_LENGTH_PENALTY = 10
"""Beyond it a length of 512 tokens raised to the penalty nears the limits of float32."""
MIN_LENGTH_PENALTY = -5
"""Below it scores fall under the -1e9 by which beam search marks its placeholders, and captions would be empty."""

MIN_PENALTY, MAX_PENALTY = 0.01, 100.0
"""Hugging Face takes any number above 0; beyond these, words said before are certain or impossible."""

MIN_TEMPERATURE = 0.01
"""Below it nothing but the likeliest word is left: that is greedy decoding."""
MIN_TOP_P = 1e-9
"""Hugging Face takes any number above 0; one as small leaves the likeliest word alone, too."""


@dataclass(frozen=True)
class DecodeOptions:
    """How captions are decoded; names and meaning are Hugging Face's. Checked on construction (UsageError).

    It knows which options were given: `over` lays these over a bundle's generation settings, and those over the
    defaults here, which are Hugging Face's. None is not given. With `do_sample`, `num_return_sequences` captions are
    drawn with one beam each. `max_length` and `min_length` count the prompt, `max_new_tokens` and `min_new_tokens` do
    not and win where both are given. `bad_words` are texts and win over `bad_words_ids`, which are what a checkpoint
    holds; lists are taken for tuples.
    """

    num_beams: int = option(1, "--beams", "Beams; 1 is greedy.", least=1)
    no_repeat_ngram_size: int = option(0, "--no-repeat-ngram", "Never repeat an n-gram of this size; 0: off.", least=0)
    repetition_penalty: float = option(
        1.0,
        "--repetition-penalty",
        "Above 1 words said before, prompt included, lose.",
        least=MIN_PENALTY,
        most=MAX_PENALTY,
    )
    bad_words: tuple[str, ...] | None = option(
        None, "--bad-words", "File of words or phrases, one a line, that no caption holds.", in_bundle=False
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = option(
        None, help="The same as token ids; for bundles and Python."
    )
    suppress_tokens: tuple[int, ...] | None = option(
        None, "--suppress-tokens", "Token ids no caption holds.", metavar="ID,ID"
    )
    begin_suppress_tokens: tuple[int, ...] | None = option(
        None, help="Token ids no caption begins with, behind the prompt; for bundles and Python."
    )
    max_new_tokens: int | None = option(
        None, "--max-new-tokens", "Most tokens a caption may add to the prompt.", least=1
    )
    max_length: int | None = option(
        None, help="Most tokens of a caption, prompt included; for bundles and Python.", least=2
    )
    min_new_tokens: int | None = option(None, "--min-new-tokens", "Fewest tokens before a caption may end.", least=0)
    min_length: int = option(0, help="Fewest tokens of a caption, prompt included; for bundles and Python.", least=0)
    length_penalty: float = option(
        1.0,
        "--length-penalty",
        "Above 0 favours long captions, below 0 short ones.",
        least=MIN_LENGTH_PENALTY,
        most=MAX_LENGTH_PENALTY,
    )
    early_stopping: bool | Literal["never"] = option(
        False,
        "--early-stopping",
        "When beam search may stop.",
        choices={"false": False, "true": True, "never": "never"},
    )
    num_return_sequences: int = option(1, "--n-best", "Alternatives an image in --n-best-out.", least=1)
    prompt: str | None = option(None, "--prompt", "Text every caption starts with.", in_bundle=False)
    do_sample: bool = option(
        False,
        "--sample",
        "Draw captions instead of searching (--beams 1).",
        sampling=True,
        in_bundle=False,
    )
    temperature: float = option(
        1.0,
        "--temperature",
        "Of --sample; below 1 likelier words gain.",
        least=MIN_TEMPERATURE,
        most=100,
        sampling=True,
        in_bundle=False,
    )
    top_k: int = option(
        50, "--top-k", "Of --sample: only so many of the likeliest words.", least=1, sampling=True, in_bundle=False
    )
    top_p: float = option(
        1.0,
        "--top-p",
        "Of --sample: only the likeliest words that reach this probability.",
        least=MIN_TOP_P,
        most=1,
        sampling=True,
        in_bundle=False,
    )
    seed: int = option(
        0, "--seed", "Of --sample: the same seed draws the same captions.", least=0, sampling=True, in_bundle=False
    )
    given: frozenset[str] = field(default=frozenset(), kw_only=True, repr=False, compare=False)
    """Names of the options that were given, at their default or not. dataclasses.replace keeps them."""

    def __new__(cls, *values: Any, given: frozenset[str] | None = None, **named: Any) -> DecodeOptions:
        """Note which options are named; in a copy that was told `given`, those and whatever is not at its default."""
        options = object.__new__(cls)
        named |= dict(zip(DECODE_OPTIONS, values, strict=False))
        told = {name for name, value in named.items() if value is not None}
        if given is not None:
            told = {name for name in told if named[name] != DEFAULTS.get(name)} | given
        options.__dict__["_told"] = frozenset(told)
        return options

    def __post_init__(self) -> None:
        self.__dict__["given"] = self.__dict__.pop("_told")
        for name in LISTS:
            self.__dict__[name] = as_tuples(getattr(self, name))
        for name, (declaration, kind) in DECODE_OPTIONS.items():
            value = getattr(self, name)
            if not declaration.fits(value, kind):
                raise UsageError(f"{name} must be {declaration.wanted(kind)}, not {value!r}")
        if "num_beams" in self.given:  # otherwise a bundle may have a say in it, see `over`
            self._check_together()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.clear()  # what __new__ noted of a copy that is unpickled
        self.__dict__.update(state)

    def _check_together(self) -> None:
        """Raise UsageError for options that exclude each other."""
        if self.do_sample and self.num_beams > 1:
            raise UsageError(f"drawn captions have one beam each, not {self.num_beams}: add --beams 1")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise UsageError(
                f"{self.num_return_sequences} captions an image need at least as many beams, not {self.num_beams}"
            )

    def replace(self, **given: Any) -> DecodeOptions:
        """Return a copy in which these are given, too."""
        values = {name: getattr(self, name) for name in DECODE_OPTIONS} | given
        return DecodeOptions(**values, given=self.given | set(given))

    def over_given(self, others: DecodeOptions) -> DecodeOptions:
        """Return what is given here over what is given in `others`."""
        return others.replace(**{name: getattr(self, name) for name in self.given})

    def over(self, defaults: Mapping[str, Any]) -> DecodeOptions:
        """Lay what is given over `defaults`, a bundle's generation settings, over our own; the result gives everything.

        A given max_new_tokens also beats a default max_length, and min_new_tokens a default min_length, as in
        Hugging Face. Raises UsageError on a default with an unknown name or out of range, and where something was
        given that would do nothing.
        """
        _refuse_unknown(defaults)
        if self.bad_words is not None:  # they take the place of the bundle's
            if self.bad_words_ids is not None:
                raise UsageError("bad_words and bad_words_ids say the same thing: give one of them")
            defaults = {name: value for name, value in defaults.items() if name != "bad_words_ids"}
        asked = {name: getattr(self, name) for name in self.given}
        options = DecodeOptions(**{**DEFAULTS, **defaults, **asked}, given=frozenset(DECODE_OPTIONS))
        idle = [name for name in DECODE_OPTIONS if name in self.given - {"do_sample"} and name in SAMPLING]
        if idle and not options.do_sample and self.given != options.given:
            raise UsageError(f"{', '.join(idle)}: only for drawn captions: add --sample --beams 1, or leave it out")
        return options

    @property
    def most_banned(self) -> int:
        """Return how many ids can be banned in one place, but for repeated n-grams and the end."""
        listed = (self.bad_words, self.bad_words_ids, self.suppress_tokens, self.begin_suppress_tokens)
        return sum(len(ids) for ids in listed if ids)

    def in_force(self) -> dict[str, Any]:
        """Return the options that decide the captions by name: not those of drawing where captions are searched for."""
        return {name: value for name, value in self.values().items() if self.do_sample or name not in SAMPLING}

    def values(self) -> dict[str, Any]:
        """Return every option that has a value, by name."""
        values = {name: getattr(self, name) for name in DECODE_OPTIONS}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def max_total_length(self, prompt_length: int) -> int:
        """Return the largest number of tokens a caption may have, prompt of `prompt_length` tokens included."""
        if self.max_new_tokens is None and self.max_length is not None:
            return self.max_length
        return prompt_length + (self.max_new_tokens or DEFAULT_NEW_TOKENS)

    def min_total_length(self, prompt_length: int) -> int:
        """Return the number of tokens before which a caption may not end, prompt included."""
        return self.min_length if self.min_new_tokens is None else prompt_length + self.min_new_tokens


def notes_on(asked: DecodeOptions, options: DecodeOptions, rows: int | None = None) -> list[str]:
    """Return what has no effect of the options that were `asked` for, one sentence each.

    `options` are those in force, see `DecodeOptions.over`; `rows` is the number of beams in flight that was asked for.
    Hugging Face takes such options and warns.
    """
    idle = [name for name in BEAM_SEARCH if name in asked.given and getattr(asked, name) != DEFAULTS[name]]
    notes = []
    if options.num_beams == 1 and idle:
        notes.append(f"{' and '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect with one beam")
    if rows is not None and rows < options.num_beams:
        notes.append(
            f"--rows {rows} is less than the {options.num_beams} beams of one image: {options.num_beams} are used"
        )
    return notes


BEAM_SEARCH = ("length_penalty", "early_stopping")
"""Options that only count where there are several beams."""
DECODE_OPTIONS = declared(DecodeOptions)
DEFAULTS = {name: declaration.default for name, (declaration, _) in DECODE_OPTIONS.items()}
LISTS = tuple(name for name, (_, kind) in DECODE_OPTIONS.items() if kind.startswith("tuple"))
SAMPLING = tuple(name for name, (declaration, _) in DECODE_OPTIONS.items() if declaration.sampling)
"""Options that say nothing where captions are searched for."""
GENERATION_SETTINGS = tuple(name for name, (declaration, _) in DECODE_OPTIONS.items() if declaration.in_bundle)
"""Options that a bundle carries where its checkpoint's differ from Hugging Face's."""


def options_from(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> DecodeOptions:
    """Lay `given` (None means not given) over `defaults`: DecodeOptions.over by name, unknown ones refused."""
    _refuse_unknown(given)
    return DecodeOptions(**{name: value for name, value in given.items() if value is not None}).over(defaults)


def _refuse_unknown(names: Iterable[str]) -> None:
    unknown = set(names) - set(DECODE_OPTIONS)
    if unknown:
        listed = " ".join(", ".join(sorted(unknown)).split())[:200]  # a bundle's names, line breaks and all
        raise UsageError(f"unknown decoding options: {listed}")
