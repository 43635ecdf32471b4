"""Small pictures for the page, made once, in threads; knows nothing of captions.

A thumbnail is named by everything that decides how it looks, so a name that exists is fresh, and a page written earlier
keeps its own until the new page has replaced it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from engine.errors import ImageError, OutputError
from engine.host import available_cores
from engine.inputs.images import ImageFile
from engine.inputs.pixels import decode_image, image_errors

QUALITY = 82
THUMBNAIL_VERSION = 1
"""Raise it when thumbnails are made in another way, so that old ones are not taken for fresh."""
NAME = re.compile(r"\.?[0-9a-f]{24}\.jpg(\.tmp)?")
"""What a thumbnail, or one half written, may be called: nothing else in the folder is ever removed."""


@dataclass(frozen=True)
class Thumbnails:
    """Names of N thumbnails (None without one), why some images have none by place, and how many were made now."""

    names: list[str | None]
    unreadable: dict[int, str]
    made: int


def make_thumbnails(
    images: Sequence[ImageFile | None], folder: Path, *, size_px: int, advance: Callable[[], None]
) -> Thumbnails:
    """Write a JPEG at most `size_px` high and wide into `folder` for every image that has none there.

    Images that cannot be read are told in the result. Raises EngineError for the system's trouble, OutputError when a
    file cannot be written.
    """
    unreadable: dict[int, str] = {}
    made = 0

    def one(place: int) -> tuple[str | None, bool]:
        image = images[place]
        if image is None:
            return None, False
        try:
            name = thumbnail_name(image, size_px)
            target = folder / name
            if target.exists() and target.stat().st_size:  # an empty one is what a power cut may leave
                return name, False
            _write(target, image, size_px)
        except ImageError as error:
            unreadable[place] = error.reason or str(error)
            return None, False
        return name, True

    names: list[str | None] = []
    with ThreadPoolExecutor(available_cores()) as threads:
        try:
            for name, is_new in threads.map(one, range(len(images))):
                names.append(name)
                made += is_new
                advance()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return Thumbnails(names, dict(sorted(unreadable.items())), made)


def thumbnail_name(image: ImageFile, size_px: int) -> str:
    """Return the name of an image's thumbnail: a hash, since the names of images are strangers' words.

    Raises ImageError when there is no such file.
    """
    try:
        status = image.path.stat()
    except OSError as error:
        raise ImageError(str(image.path), error.strerror or str(error)) from error
    parts = (
        os.fsencode(os.path.abspath(image.path)),  # noqa: PTH100 (two folders may have equal names, sizes and times)
        image.frame,
        image.depth,
        size_px,
        status.st_size,
        status.st_mtime_ns,
        QUALITY,
        THUMBNAIL_VERSION,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24] + ".jpg"


def remove_stale(folder: Path, kept: Collection[str | None]) -> None:
    """Remove the thumbnails of a folder that no page shows any more, and those half written."""
    for entry in os.listdir(folder):
        if entry not in kept and NAME.fullmatch(entry):
            (folder / entry).unlink(missing_ok=True)


def _write(target: Path, image: ImageFile, size_px: int) -> None:
    """Write one thumbnail, not to be seen before it is whole."""
    with image_errors(image.path):
        picture = decode_image(image.path, frame=image.frame, depth=image.depth)
        picture.thumbnail((size_px, size_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        picture.save(temporary, "JPEG", quality=QUALITY)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{target} cannot be written: {error.strerror}: make room for --out") from error
