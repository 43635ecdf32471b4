"""Checkpoints that are made into Hugging Face's layout once, and kept in the cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.files.cache import cache_root
from export.checkpoints.files import SAFE


def kept_or_made(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`; where it is not there yet, `write` fills it. Never half of one is left."""
    folder = cache_root() / "converted" / name
    if (folder / SAFE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished") as temporary:
        draft = Path(temporary) / "checkpoint"
        draft.mkdir()
        write(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    return folder
