"""Checkpoints that are made into Hugging Face's layout once, and kept in the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from engine.errors import CheckpointError
from engine.files.cache import cache_root, draft_folder, require_private
from engine.files.lock import waiting_lock
from export.checkpoints.files import SAFE

REASON = "the weights kept there decide what is exported"


def kept_or_made(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`; where it is not there yet, `write` fills it.

    One process at a time makes it, the others wait. Neither a half-made folder is kept nor a finished one replaced.
    Raises BackendError where the cache is open to other users, CheckpointError where it cannot be written.
    """
    folder = cache_root() / "converted" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror or error}: set XDG_CACHE_HOME") from error
    _check_private(folder)
    if (folder / SAFE).is_file():  # before the lock, for which a read-only cache has no room
        return folder
    with waiting_lock(folder.with_name(f"{name}.lock")):
        if not (folder / SAFE).is_file():  # else the process that held the lock has made it
            with draft_folder(folder) as draft:
                write(draft)
                shutil.rmtree(folder, ignore_errors=True)  # without weights it is not finished
                draft.rename(folder)
    return folder


def _check_private(folder: Path) -> None:
    """Raise BackendError where another user could have put or changed what is in the cache's folder."""
    require_private(folder.parent, REASON)
    if folder.parent.stat().st_mode & 0o011 and folder.is_dir():  # others may enter it: look at each file, too
        for path in (folder, *folder.iterdir()):
            require_private(path, REASON)
