"""How an option is declared, once: its flag, help and limits; any dataclass may have such fields.

Command line, checks, signature and a bundle's generation settings all read the declarations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from engine.errors import UsageError


@dataclass(frozen=True)
class Option:
    """What is said of an option beside its type.

    `flag` is its name on the command line, empty where it has none. Numbers lie between `least` and `most`; `choices`
    are the values by their names on the command line. With `bare` the flag may stand without a value and means that;
    `metavar` is how help shows the value. With `sampling` the option only counts where captions are drawn; without
    `in_bundle` a bundle cannot carry it.
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
        """Return whether a value is of the type `kind` (the annotation) and within the limits."""
        if value is None:
            return "None" in kind
        if self.choices is not None:
            return any(value is one or (isinstance(one, str) and value == one) for one in self.choices.values())
        if kind.startswith("tuple["):
            return isinstance(value, tuple) and all(_fits_entry(entry, kind) for entry in value)
        types = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}[kind.split(" | ")[0]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            return False
        return not isinstance(value, int | float) or (
            (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        )

    def wanted(self, kind: str) -> str:
        """Return in words what fits."""
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
"""Kinds of lists and what they are called."""


def as_tuples(value: Any) -> Any:
    """Return lists, those within lists too, as tuples; JSON has no tuples, and options must not change."""
    return tuple(as_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


def _fits_entry(entry: Any, kind: str) -> bool:
    """Return whether an entry fits the list `kind`: token ids are whole numbers of at least 0."""
    if kind.startswith("tuple[tuple"):
        return isinstance(entry, tuple) and bool(entry) and all(_fits_entry(one, "tuple[int, ...]") for one in entry)
    return isinstance(entry, str) if kind.startswith("tuple[str") else type(entry) is int and entry >= 0


def option(default: Any = MISSING, flag: str = "", help: str = "", **more: Any) -> Any:  # noqa: A002
    """Declare a field of a dataclass as an option; `more` are fields of Option. Without a default it is required."""
    return field(default=default, metadata={"option": Option(default, flag, help, **more)})


def declared(options: type) -> dict[str, tuple[Option, str]]:
    """Return the declared options of a dataclass and their types as written, by the names of their fields."""
    return {one.name: (one.metadata["option"], str(one.type)) for one in fields(options) if "option" in one.metadata}


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
