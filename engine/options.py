"""Declare an option once, with its flag, help and limits, as a field of any dataclass.

The command line, the checks, the signature and a bundle's generation settings are all built from these declarations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from engine.errors import UsageError

PRECISIONS = ("fp32", "fp16", "int8")
"""Precisions of weights and activations. Scores and their sums over a caption are float32 in all of them."""
ID_HELP = "Column of ids or file names in input tables; by default the usual names are looked for."
CAPTION_HELP = "Column of captions in input tables; by default the usual names are looked for."
PROMPT_HELP = "Column of prompts in input tables; `prompt` by default."


@dataclass(frozen=True)
class Option:
    """The declaration of an option, except its type.

    default    value if the option is not given
    flag       name on the command line; empty if the option has none
    help       one line for `--help` and docs/commands.md
    least      smallest allowed number
    most       largest allowed number
    choices    allowed values by their names on the command line
    bare       value of the flag if it is given without one
    metavar    how `--help` shows the value
    sampling   whether the option only applies to sampling (`do_sample`)
    in_bundle  whether a bundle's generation settings may contain the option
    """

    default: Any
    flag: str
    help: str
    least: int | float | None = None
    most: int | float | None = None
    choices: Mapping[str, Any] | None = None
    bare: str | None = None
    metavar: str | None = None
    sampling: bool = False
    in_bundle: bool = True

    def fits(self, value: Any, kind: str) -> bool:
        """Return whether a value has the type `kind` (the annotation) and is within the limits."""
        if value is None:
            return "None" in kind
        if self.choices is not None:
            # `is`, not ==: True == 1, so that 1 would pass for a choice of True
            return any(
                value is choice or (isinstance(choice, str) and value == choice) for choice in self.choices.values()
            )
        if kind.startswith("tuple["):
            return isinstance(value, tuple) and all(_fits_entry(entry, kind) for entry in value)
        types = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}[kind.split(" | ")[0]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return False
        return not isinstance(value, int | float) or (
            (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        )

    def wanted(self, kind: str) -> str:
        """Describe the allowed values for an error message, such as `a whole number of at least 1`."""
        if self.choices is not None:
            return " or ".join([", ".join(list(self.choices)[:-1]), list(self.choices)[-1]])
        if kind.startswith("tuple["):
            return LISTED[kind.split(" | ")[0]]
        words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
        limits = [f"of at least {self.least}"] if self.least is not None else []
        limits += [f"at most {self.most}"] if self.most is not None else []
        return f"{words[kind.split(' | ')[0]]} {' and '.join(limits)}".rstrip()


LISTED = {
    "tuple[str, ...]": "a list of texts",
    "tuple[int, ...]": "a list of token ids",
    "tuple[tuple[int, ...], ...]": "a list of lists of token ids",
}
"""Descriptions of the list types, for error messages."""


def as_tuples(value: Any) -> Any:
    """Convert lists, nested ones included, to tuples: JSON has no tuples, and options must be immutable."""
    return tuple(as_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


def _fits_entry(entry: Any, kind: str) -> bool:
    """Return whether an entry fits the list type `kind`: token ids are whole numbers of at least 0."""
    if kind.startswith("tuple[tuple"):
        return (
            isinstance(entry, tuple) and bool(entry) and all(_fits_entry(token, "tuple[int, ...]") for token in entry)
        )
    return isinstance(entry, str) if kind.startswith("tuple[str") else type(entry) is int and entry >= 0


def option(default: Any = MISSING, flag: str = "", help: str = "", **more: Any) -> Any:  # noqa: A002
    """Declare a dataclass field as an option; `more` are fields of Option. Without a default the option is required."""
    return field(default=default, metadata={"option": Option(default, flag, help, **more)})


def declared(options: type) -> dict[str, tuple[Option, str]]:
    """Return {field name: (Option, annotation as a string)} for the options that a dataclass declares."""
    return {
        entry.name: (entry.metadata["option"], str(entry.type))
        for entry in fields(options)
        if "option" in entry.metadata
    }


DEFAULT_NEW_TOKENS = 20
"""Maximum number of new tokens by default (transformers 4.57, GenerationMixin._prepare_generated_length)."""

MAX_LENGTH_PENALTY = 10
"""Above it, 512 tokens raised to the power of the penalty approaches the limits of float32."""
MIN_LENGTH_PENALTY = -5
"""Below it, scores drop below -1e9, which marks the placeholders of beam search, and captions would be empty."""

MIN_PENALTY, MAX_PENALTY = 0.01, 100.0
"""Hugging Face accepts any number above 0. Outside this range repeated tokens become certain or impossible."""

MIN_TEMPERATURE = 0.01
"""Below it only the most likely token remains, which is greedy decoding."""
MIN_TOP_P = 1e-9
"""Hugging Face accepts any number above 0. A value this small already leaves only the most likely token."""


UNSET: Any = object()
"""Default of decoding options: not given, which differs from given at its default (see DecodeOptions.over)."""


def _unset(default: Any, flag: str = "", help: str = "", **more: Any) -> Any:  # noqa: A002
    """Declare a decoding option, see `option`."""
    return field(default=UNSET, metadata={"option": Option(default, flag, help, **more)})


@dataclass(frozen=True)
class DecodeOptions:
    """How captions are decoded, with Hugging Face's names and meanings. Raises UsageError for invalid values.

    An object records which options were given: explicit options override a bundle's generation settings, which
    override the defaults here, which are Hugging Face's (see `over`). None means not given; lists become tuples.

    * With `do_sample`, `num_return_sequences` captions are sampled with one beam each.
    * `max_length` and `min_length` include the prompt. `max_new_tokens` and `min_new_tokens` do not, and override them.
    * `bad_words` are strings. They override `bad_words_ids`, the token ids that a checkpoint contains.

        DecodeOptions(num_beams=4, max_new_tokens=50)
    """

    num_beams: int = _unset(1, "--beams", "Number of beams; 1 is greedy search.", least=1)
    no_repeat_ngram_size: int = _unset(
        0, "--no-repeat-ngram", "Never repeat an n-gram of this many tokens; 0 is off.", least=0
    )
    repetition_penalty: float = _unset(
        1.0,
        "--repetition-penalty",
        "Penalty for tokens that are already in the caption or its prompt; 1 is off, above 1 avoids repetition.",
        least=MIN_PENALTY,
        most=MAX_PENALTY,
    )
    bad_words: tuple[str, ...] | None = _unset(
        None, "--bad-words", "Text file of words or phrases that no caption may contain, one per line.", in_bundle=False
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = _unset(
        None, help="Banned words as lists of token ids, see bad_words; set in a bundle or from Python."
    )
    suppress_tokens: tuple[int, ...] | None = _unset(
        None, "--suppress-tokens", "Token ids that no caption may contain, separated by commas.", metavar="ID,ID"
    )
    begin_suppress_tokens: tuple[int, ...] | None = _unset(
        None, help="Token ids that may not be the first token after the prompt; set in a bundle or from Python."
    )
    forced_bos_token_id: int | None = _unset(
        None, help="Token id that every caption without a prompt starts with; set in a bundle or from Python.", least=0
    )
    forced_eos_token_id: int | None = _unset(
        None, help="Token id that ends captions of the maximum length; set in a bundle or from Python.", least=0
    )
    max_new_tokens: int | None = _unset(
        None,
        "--max-new-tokens",
        "Maximum number of tokens per caption, prompt not counted; 20 if no maximum is set.",
        least=1,
    )
    max_length: int | None = _unset(
        None, help="Maximum number of tokens per caption, prompt included; set in a bundle or from Python.", least=2
    )
    min_new_tokens: int | None = _unset(
        None,
        "--min-new-tokens",
        "Minimum number of tokens per caption, prompt not counted; no minimum by default.",
        least=0,
    )
    min_length: int = _unset(
        0, help="Minimum number of tokens per caption, prompt included; set in a bundle or from Python.", least=0
    )
    length_penalty: float = _unset(
        1.0,
        "--length-penalty",
        "Beam search divides scores by length to this power: above 0 favours long captions, below 0 short ones.",
        least=MIN_LENGTH_PENALTY,
        most=MAX_LENGTH_PENALTY,
    )
    early_stopping: bool | Literal["never"] = _unset(
        False,
        "--early-stopping",
        "When beam search stops: `true` once it has as many captions as beams, `false` by a heuristic, `never` only "
        "when no better caption is possible.",
        choices={"false": False, "true": True, "never": "never"},
    )
    num_return_sequences: int = _unset(
        1, "--n-best", "Captions per image in --n-best-out; beam search needs at least as many beams.", least=1
    )
    prompt: str | None = _unset(
        None, "--prompt", "Text that every caption starts with; none by default.", in_bundle=False
    )
    do_sample: bool = _unset(
        False,
        "--sample",
        "Sample captions at random instead of searching for the best ones; needs one beam.",
        sampling=True,
        in_bundle=False,
    )
    temperature: float = _unset(
        1.0,
        "--temperature",
        "Sampling temperature with --sample; below 1 sharpens the distribution.",
        least=MIN_TEMPERATURE,
        most=100,
        sampling=True,
        in_bundle=False,
    )
    top_k: int = _unset(
        50,
        "--top-k",
        "Sample only from the K most likely tokens, with --sample.",
        least=1,
        sampling=True,
        in_bundle=False,
    )
    top_p: float = _unset(
        1.0,
        "--top-p",
        "Sample only from the most likely tokens that together reach this probability, with --sample; 1 is off.",
        least=MIN_TOP_P,
        most=1,
        sampling=True,
        in_bundle=False,
    )
    seed: int = _unset(
        0,
        "--seed",
        "Random seed for --sample; the same seed gives the same captions.",
        least=0,
        sampling=True,
        in_bundle=False,
    )
    given: frozenset[str] = field(default=UNSET, kw_only=True, repr=False, compare=False)
    """Names of the options that were given explicitly, at their default or not; recorded here, never passed."""

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in DECODE_OPTIONS}
        passed = {name: value for name, value in values.items() if value is not UNSET and value is not None}
        if self.given is UNSET:
            given = frozenset(passed)
        else:  # dataclasses.replace passes every field, so that being passed does not mean that it was given
            given = self.given | {name for name, value in passed.items() if value != DEFAULTS[name]}
        # a frozen dataclass may set its fields here only like this
        self.__dict__.update(DEFAULTS | passed, given=given)
        for name in LISTS:
            self.__dict__[name] = as_tuples(getattr(self, name))
        for name, (declaration, kind) in DECODE_OPTIONS.items():
            value = getattr(self, name)
            if not declaration.fits(value, kind):
                raise UsageError(f"{name} must be {declaration.wanted(kind)}, not {value!r}")
        if "num_beams" in given:  # otherwise the bundle may set it: `over` checks then
            self._check_together()

    def _check_together(self) -> None:
        """Raise UsageError for options that exclude each other."""
        if self.do_sample and self.num_beams > 1:
            raise UsageError(f"sampling needs one beam, not {self.num_beams}: add --beams 1")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise UsageError(
                f"{self.num_return_sequences} captions per image need at least as many beams, not {self.num_beams}: "
                "raise --beams or lower --n-best"
            )

    def replace(self, **given: Any) -> DecodeOptions:
        """Return a copy in which these options are given as well. Raises UsageError for unknown names."""
        _refuse_unknown(given)
        values = {name: getattr(self, name) for name in DECODE_OPTIONS} | given
        return DecodeOptions(**values, given=self.given | set(given))

    def over_given(self, others: DecodeOptions) -> DecodeOptions:
        """Return `others` overridden by the options that are given here."""
        return others.replace(**{name: getattr(self, name) for name in self.given})

    def over(self, defaults: Mapping[str, Any]) -> DecodeOptions:
        """Return the options in force: those given here override `defaults` (a bundle's generation settings), which
        override Hugging Face's defaults. In the result every option is given.

        As in Hugging Face, max_new_tokens also overrides a default max_length, and min_new_tokens a default min_length.
        Raises UsageError if a default has an unknown name or is out of range, or if a sampling option is given without
        do_sample.
        """
        _refuse_unknown(defaults)
        if self.bad_words is not None:  # they replace the bundle's
            if self.bad_words_ids is not None:
                raise UsageError("bad_words and bad_words_ids exclude each other: give one of them")
            defaults = {name: value for name, value in defaults.items() if name != "bad_words_ids"}
        explicit = {name: getattr(self, name) for name in self.given}
        options = DecodeOptions(**{**DEFAULTS, **defaults, **explicit}, given=frozenset(DECODE_OPTIONS))
        unused = [name for name in DECODE_OPTIONS if name in self.given - {"do_sample"} and name in SAMPLING]
        # options that are resolved already give everything, defaults of sampling included: they may be resolved again
        if unused and not options.do_sample and self.given != options.given:
            raise UsageError(f"{', '.join(unused)}: only for sampling: add --sample --beams 1, or remove the option")
        return options

    @property
    def most_banned(self) -> int:
        """Maximum number of ids that can be banned at one position, not counting repeated n-grams and the end token."""
        listed = (self.bad_words, self.bad_words_ids, self.suppress_tokens, self.begin_suppress_tokens)
        return sum(len(ids) for ids in listed if ids)

    def in_force(self) -> dict[str, Any]:
        """Return the options that affect the captions, by name: sampling options only with `do_sample`."""
        return {name: value for name, value in self.values().items() if self.do_sample or name not in SAMPLING}

    def values(self) -> dict[str, Any]:
        """Return every option that has a value, by name."""
        values = {name: getattr(self, name) for name in DECODE_OPTIONS}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def max_total_length(self, prompt_length: int) -> int:
        """Return the maximum number of tokens of a caption, including a prompt of `prompt_length` tokens."""
        if self.max_new_tokens is None and self.max_length is not None:
            return self.max_length
        return prompt_length + (self.max_new_tokens or DEFAULT_NEW_TOKENS)

    def min_total_length(self, prompt_length: int) -> int:
        """Return the minimum number of tokens of a caption, including a prompt of `prompt_length` tokens."""
        return self.min_length if self.min_new_tokens is None else prompt_length + self.min_new_tokens


def notes_on(requested: DecodeOptions, options: DecodeOptions, rows: int | None = None) -> list[str]:
    """Return a sentence for each `requested` option that has no effect. Hugging Face accepts such options and warns.

    `options` are those in force, see `DecodeOptions.over`; `rows` is the requested number of beams in flight.
    """
    unused = [name for name in BEAM_SEARCH if name in requested.given and getattr(requested, name) != DEFAULTS[name]]
    notes = []
    if options.num_beams == 1 and unused:
        notes.append(f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect with one beam")
    if rows is not None and rows < options.num_beams:
        notes.append(
            f"--rows {rows} is less than the {options.num_beams} beams of one image: {options.num_beams} are used"
        )
    return notes


BEAM_SEARCH = ("length_penalty", "early_stopping")
"""Options that only apply to two or more beams."""
DECODE_OPTIONS = declared(DecodeOptions)
DEFAULTS = {name: declaration.default for name, (declaration, _) in DECODE_OPTIONS.items()}
LISTS = tuple(name for name, (_, kind) in DECODE_OPTIONS.items() if kind.startswith("tuple"))
SAMPLING = tuple(name for name, (declaration, _) in DECODE_OPTIONS.items() if declaration.sampling)
"""Options that only apply to sampling."""
GENERATION_SETTINGS = tuple(name for name, (declaration, _) in DECODE_OPTIONS.items() if declaration.in_bundle)
"""Options that a bundle records if its checkpoint's values differ from Hugging Face's defaults."""


def options_from(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> DecodeOptions:
    """Return `defaults` overridden by `given`, by name (None means not given). Raises UsageError for unknown names."""
    _refuse_unknown(given)
    return DecodeOptions(**{name: value for name, value in given.items() if value is not None}).over(defaults)


def _refuse_unknown(names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(DECODE_OPTIONS))
    if unknown:
        by_flag = {one.flag: name for name, (one, _) in DECODE_OPTIONS.items() if one.flag}
        meant = [by_flag[flag] for name in unknown if (flag := f"--{name.replace('_', '-')}") in by_flag]
        hint = f": use {', '.join(meant)}" if meant else ""
        # names from a bundle may be long and hold line breaks
        listed = " ".join(", ".join(unknown).split())[:200]
        raise UsageError(f"unknown decoding options: {listed}{hint}")


CLIP, SCALE = "clip", "scale"
"""CLIP makes values above 255 white, like Hugging Face's processor. SCALE maps each image's range to 0 to 255."""
DEPTH_HELP = (
    "How images with more than 8 bits become 8: `clip` (above 255 is white, as in Hugging Face), `scale` (each image's "
    "range), or a range LOW,HIGH."
)


@functools.lru_cache(maxsize=16)
def window_of(depth: str) -> tuple[float, float] | None:
    """Parse LOW,HIGH into a window of values. Returns None for CLIP and SCALE; raises UsageError for other texts."""
    if depth in (CLIP, SCALE):
        return None
    try:
        low, high = (float(number) for number in depth.split(","))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"high bit depth {depth!r}: give {CLIP}, {SCALE}, or two numbers LOW,HIGH, the lower first")
    return low, high
