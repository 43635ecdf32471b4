"""Find images in a directory and read one into RGB bytes; knows nothing of models."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ImageError, UsageError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Decoders Pillow may use, whatever a file calls itself: a small surface for files from strangers."""

RESAMPLING = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}


@dataclass(frozen=True)
class ImageFile:
    """One input: its id (the file name without extension) and its path."""

    id: str
    path: Path


@dataclass(frozen=True)
class FoundImages:
    """The images of a directory in file name order, and the names of what was left aside."""

    images: list[ImageFile]
    ignored: list[str]


def find_images(directory: Path) -> FoundImages:
    """List the images directly inside `directory`, by extension, sorted by file name.

    Raises UsageError when there is no such directory, no image in it, or two images share an id.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: --input takes the folder that holds the images")
    names = sorted(os.listdir(directory))
    taken = [n for n in names if _is_candidate(directory / n)]
    images = [ImageFile(Path(n).stem, directory / n) for n in taken]
    if not images:
        raise UsageError(f"{directory} holds no images ({', '.join(sorted(EXTENSIONS))})")
    by_id: dict[str, str] = {}
    for image in images:
        if image.id in by_id:
            raise UsageError(
                f"{directory} holds two images with the id {image.id!r}: {by_id[image.id]} and {image.path.name}"
            )
        by_id[image.id] = image.path.name
    return FoundImages(images, sorted(set(names) - set(taken)))


def _is_candidate(path: Path) -> bool:
    """Return whether a directory entry is taken for an image: by extension, a file, and not hidden."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and (path.is_file() or path.is_symlink())


def order_by_manifest(images: Iterable[ImageFile], manifest: Path) -> list[ImageFile]:
    """Return the images named in a manifest, in its order; raise UsageError listing the ids without an image.

    A manifest is a text file with one id a line, or a table headed ID, ... and separated by commas, TABs or `|`.
    Ids are taken as they are.
    """
    try:
        text = manifest.read_bytes().decode("utf-8-sig")
        ids = _manifest_ids(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{manifest} cannot be read as a list of ids: {error}") from error
    if not ids:
        raise UsageError(f"{manifest} lists no ids")
    repeated = sorted(i for i, count in Counter(ids).items() if count > 1)
    if repeated:
        raise UsageError(f"{manifest} lists ids more than once: {_shorten(repeated)}")
    by_id = {image.id: image for image in images}
    missing = [i for i in ids if i not in by_id]
    if missing:
        raise UsageError(f"{manifest} lists {len(missing)} ids without an image: {_shorten(missing)}")
    return [by_id[i] for i in ids]


def _manifest_ids(text: str) -> list[str]:
    header = text.partition("\n")[0].rstrip("\r").lower()
    for delimiter in ",\t|":
        if header.startswith(("id" + delimiter, '"id"' + delimiter)):
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            return [row[0] for row in rows if row][1:]
    ids = [line.rstrip("\r") for line in text.split("\n")]
    return [i for i in ids[header == "id" :] if i]


def _shorten(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_image(
    source: Path | str | Image.Image | NDArray[np.uint8], height: int, width: int, resample: str
) -> NDArray[np.uint8]:
    """Return RGB bytes u8[height,width,3] of a file, a Pillow image or an array u8[h,w,3].

    The steps are those of Hugging Face's slow BlipImageProcessor (transformers 4.57): convert to RGB, then
    resize to exactly height x width px with Pillow's filter, ignoring the aspect ratio and EXIF rotation.
    Raises ImageError naming the file.
    """
    return np.asarray(decode_image(source).resize((width, height), RESAMPLING[resample]))


def decode_image(source: Path | str | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """Return a file, a Pillow image or an array u8[h,w,3] as an RGB picture; raise ImageError naming the file."""
    name = str(source) if isinstance(source, Path | str) else "image"
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        if isinstance(source, np.ndarray):
            return Image.fromarray(source).convert("RGB")
        with Path(source).open("rb") as stream:
            picture = Image.open(stream, formats=FORMATS)
            _refuse_bomb(picture)
            return picture.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(name, f"larger than {Image.MAX_IMAGE_PIXELS} pixels, refused: a decompression bomb?") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders meet hostile bytes in more ways than they document
        reason = "not an image, or damaged" if "cannot identify" in str(error) else str(error) or repr(error)
        raise ImageError(name, " ".join(reason.split())) from error


def _refuse_bomb(picture: Image.Image) -> None:
    """Pillow itself only warns of pictures up to twice its limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise Image.DecompressionBombError
