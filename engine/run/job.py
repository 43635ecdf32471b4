"""Inputs and outputs of a run; decoding options are in engine/options.py."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from engine.errors import UsageError, counted
from engine.options import CLIP, DEPTH_HELP, ID_HELP, PROMPT_HELP, declared, option, window_of

if TYPE_CHECKING:  # for a quick --help, methods import what only they need
    from engine.inputs.columns import Columns
    from engine.inputs.images import FindOptions
    from engine.inputs.remote import Location


Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`: every `count`-th image, so that all shards take about as long."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the shard of a text such as `3/8`. Raises UsageError."""
        match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text, re.ASCII)
        if match is None or int(match[1]) > int(match[2]):
            raise UsageError(f"--shard expects I/N with I from 1 to N, such as 3/8, not {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def part(self, items: Sequence[Item]) -> list[Item]:
        """Return the items of this shard. Raises UsageError if some shard would have none."""
        if self.count > len(items):
            raise UsageError(f"--shard {self}: more shards than images: use at most {counted(len(items), 'shard')}")
        return list(items[self.number - 1 :: self.count])


@dataclass(frozen=True)
class Inputs:
    """The images of a run: those found at `places` (engine/inputs/paths.py), all of them or those of a manifest."""

    places: tuple[Location, ...] = option(
        flag="--input",
        help="Images to caption: a directory, URI, image file, quoted pattern, .txt list of paths, or - (paths from "
        "standard input); may be repeated. DICOM needs the extra `dicom`.",
    )
    manifest: Path | None = option(
        None, "--manifest", "Table or list of ids: caption only these images, in this order; by default all images."
    )
    shard: str | None = option(
        None,
        "--shard",
        "Caption only part I of N of the images, as one of N jobs, each with its own --out; `engine merge` joins them.",
        metavar="I/N",
    )
    watch: bool = option(
        False,
        "--watch",
        "Wait for new images in the folder --input and caption them once their files are complete, until Ctrl-C.",
    )
    recursive: bool = option(False, "--recursive", "Also look for images in subfolders.")
    ids: str = option(
        "stem",
        "--ids",
        "What identifies an image: `stem`: file name without suffix; `path`: path inside --input without suffix; "
        "`file`: path inside --input with suffix.",
        choices={"stem": "stem", "path": "path", "file": "file"},
    )
    prompts: Path | None = option(
        None,
        "--prompts",
        "Table `ID,prompt`: the text that each image's caption starts with, instead of one --prompt for all.",
    )
    id_column: str | None = option(None, "--id-column", ID_HELP, metavar="NAME")
    prompt_column: str | None = option(None, "--prompt-column", PROMPT_HELP, metavar="NAME")
    dicom_frame: int = option(
        0, "--dicom-frame", "Frame to read from DICOM files that have several, counted from 0.", least=0
    )
    high_bit_depth: str = option(CLIP, "--high-bit-depth", DEPTH_HELP)

    def __post_init__(self) -> None:
        window_of(self.high_bit_depth)  # raises UsageError for an invalid value
        if self.shard is not None:
            Shard.parse(self.shard)  # the same

    @property
    def find_options(self) -> FindOptions:
        """How to look for the images."""
        from engine.inputs.images import FindOptions

        return FindOptions(self.recursive, self.dicom_frame, self.ids, self.high_bit_depth)

    @functools.cached_property
    def columns(self) -> Columns:
        """The columns of --manifest and --prompts, as given by --id-column and --prompt-column."""
        from engine.inputs.columns import Columns

        return Columns(self.id_column, None, self.prompt_column)


def parse_layers(text: str | None) -> list[int] | None:
    """Return the layers of --attention-layers, or None for all. Raises UsageError for anything but numbers."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,4}", name) for name in names):
        raise UsageError(f"--attention-layers expects numbers such as 0,5,11, not {text!r}")
    return None if text is None else [int(name) for name in names]


STDOUT = Path("-")


@dataclass(frozen=True)
class Outputs:
    """The files that a run writes, their content, and whether an interrupted run resumes."""

    out: Path = option(
        flag="--out",
        help="CSV file to write, with the columns ID,Caption; - streams captions to standard output as they finish.",
    )
    jsonl: bool = option(False, "--jsonl", "Write JSON lines (id, file, caption) to --out instead of CSV.")
    n_best_out: Path | None = option(
        None,
        "--n-best-out",
        "JSON lines file for the alternatives of each image, their scores, and how sure the model is; not written by "
        "default.",
    )
    timings_out: Path | None = option(
        None,
        "--timings-out",
        "CSV file `ID,latency_s` for the latency of each image in seconds; not written by default.",
    )
    calibration: Path | None = option(
        None,
        "--calibration",
        "File of `engine calibrate`: adds the expected score of each caption to --n-best-out and --review-out.",
    )
    abstain_below: float | None = option(
        None,
        "--abstain-below",
        "Mark for review the captions whose expected score (--calibration) is below X; they are still written.",
        metavar="X",
    )
    review_out: Path | None = option(
        None,
        "--review-out",
        "CSV file `ID,expected_score` for the captions that --abstain-below marks; not written by default.",
    )
    sidecar: str | None = option(
        None,
        "--sidecar",
        "Also write each caption to a .txt file next to its image; an existing file is skipped, overwritten, appended "
        "to or prepended to; without a value: skip.",
        choices={name: name for name in ("skip", "overwrite", "append", "prepend")},
        bare="skip",
        metavar="[skip|overwrite|append|prepend]",
    )
    sidecar_dir: Path | None = option(
        None,
        "--sidecar-dir",
        "Folder for the files of --sidecar, with the subfolders of --input, instead of next to the images.",
    )
    attention: Path | None = option(
        None,
        "--attention",
        "Folder for one file ID.npz per image with the attention map of each token (docs/attention.md); on the "
        "backends cpu and torch; not written by default.",
    )
    attention_layers: str | None = option(
        None,
        "--attention-layers",
        "Decoder layers that --attention averages over, counted from 0; by default all.",
        metavar="N,N,...",
    )
    prefix: str = option("", "--prefix", "Text added before each caption in the output; it does not change decoding.")
    suffix: str = option("", "--suffix", "Text added after each caption in the output; it does not change decoding.")
    without_prompt: bool = option(
        False, "--without-prompt", "Write captions without the prompt that they start with; by default it is included."
    )
    raw_text: bool = option(
        False, "--raw-text", "Write the tokenizer's text as Hugging Face decodes it; by default it is detokenised."
    )
    allow_missing: bool = option(
        False,
        "--allow-missing",
        "Write an empty caption for images that cannot be read; by default they make the run fail.",
    )
    resume: bool = option(True, "--resume/--no-resume", "Resume an interrupted run of the same command; on by default.")
    update: bool = option(
        False,
        "--update",
        "Keep captions next to --out, so that the same command later captions only new or changed images.",
    )

    def __post_init__(self) -> None:
        if self.sidecar_dir is not None and self.sidecar is None:
            raise UsageError("--sidecar-dir is the folder for --sidecar: add --sidecar, or remove --sidecar-dir")
        if self.is_stream and self.update:
            raise UsageError("--update keeps captions next to --out, which must then be a file, not -")
        if self.abstain_below is not None and (self.calibration is None or not math.isfinite(self.abstain_below)):
            raise UsageError("--abstain-below is a number, a score of the metric of --calibration, which it needs")
        if self.review_out is not None and self.abstain_below is None:
            raise UsageError("--review-out lists the captions that --abstain-below marks: add --abstain-below")
        if self.calibration is not None and (self.n_best_out, self.review_out) == (None, None):
            raise UsageError("--calibration has no effect without --n-best-out or --review-out: add one of them")
        if self.attention_layers is not None and self.attention is None:
            raise UsageError("--attention-layers has no effect without --attention: add it, or remove the option")
        self.layers()  # raises UsageError for an invalid value
        for flag, text in (("--prefix", self.prefix), ("--suffix", self.suffix)):
            if not text.isprintable():
                raise UsageError(f"{flag} {text!r} contains control characters: remove them")

    @property
    def is_stream(self) -> bool:
        """Whether captions are streamed to standard output; such a run has no journal."""
        return self.out == STDOUT

    def layers(self) -> list[int] | None:
        """Return the layers of --attention-layers, see parse_layers."""
        return parse_layers(self.attention_layers)

    @property
    def journal(self) -> Path | None:
        """The file that keeps captions until they are written (with `update`, between runs); None for a stream."""
        from engine.run.journal import journal_path, update_path

        if self.is_stream:
            return None
        return update_path(self.out) if self.update else journal_path(self.out)

    @property
    def text_settings(self) -> list[str | bool]:
        """What decides the text of the output, in addition to the captions."""
        return [self.jsonl, self.prefix, self.suffix, self.without_prompt, self.raw_text, self.allow_missing]

    def files(self) -> dict[str, Path]:
        """Return the files that will be written, by their options, without those of each image."""
        paths = {flag: getattr(self, name) for name, flag in _FILES.items()}
        return {flag: path for flag, path in paths.items() if path is not None and (flag, path) != ("--out", STDOUT)}

    def check(self, inputs: list[Path]) -> None:
        """Raise UsageError if an output cannot be written or would overwrite an input, see check_outputs."""
        from engine.files.atomic import check_outputs
        from engine.files.lock import lock_path

        outputs = self.files()
        locks = {f"the lock of {flag}": lock_path(path) for flag, path in outputs.items()}
        journal = {} if self.journal is None else {"the journal of --out": self.journal}
        check_outputs(outputs | journal | locks, inputs)


_FILES = {
    name: declaration.flag
    for name, (declaration, kind) in declared(Outputs).items()
    if "Path" in kind and name not in ("sidecar_dir", "calibration", "attention")
}
