"""Create the thumbnails of a page in parallel threads, and reuse those that exist.

The name of a thumbnail is a hash of everything that decides how it looks. An existing name is therefore up to date, and
an earlier page keeps its thumbnails until the new page has replaced it.
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
"""Part of the name. Increase it when thumbnails are created in another way, so that old ones are not reused."""
NAME = re.compile(r"\.?[0-9a-f]{24}\.jpg(\.tmp)?")
"""Names of thumbnails and of their temporary files. Nothing else in the folder is ever removed."""


@dataclass(frozen=True)
class Thumbnails:
    """Names of N thumbnails (None if an image has none), {index: reason} of unreadable images, and how many are new."""

    names: list[str | None]
    unreadable: dict[int, str]
    made: int


def make_thumbnails(
    images: Sequence[ImageFile | None], folder: Path, *, size_px: int, advance: Callable[[], None]
) -> Thumbnails:
    """Write a JPEG of at most `size_px` by `size_px` pixels to `folder` for every image that has none yet.

    Images that cannot be read are listed in the result. Raises OutputError if a file cannot be written, and EngineError
    for other errors of the system.
    """
    unreadable: dict[int, str] = {}
    made = 0

    def make(index: int) -> tuple[str | None, bool]:
        image = images[index]
        if image is None:
            return None, False
        try:
            name = thumbnail_name(image, size_px)
            target = folder / name
            if target.exists() and target.stat().st_size:  # a power cut may leave an empty file
                return name, False
            _write(target, image, size_px)
        except ImageError as error:
            unreadable[index] = error.reason or str(error)
            return None, False
        return name, True

    names: list[str | None] = []
    with ThreadPoolExecutor(available_cores()) as threads:
        try:
            for name, is_new in threads.map(make, range(len(images))):
                names.append(name)
                made += is_new
                advance()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return Thumbnails(names, dict(sorted(unreadable.items())), made)


def thumbnail_name(image: ImageFile, size_px: int) -> str:
    """Return the file name of an image's thumbnail, a hash: image names are untrusted and do not appear in it.

    Raises ImageError if the image does not exist.
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
    """Remove all thumbnails of a folder except `kept`, and temporary files of interrupted runs."""
    for entry in os.listdir(folder):
        if entry not in kept and NAME.fullmatch(entry):
            (folder / entry).unlink(missing_ok=True)


def _write(target: Path, image: ImageFile, size_px: int) -> None:
    """Write one thumbnail atomically."""
    with image_errors(image.path):
        decoded = decode_image(image.path, frame=image.frame, depth=image.depth)
        decoded.thumbnail((size_px, size_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        decoded.save(temporary, "JPEG", quality=QUALITY)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{target} cannot be written: {error.strerror}: free space for --out or choose another folder"
        ) from error
