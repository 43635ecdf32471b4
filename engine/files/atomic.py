"""Files that appear whole or not at all, and whether an output may be written where it is wanted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.errors import BackendError, OutputError, UsageError

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


NAME = "blip-caption-engine"
UNFINISHED = ".unfinished"
"""Begins the names of folders that are being filled; what a killed process left is deleted later."""


def cache_root() -> Path:
    """Return this project's cache folder by the rules of the XDG base directories; it may not exist yet.

    Without a home, as in containers with a user id of their own, it is below the temporary directory and is made at
    once, for this user alone. Raises BackendError where that cannot be.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / NAME
    try:
        home = Path.home() if os.environ.get("HOME") != "" else None
    except RuntimeError:  # no HOME, and the user id has no entry among the accounts
        home = None
    return _temporary_root() if home is None else home / ".cache" / NAME


def _temporary_root() -> Path:
    """Return the cache folder of a user without a home. Its name is known to all, so its owner is checked."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    root = Path(tempfile.gettempdir()) / f"{NAME}-{user}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        if root.is_symlink():
            raise BackendError(f"{root} is a link: set HOME or XDG_CACHE_HOME to a folder of your own")
        require_private(root, "what is kept there decides captions")
    except OSError as error:
        raise BackendError(
            f"there is no home directory, and {root} cannot be used ({error.strerror}): set HOME or XDG_CACHE_HOME"
        ) from error
    return root


def cache_folder(digest: str, name: str, reason: str) -> Path:
    """Return the folder `name` for what is built from the bundle with this digest, made for this user alone.

    `reason` completes the error, see require_private. Raises BackendError when the folder is another user's or others
    may write into it.
    """
    folder = cache_root() / digest[:16] / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(folder, reason)
    return folder


def require_private(path: Path, reason: str) -> None:
    """Raise BackendError unless a folder or file belongs to this user and no one else may write into it.

    `reason` says why that matters, such as `plans are executable code`.
    """
    status = path.stat()
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        raise BackendError(
            f"{path} belongs to another user, and {reason}: choose another folder (the cache is below XDG_CACHE_HOME)"
        )
    if status.st_mode & 0o022:
        raise BackendError(f"others may write into {path}, and {reason}: chmod go-w {path}, or choose another folder")


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Make an empty folder next to `target`, to be filled and renamed to it; afterwards nothing else is left.

    Hold a lock on `target`: what killed processes left unfinished for the same target is deleted.
    """
    prefix = f"{UNFINISHED}-{target.name}-"
    for entry in target.parent.iterdir():
        if entry.name.startswith(prefix):
            shutil.rmtree(entry, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as temporary:
        draft = Path(temporary) / "draft"
        draft.mkdir(mode=0o700)
        yield draft
