"""What is kept between runs: a folder of this user's own."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import BackendError


def cache_root() -> Path:
    """Return this project's folder by the rules of the XDG base directories; nobody has made it yet, perhaps."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip-caption-engine"


def cache_folder(digest: str, name: str) -> Path:
    """Return the folder `name` for what is built from the bundle with this digest, made for this user alone.

    Plans are executable code. Raises BackendError when the folder is another user's or others may write into it.
    """
    folder = cache_root() / digest[:16] / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(folder)
    return folder


def require_private(path: Path) -> None:
    """Raise BackendError unless a folder or file belongs to this user and nobody else may write into it."""
    status = path.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise BackendError(
            f"{path} belongs to another user or others may write into it, and plans are executable code: "
            f"chmod go-w {path}, or choose another folder"
        )
