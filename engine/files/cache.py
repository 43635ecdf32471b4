"""What is kept between runs: a folder of this user's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import BackendError

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
