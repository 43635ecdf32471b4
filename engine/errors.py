"""Every error raised on purpose, here and in export and train: what, which file and what to do, in one line."""

from __future__ import annotations


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
