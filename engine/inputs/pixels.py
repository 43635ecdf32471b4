"""Read one picture into RGB bytes, whatever its kind; knows nothing of directories and models."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import EngineError, ImageError
from engine.inputs import dicom
from engine.inputs.depth import CLIP, as_rgb, is_deep
from engine.inputs.kinds import DECODED, DICOM, HAS_HEIF, HEAD_BYTES, kind_of, open_regular
from engine.inputs.remote import RemoteFile

FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "HEIF")
"""Decoders Pillow may use, whatever a file calls itself: a small surface for files from strangers."""

SYSTEM_TROUBLE = (
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
)
"""The system's trouble, not the image's: the run stops instead of listing every image that follows as unreadable."""
MAX_FILE_BYTES = 1 << 30
"""A larger file is refused unread: some decoders read all of it before they look at the size of the picture."""
READ_AT_ONCE_BYTES = 1 << 26
"""A file up to this size is read into memory as a whole when its digest is wanted."""

Picture = Path | str | RemoteFile | Image.Image | NDArray[np.uint8]
"""What can be read: a file, a Pillow image or an array u8[h,w,3]."""
RESAMPLING = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}


def read_image(
    source: Picture,
    height: int,
    width: int,
    resample: str,
    *,
    frame: int = 0,
    depth: str = CLIP,
    clipped: list[str] | None = None,
    sha256: list[str] | None = None,
) -> NDArray[np.uint8]:
    """Return RGB bytes u8[height,width,3] of a file, a Pillow image or an array u8[h,w,3].

    The steps are those of Hugging Face's slow BlipImageProcessor (transformers 4.57): convert to RGB, then
    resize to exactly height x width px with Pillow's filter, ignoring the aspect ratio and EXIF rotation. Of an
    animation the first frame counts, of a DICOM file frame number `frame`. More than 8 bits a channel are read as
    `depth` says (depth.py); where that is CLIP, values beyond 0 to 255 are lost and the name is added to `clipped`.
    The sha256 of a file's bytes, in hexadecimal, is added to `sha256`. Raises ImageError naming the file, EngineError
    when the system has no more file handles.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape == (height, width, 3):
        return source.copy()  # nothing to convert or to resize: Pillow would copy it four times
    picture = decode_image(source, frame=frame, depth=depth, clipped=clipped, sha256=sha256)
    return np.asarray(picture.resize((width, height), RESAMPLING[resample]))


def decode_image(
    source: Picture,
    *,
    frame: int = 0,
    depth: str = CLIP,
    clipped: list[str] | None = None,
    sha256: list[str] | None = None,
) -> Image.Image:
    """Return a file, a Pillow image or an array u8[h,w,3] as an RGB picture; see read_image for the rest."""
    name = str(source) if isinstance(source, Path | str | RemoteFile) else "image"
    try:
        if isinstance(source, Image.Image):
            return as_rgb(source, depth)
        if isinstance(source, np.ndarray):
            return Image.fromarray(source).convert("RGB")
        file = Path(source) if isinstance(source, str) else source
        with open_file(file) as opened:
            stream = opened if sha256 is None else _hashed(opened, sha256)
            kind = kind_of(stream.read(HEAD_BYTES))
            stream.seek(0)
            if kind == "DICOM" or (kind is None and file.suffix.lower() in DICOM):
                return dicom.read_dicom(stream, frame)
            if kind is not None and kind not in DECODED:
                raise ImageError(name, NOT_DECODED.format(kind=kind, remedy=REMEDIES.get(kind, "")))
            picture = Image.open(stream, formats=picture_formats())
            _refuse_bomb(picture)
            if clipped is not None and depth == CLIP and is_deep(picture):
                clipped.append(name)
            return as_rgb(picture, depth)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(name, f"larger than {Image.MAX_IMAGE_PIXELS} pixels, refused: a decompression bomb?") from None
    except EngineError:
        raise
    except MemoryError as error:
        raise MemoryError(f"reading {name}") from error
    except Exception as error:  # decoders meet hostile bytes in more ways than they document
        if isinstance(error, OSError) and error.errno in SYSTEM_TROUBLE:
            hint = (
                "raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else "is its disk there?"
            )
            raise EngineError(f"{name} cannot be read: {error.strerror}: {hint}") from error
        if getattr(error, "errno", None) == errno.ENOMEM or "out of memory" in str(error):
            raise MemoryError(f"reading {name}") from error
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        reason = "not an image, or damaged" if "cannot identify" in reason else reason
        raise ImageError(name, " ".join(reason.split())) from error


NOT_DECODED = "{kind}, which is not decoded: {remedy}convert it to JPEG or PNG"
REMEDIES = {"HEIC": "install the extra [heic], or "}


@functools.lru_cache(maxsize=1)
def picture_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow has."""
    Image.init()
    if HAS_HEIF:
        import pi_heif

        pi_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_file(path: Path | RemoteFile) -> IO[bytes]:
    """Open a regular file; a link may lead to a pipe, which would keep its reader waiting, or to a device."""
    if isinstance(path, RemoteFile):
        return path.open(most_bytes=MAX_FILE_BYTES)
    return open_regular(path, MAX_FILE_BYTES)


def _hashed(stream: IO[bytes], sha256: list[str]) -> IO[bytes]:
    """Return a stream of the same bytes, whose digest is added to `sha256`.

    The bytes that are hashed are those that are decoded, even if the file changes meanwhile. A large file is hashed
    before it is decoded and not kept in memory: a change in between leads to a digest that the file does not have.
    """
    content = stream.read(READ_AT_ONCE_BYTES + 1)
    if len(content) <= READ_AT_ONCE_BYTES:
        sha256.append(hashlib.sha256(content).hexdigest())
        return io.BytesIO(content)
    stream.seek(0)
    sha256.append(hashlib.file_digest(stream, "sha256").hexdigest())  # type: ignore[arg-type]  # it has readinto
    stream.seek(0)
    return stream


def _refuse_bomb(picture: Image.Image) -> None:
    """Pillow itself only warns of pictures up to twice its limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise Image.DecompressionBombError
