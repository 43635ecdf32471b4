"""What a run reads and writes; what else it is asked for stands in engine/options.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.declarations import declared, option
from engine.files.atomic import check_outputs
from engine.files.lock import lock_path
from engine.inputs.depth import CLIP, window_of
from engine.inputs.depth import HELP as DEPTH_HELP
from engine.inputs.remote import Location
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
        "Ids of images: `stem`, the file name without suffix, or `path`, with the folders inside --input.",
        choices={"stem": "stem", "path": "path"},
    )
    prompts: Path | None = option(
        None, "--prompts", "Table ID,prompt: a text each caption starts with, instead of one --prompt for all."
    )
    dicom_frame: int = option(0, "--dicom-frame", "Frame of DICOM files, counted from 0.", least=0)
    high_bit_depth: str = option(CLIP, "--high-bit-depth", DEPTH_HELP)

    def __post_init__(self) -> None:
        window_of(self.high_bit_depth)  # refuses what is neither a word nor a window


@dataclass(frozen=True)
class Outputs:
    """The files of a run, what stands in them, and whether a run that was cut off goes on."""

    out: Path = option(flag="--out", help="CSV file to write: ID,Caption.")
    n_best_out: Path | None = option(None, "--n-best-out", "JSON lines file for the alternatives.")
    timings_out: Path | None = option(None, "--timings-out", "CSV file for the latency of every image: ID,latency_s.")
    raw_text: bool = option(False, "--raw-text", "Write the text as Hugging Face decodes it, not detokenised.")
    allow_missing: bool = option(False, "--allow-missing", "Write an empty caption for images that cannot be read.")
    resume: bool = option(True, "--resume/--no-resume", "Go on where the same command was cut off; on by default.")
    update: bool = option(
        False,
        "--update",
        "Keep the captions beside --out: the same command captions only pictures that are new or changed.",
    )

    def files(self) -> dict[str, Path]:
        """Return the files that will be written, by their options."""
        paths = {flag: getattr(self, name) for name, flag in _FILES.items()}
        return {flag: path for flag, path in paths.items() if path is not None}

    def check(self, inputs: list[Path]) -> None:
        """Refuse outputs that cannot be written or would destroy an input, see check_outputs. Raises UsageError."""
        outputs = self.files()
        locks = {f"the lock of {flag}": lock_path(path) for flag, path in outputs.items()}
        journal = update_path(self.out) if self.update else journal_path(self.out)
        check_outputs(outputs | {"the journal of --out": journal} | locks, inputs)


_FILES = {name: declaration.flag for name, (declaration, kind) in declared(Outputs).items() if "Path" in kind}
