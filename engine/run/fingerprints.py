"""Is this still the same image, and the same run?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.inputs.depth import CLIP
from engine.inputs.images import ImageFile


def run_key(images: Sequence[ImageFile], made_with: str, prompts: Mapping[str, str] | None = None) -> str:
    """Return the sha256 of what captions are made with, and of the images in their order, with their prompts by id.

    Journals of earlier versions have it as their key.
    """
    digest = hashlib.sha256(made_with.encode("utf-8", "surrogateescape"))
    for image in images:
        place = str(image.path.absolute() if image.folder is None else image.source)
        depth = [] if image.depth == CLIP else [image.depth]  # journals of earlier versions know none, nor prompts
        prompt = [] if prompts is None else [{"prompt": prompts[image.id]}]
        digest.update(json.dumps([image.id, place, image.frame, *depth, *prompt]).encode("ascii"))
    return digest.hexdigest()


def settings_key(images: Sequence[ImageFile], made_with: str) -> str:
    """Return the sha256 of what captions are made with and how the images are read, whatever images these are."""
    how = sorted({(image.frame, image.depth) for image in images})
    return hashlib.sha256(f"{made_with}|{json.dumps(how)}".encode("utf-8", "surrogateescape")).hexdigest()


def fingerprints(images: Sequence[ImageFile]) -> dict[str, list[int] | None]:
    """Return the fingerprint of every image by its id; those at a URI are listed, for size and time of change alone."""
    folders = {image.folder for image in images if image.folder is not None}
    listed = {folder: folder.list(recursive=any(len(i.path.parts) > 1 for i in images)) for folder in folders}
    found: dict[str, list[int] | None] = {}
    for image in images:
        if image.folder is None:
            found[image.id] = fingerprint(image.path)
        else:
            stamp = listed[image.folder].get(image.path.as_posix())
            found[image.id] = list(stamp) if stamp else None
    return found


def fingerprint(path: Path) -> list[int] | None:
    """Return size in bytes, time of the last change of content and of status in ns, and number; None without a file.

    Any of them may change when a file is replaced. The last two may also change without that, see recall.py.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
