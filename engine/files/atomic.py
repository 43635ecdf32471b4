"""Files that appear whole or not at all, and whether an output may be written where it is wanted."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from engine.errors import OutputError, UsageError

LONGEST_NAME = 255
"""Bytes of a file name, on every usual file system."""


def check_outputs(outputs: Mapping[str, Path], kept: Iterable[Path]) -> None:
    """Refuse, before any work is spent, output files {option: path} that cannot be written or would destroy something.

    That is a directory, a device or a pipe, a missing or read-only folder, one of the `kept` files, or a file named
    twice. Raises UsageError naming the option.
    """
    taken = {os.path.realpath(path): f"the input {path}" for path in kept}
    for option, path in outputs.items():
        target = os.path.realpath(path)  # unlike Path.resolve, it takes a loop of links for a name like any other
        parent = Path(target).parent
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path} is a directory, a device or a pipe: name a file")
        if not parent.is_dir():
            raise UsageError(f"{option} {path}: {parent} does not exist, create it first")
        if not os.access(parent, os.W_OK):
            raise UsageError(f"{option} {path}: {parent} is not writable")
        if target in taken:
            raise UsageError(f"{option} {path} would overwrite {taken[target]}")
        taken[target] = option


def write_atomically(path: Path, text: str) -> None:
    """Write text as UTF-8 with replace_file; file names that are not UTF-8 keep their bytes."""
    replace_file(path, text.encode("utf-8", "surrogateescape"))


def replace_file(path: Path, content: bytes, *, mode: int | None = None, follow: bool = True) -> None:
    """Write under a temporary name, then replace `path` (a link's target, keeping its permissions unless `mode` is
    given). Without `follow` a link is replaced itself.

    Raises OutputError and leaves nothing behind.
    """
    target = Path(os.path.realpath(path)) if follow else path
    temporary = _temporary(target)
    try:
        temporary.unlink(missing_ok=True)  # a killed run's, or a link that somebody put there: it is never followed
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if mode is not None or (target.exists() and not target.is_symlink()):
            temporary.chmod(target.stat().st_mode & 0o777 if mode is None else mode)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}: make room, or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    """Return a name beside a file, the same at every call; that of a long name is shorter, or it would be too long."""
    name = os.fsencode(target.name)
    whole = len(name) <= LONGEST_NAME - len("..tmp") or len(name) > LONGEST_NAME
    return target.with_name(f".{target.name if whole else hashlib.sha256(name).hexdigest()[:32]}.tmp")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as lower-case hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
