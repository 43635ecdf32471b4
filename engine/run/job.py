"""What a run reads and writes; what else it is asked for stands in engine/options.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UsageError
from engine.files.atomic import check_outputs
from engine.files.lock import lock_path
from engine.inputs.columns import ID_HELP, PROMPT_HELP, Columns
from engine.inputs.pixels import CLIP, window_of
from engine.inputs.pixels import HELP as DEPTH_HELP
from engine.inputs.remote import Location
from engine.options import declared, option
from engine.run.journal import journal_path, update_path


@dataclass(frozen=True)
class Inputs:
    """The images of a run: those of all `places` (engine/inputs/paths.py), all of them or those of a manifest."""

    places: tuple[Location, ...] = option(
        flag="--input",
        help="Directory or URI of images, a picture, a quoted pattern, a .txt list of paths, or - for paths on "
        "standard input; may be given several times (DICOM: extra `dicom`).",
    )
    manifest: Path | None = option(None, "--manifest", "File of ids: caption only these, in this order.")
    recursive: bool = option(False, "--recursive", "Look for images in the folders of directories, too.")
    ids: str = option(
        "stem",
        "--ids",
        "Ids of images: `stem`, the file name without suffix; `path`, with the folders inside --input; `file`, that "
        "path with suffix.",
        choices={"stem": "stem", "path": "path", "file": "file"},
    )
    prompts: Path | None = option(
        None, "--prompts", "Table ID,prompt: a text each caption starts with, instead of one --prompt for all."
    )
    id_column: str | None = option(None, "--id-column", ID_HELP, metavar="NAME")
    prompt_column: str | None = option(None, "--prompt-column", PROMPT_HELP, metavar="NAME")
    dicom_frame: int = option(0, "--dicom-frame", "Frame of DICOM files, counted from 0.", least=0)
    high_bit_depth: str = option(CLIP, "--high-bit-depth", DEPTH_HELP)

    def __post_init__(self) -> None:
        window_of(self.high_bit_depth)  # refuses what is neither a word nor a window

    @functools.cached_property
    def columns(self) -> Columns:
        """The columns of --manifest and --prompts that were chosen by name."""
        return Columns(self.id_column, None, self.prompt_column)


STDOUT = Path("-")


@dataclass(frozen=True)
class Outputs:
    """The files of a run, what is in them, and whether a run that was cut off resumes."""

    out: Path = option(
        flag="--out",
        help="CSV file to write: ID,Caption; - is standard output, where a caption comes as soon as it is known.",
    )
    jsonl: bool = option(False, "--jsonl", "Write JSON lines to --out: id, file, caption.")
    n_best_out: Path | None = option(None, "--n-best-out", "JSON lines file for the alternatives.")
    timings_out: Path | None = option(None, "--timings-out", "CSV file for the latency of every image: ID,latency_s.")
    sidecar: str | None = option(
        None,
        "--sidecar",
        "Write each caption into a .txt file beside its picture, too; where there is one: skip it, overwrite it, or "
        "append or prepend to its text. skip without a value.",
        choices={name: name for name in ("skip", "overwrite", "append", "prepend")},
        bare="skip",
        metavar="[skip|overwrite|append|prepend]",
    )
    sidecar_dir: Path | None = option(
        None,
        "--sidecar-dir",
        "Write these files below this folder, in folders as those of --input, not beside pictures.",
    )
    prefix: str = option("", "--prefix", "Text before every caption that is written; decoding knows nothing of it.")
    suffix: str = option("", "--suffix", "Text behind every caption that is written.")
    raw_text: bool = option(False, "--raw-text", "Write the text as Hugging Face decodes it, not detokenised.")
    allow_missing: bool = option(False, "--allow-missing", "Write an empty caption for images that cannot be read.")
    resume: bool = option(True, "--resume/--no-resume", "Resume where the same command was cut off; on by default.")
    update: bool = option(
        False,
        "--update",
        "Keep the captions next to --out: the same command captions only images that are new or changed.",
    )

    def __post_init__(self) -> None:
        if self.sidecar_dir is not None and self.sidecar is None:
            raise UsageError("--sidecar-dir is where --sidecar writes: give both, or neither")
        if self.is_stream and self.update:
            raise UsageError("--update keeps captions beside --out, which must be a file then, not -")
        for flag, text in (("--prefix", self.prefix), ("--suffix", self.suffix)):
            if not text.isprintable():
                raise UsageError(f"{flag} {text!r} holds characters that are no text")

    @property
    def is_stream(self) -> bool:
        """Whether captions go to standard output while the run goes on; it has no journal then."""
        return self.out == STDOUT

    @property
    def journal(self) -> Path | None:
        """Where captions are kept until they are written, or with `update` longer."""
        if self.is_stream:
            return None
        return update_path(self.out) if self.update else journal_path(self.out)

    def files(self) -> dict[str, Path]:
        """Return the files that will be written, by their options; without sidecars."""
        paths = {flag: getattr(self, name) for name, flag in _FILES.items()}
        return {flag: path for flag, path in paths.items() if path is not None and (flag, path) != ("--out", STDOUT)}

    def check(self, inputs: list[Path]) -> None:
        """Refuse outputs that cannot be written or would destroy an input, see check_outputs. Raises UsageError."""
        outputs = self.files()
        locks = {f"the lock of {flag}": lock_path(path) for flag, path in outputs.items()}
        journal = {} if self.journal is None else {"the journal of --out": self.journal}
        check_outputs(outputs | journal | locks, inputs)


_FILES = {
    name: declaration.flag
    for name, (declaration, kind) in declared(Outputs).items()
    if "Path" in kind and name != "sidecar_dir"
}
