"""Read images as RGB bytes: files, Pillow images and arrays, of 8 bits or more per channel.

Limits protect against hostile files. Notes collect what reading dropped (transparency, further frames, values above
255) for the log of a run.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import io
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import EngineError, ImageError
from engine.inputs import dicom
from engine.inputs.ids import join_some
from engine.inputs.kinds import (
    DECODED,
    DICOM,
    HAS_HEIF,
    HEAD_BYTES,
    MAX_FILE_BYTES,
    kind_of,
    open_regular,
    wrong_content,
)
from engine.inputs.remote import RemoteFile
from engine.options import CLIP, window_of

CLIPPED, TRANSPARENT, FRAMES = "clipped", "transparent", "frames"
"""Kinds of notes: values above 255 became white, transparency was dropped, the file has further frames."""
NOTE_TEXTS = {
    CLIPPED: (
        "more than 8 bits per channel: values above 255 become white, as in Hugging Face's processor",
        "; --high-bit-depth scale keeps their range",
    ),
    TRANSPARENT: ("transparency, which is dropped, as in transformers 4.57", ""),
    FRAMES: ("more frames than the one that is used", "; for DICOM files --dicom-frame selects the frame"),
}
"""For each kind of note, what is dropped and how to avoid it."""


class ImageNote(NamedTuple):
    """Something that reading dropped: one of the kinds above, and the image's file or id."""

    kind: str
    name: str


def note_lines(notes: Iterable[ImageNote]) -> list[str]:
    """Return one line per kind of note, with the number of images, the first three names and the remedy."""
    names: dict[str, set[str]] = {}
    for kind, name in notes:
        names.setdefault(kind, set()).add(name)
    lines = []
    for kind, (what, remedy) in NOTE_TEXTS.items():
        if affected := sorted(names.get(kind, ())):
            images = "1 image has" if len(affected) == 1 else f"{len(affected)} images have"
            lines.append(f"{images} {what}: {join_some(affected, 3)}{remedy}")
    return lines


STRIP_PIXELS = 1 << 20
"""Number of pixels that are scaled at a time."""


def is_deep(image: Image.Image) -> bool:
    """Return whether an opened image has more than 8 bits per channel. Pillow reads 16-bit colour as 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def as_rgb(image: Image.Image, depth: str | None = CLIP) -> Image.Image:
    """Convert an image to RGB. `depth` applies to images with more than 8 bits per channel; None means CLIP."""
    if depth in (None, CLIP) or not is_deep(image):
        return image.convert("RGB")
    return Image.fromarray(to_bytes(image, depth)).convert("RGB")


def to_bytes(source: Image.Image | NDArray[Any], depth: str) -> NDArray[np.uint8]:
    """Convert a deep image, or an array [h,w] or [h,w,3] of real numbers, to u8 of the same shape.

    A window "LOW,HIGH" maps v to round(255 (v - LOW) / (HIGH - LOW)), clipped to 0 to 255. SCALE uses the image's
    smallest and largest value as the window; an image of a single value becomes black. CLIP clips v itself to 0 to 255
    and drops its fraction, as Pillow does. NaN and infinity become black.
    """
    window = (0.0, 255.0) if depth == CLIP else window_of(depth) or _range_of(source)
    low, high = window
    strips = []
    for strip in _strips(source):
        values = strip.astype(np.float64)
        values[~np.isfinite(values)] = low
        if depth != CLIP:
            values = (values - low) / ((high - low) or 1.0)
            values = np.clip(values, 0.0, 1.0) * 255 + 0.5
        strips.append(np.clip(values, 0.0, 255.0).astype(np.uint8))
    return np.concatenate(strips)


def _range_of(source: Image.Image | NDArray[Any]) -> tuple[float, float]:
    """Return the smallest and the largest finite value of an image, or (0, 1) if it has no finite value."""
    finite = (strip[np.isfinite(strip)] for strip in _strips(source))
    ends = [(float(values.min()), float(values.max())) for values in finite if values.size]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0.0, 1.0)


def _strips(source: Image.Image | NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield an image in strips of rows, because a float64 copy of 89 million pixels would take gigabytes."""
    width, height = source.shape[1::-1] if isinstance(source, np.ndarray) else source.size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        if isinstance(source, np.ndarray):
            yield source[top : top + rows]
        else:
            yield np.asarray(source.crop((0, top, width, min(top + rows, height))))


FORMATS = ("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "HEIF")
"""The only decoders that Pillow may use, whatever a file's name. This reduces the attack surface of hostile files."""

SYSTEM_TROUBLE = (
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
)
"""Errors of the system, not of an image. The run stops, instead of reporting every further image as unreadable."""
READ_AT_ONCE_BYTES = 1 << 26
"""Files up to this size are read into memory as a whole if their digest is needed."""
MAX_SIDE = 1_000_000
"""Limit of an image's width and height in pixels. Pillow's resize needs 32 bytes per pixel of the longer side, however
narrow the image is: 2 GB for 68,000,000 x 1 pixels, which fit in a PNG of 66 KB. The largest pathology slides have
sides of about 200,000 pixels."""
MAX_SCANS = 256
"""Limit of scans in a progressive JPEG. Programs write about 10; NVIDIA's nvImageCodec has the same limit."""
SCAN_BLOCK = 1 << 16
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""A marker in the data of a scan. ff 00 is an escaped data byte, and ff d0 to ff d7 are restart markers."""
TILE_WIDTH, TILE_LENGTH = 322, 323
"""Tags of TIFF 6.0, section 15."""
_ALONE = threading.Lock()
"""Held while an image is read again, alone, after the first attempt ran out of memory."""

ImageInput = Path | str | RemoteFile | Image.Image | NDArray[np.uint8]
"""A file, a Pillow image or an array u8[h,w,3]; see decode_image for other arrays."""
RESAMPLING = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}


def read_image(
    source: ImageInput,
    height: int,
    width: int,
    resample: str,
    *,
    resize: tuple[int, ...] = (),
    frame: int = 0,
    depth: str | None = None,
    notes: list[ImageNote] | None = None,
    sha256: list[str] | None = None,
) -> NDArray[np.uint8]:
    """Read a file, a Pillow image or an array and resize it. Returns RGB bytes u8[height,width,3].

    The steps are those of Hugging Face's slow image processors (transformers 4.57): convert to RGB, then resize with
    Pillow's filter `resample`, ignoring EXIF rotation. Without `resize`, images become height x width pixels, whatever
    their aspect ratio (BlipImageProcessor, ViTImageProcessor). With it, they become `resize` = (height, width) pixels
    (DeiTImageProcessor) or, keeping the aspect ratio, get a shortest edge of `resize` = (edge,) pixels
    (CLIPImageProcessor), and then the center of height x width pixels is cropped; a smaller image gets black borders.
    decode_image describes the sources, `frame`, `depth`, `notes` and the errors. The SHA-256 digest of a file's bytes,
    in hexadecimal, is appended to `sha256`.
    """
    if (
        isinstance(source, np.ndarray)
        and source.dtype == np.uint8
        and source.shape == (height, width, 3)
        and resized_size(width, height, height, width, resize) == (width, height)
    ):
        return source.copy()  # nothing to do, and Pillow would copy the array four times

    def read() -> NDArray[np.uint8]:
        image = _decode(source, frame, depth, notes, sha256)
        size = resized_size(*image.size, height, width, resize)
        check_resized(*size)
        image = image.resize(size, RESAMPLING[resample])
        left, top = ((full - kept) // 2 for full, kept in zip(size, (width, height), strict=True))
        if image.size != (width, height):
            image = image.crop((left, top, left + width, top + height))  # zeros where it exceeds the image
        return np.asarray(image)

    with image_errors(source):
        with suppress(MemoryError):
            return read()
        with _ALONE:  # memory may be short only because other threads are reading large images at the same time
            return read()


def resized_size(
    width: int, height: int, target_height: int, target_width: int, resize: tuple[int, ...]
) -> tuple[int, int]:
    """Return the width and height that an image of width x height pixels is resized to, see read_image.

    The longer edge is rounded as in transformers' get_resize_output_image_size.
    """
    if len(resize) == 1:
        (edge,) = resize
        longer = int(edge * max(width, height) / min(width, height))
        return (edge, longer) if width <= height else (longer, edge)
    target_height, target_width = resize or (target_height, target_width)
    return target_width, target_height


def check_resized(width: int, height: int) -> None:
    """Raise ValueError if an image is so long and narrow that it would take too much memory with its shortest edge
    enlarged.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"too long and narrow: resized to {width} x {height} pixels it would have more than {limit} pixels"
        )


def decode_image(
    source: ImageInput, *, frame: int = 0, depth: str | None = None, notes: list[ImageNote] | None = None
) -> Image.Image:
    """Decode a file, a Pillow image or an array to an RGB image.

    Arrays are u8 [h,w], [h,w,1], [h,w,3] or [h,w,4], or bool [h,w]. Of a file with several frames the first is read; of
    a DICOM file, frame number `frame`. Transparency is dropped.

    `depth` says how more than 8 bits per channel become 8 (see to_bytes). If it is None, files are read with CLIP,
    while deep Pillow images and arrays of other types than u8 are refused: their range is unknown, and values from 0 to
    1 would become black and 16-bit values white. What was dropped is appended to `notes`.

    Raises ImageError with the file's name and the reason, also if the image needs more memory than is free, and
    EngineError if the system has no more file handles or the disk fails.
    """
    with image_errors(source):
        return _decode(source, frame, depth, notes)


@contextmanager
def image_errors(source: object) -> Iterator[None]:
    """Convert any error of a decoder to ImageError, and errors in SYSTEM_TROUBLE to EngineError."""
    name = str(source) if isinstance(source, Path | str | RemoteFile) else "image"
    try:
        yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(name, f"larger than {Image.MAX_IMAGE_PIXELS} pixels, refused: a decompression bomb?") from None
    except EngineError:
        raise
    except Exception as error:  # for hostile bytes decoders raise more kinds of errors than they document
        if isinstance(error, OSError) and error.errno in SYSTEM_TROUBLE:
            hint = "raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else "check its disk"
            raise EngineError(f"{name} cannot be read: {error.strerror}: {hint}") from error
        is_short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if is_short or "out of memory" in str(error):
            raise ImageError(name, "reading it needs more memory than is free: make it smaller") from error
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        reason = "not an image, or damaged" if "cannot identify" in reason else reason
        raise ImageError(name, " ".join(reason.split())) from error


_GUARD = threading.Lock()
_LOADING: WeakValueDictionary[int, threading.Lock] = WeakValueDictionary()


def _load(image: Image.Image) -> None:
    """Decode an opened image. Several threads may have the same one, which Pillow does not allow to load at once."""
    with _GUARD:
        lock = _LOADING.get(id(image)) or threading.Lock()
        _LOADING[id(image)] = lock
    with lock:
        image.load()


def _decode(
    source: ImageInput,
    frame: int,
    depth: str | None,
    notes: list[ImageNote] | None,
    sha256: list[str] | None = None,
) -> Image.Image:
    """Decode like decode_image, but let the decoders' own errors pass."""
    if isinstance(source, Image.Image):
        check_size(*source.size)
        if depth is None and is_deep(source):
            raise ValueError(UNCLEAR_RANGE.format(what=f"a Pillow image of mode {source.mode}"))
        _load(source)
        return _converted(source, "image", depth, notes)
    if isinstance(source, np.ndarray):
        return _converted(_image_of_array(source, depth, notes), "image", depth, notes)
    if not isinstance(source, Path | str | RemoteFile):
        raise TypeError(f"expected a path, a Pillow image or a NumPy array, not {type(source).__name__}")
    file = Path(source) if isinstance(source, str) else source
    with open_file(file) as opened:
        stream = opened if sha256 is None else _hashed(opened, sha256)
        head = stream.read(HEAD_BYTES)
        stream.seek(0)
        kind = kind_of(head)
        if reason := wrong_content(head):
            raise ValueError(reason)
        if kind == "DICOM" or (kind is None and file.suffix.lower() in DICOM):
            image, frames = dicom.read_dicom(stream, frame)
            if notes is not None and frames > 1:
                notes.append(ImageNote(FRAMES, str(source)))
            return image
        if kind is not None and kind not in DECODED:
            raise ValueError(NOT_DECODED.format(kind=kind, remedy=REMEDIES.get(kind, "")))
        image = open_image(stream)
        rgb = _converted(image, str(source), depth, notes)
        if notes is not None and _has_more_frames(image):
            notes.append(ImageNote(FRAMES, str(source)))
        return rgb


def open_image(stream: IO[bytes]) -> Image.Image:
    """Open an image file with Pillow without decoding pixels. Raises ValueError if decoding would take too much."""
    image = Image.open(stream, formats=image_formats())
    check_size(*image.size)
    limit = Image.MAX_IMAGE_PIXELS
    tags = getattr(image, "tag_v2", {})  # TIFF: a small image may be stored in one huge tile
    largest = max(image.width * image.height, int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_LENGTH, 0)))
    if limit is not None and largest > limit:  # Pillow only warns up to twice its limit
        raise Image.DecompressionBombError
    if image.info.get("progressive") and has_too_many_scans(stream):
        raise ValueError(f"a progressive JPEG of more than {MAX_SCANS} scans, refused: it would take minutes to decode")
    return image


def check_size(width: int, height: int) -> None:
    """Raise ValueError if an image has no pixels or a side longer than MAX_SIDE."""
    if width == 0 or height == 0:
        raise ValueError(f"an empty image ({width} x {height} pixels)")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"refused: a side of {max(width, height)} pixels, the limit is {MAX_SIDE}")


def has_too_many_scans(stream: IO[bytes]) -> bool:
    """Return whether a JPEG has more than MAX_SCANS scans. The position in the stream does not change.

    Each scan of a progressive JPEG is a pass over all coefficients, but may take only a few hundred bytes of the file.
    """
    before, offset, scans = stream.tell(), 2, 0
    while scans <= MAX_SCANS:
        stream.seek(offset)
        block = stream.read(SCAN_BLOCK)
        marker = JPEG_MARKER.search(block)
        if marker is None or marker.end() > len(block) - 2:  # no marker in this block, or its length is cut off
            if len(block) < SCAN_BLOCK:
                break
            offset += len(block) - 1 if marker is None else marker.start()
            continue
        if marker[0] == b"\xff\xd9":  # end of image; previews, videos or further frames may follow
            break
        scans += marker[0] == b"\xff\xda"  # start of scan
        length = int.from_bytes(block[marker.end() : marker.end() + 2])
        offset += marker.end() + max(2, length)
    stream.seek(before)
    return scans > MAX_SCANS


def _converted(image: Image.Image, name: str, depth: str | None, notes: list[ImageNote] | None) -> Image.Image:
    """Convert an image to RGB and append what was dropped to `notes`."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # gives the same colours without a warning of Pillow's
    rgb = as_rgb(image, depth)
    if notes is not None:
        if depth in (None, CLIP) and is_deep(image):
            notes.append(ImageNote(CLIPPED, name))
        if _is_transparent(image):
            notes.append(ImageNote(TRANSPARENT, name))
    return rgb


def _is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel is not fully opaque. Many programs write an alpha channel that is opaque everywhere."""
    if not image.has_transparency_data:
        return False
    with suppress(ValueError):  # this mode cannot be converted to RGBA
        opaque = image if image.mode in ("RGBA", "LA", "PA") else image.convert("RGBA")
        least, _ = opaque.getchannel("A").getextrema()
        return bool(least < 255)  # type: ignore[operator]  # the extrema of a single channel are numbers
    return True


def _has_more_frames(image: Image.Image) -> bool:
    """Return whether a file holds more than one frame. The first must be decoded already, for GIF to look further.

    Always false for MPO, where phones store previews and gain maps as further frames.
    """
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # the second frame of a GIF may be damaged while the first is fine
        return False


def _image_of_array(array: NDArray[Any], depth: str | None, notes: list[ImageNote] | None) -> Image.Image:
    """Convert an array to a Pillow image with 8 bits per channel; see decode_image for the accepted arrays."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        shape = ", ".join(map(str, array.shape))
        raise ValueError(
            f"an array of shape [{shape}]: expected [height, width] or [height, width, 1, 3 or 4 channels]"
        )
    check_size(array.shape[1], array.shape[0])
    array = array[:, :, 0] if array.ndim == 3 and channels == 1 else array
    if array.dtype == np.uint8 or (array.dtype == np.bool_ and array.ndim == 2):
        return Image.fromarray(array)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"an array of {array.dtype}: convert it to uint8")
    if depth is None:
        raise ValueError(UNCLEAR_RANGE.format(what=f"an array of {array.dtype}"))
    if notes is not None and depth == CLIP:
        notes.append(ImageNote(CLIPPED, "image"))
    return Image.fromarray(to_bytes(array[:, :, :3] if channels == 4 else array, depth))


UNCLEAR_RANGE = (
    "{what} instead of uint8: give high_bit_depth='scale' (maps the image's range to 0 to 255) or 'LOW,HIGH' (maps "
    "that range), or convert it to uint8"
)
NOT_DECODED = "{kind}, which is not decoded: {remedy}convert it to JPEG or PNG"
REMEDIES = {"HEIC": "install the extra [heic], or "}


@functools.lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """Return the FORMATS that the installed Pillow supports."""
    Image.init()
    _silence_libtiff()
    if HAS_HEIF:
        import pi_heif

        pi_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _silence_libtiff() -> None:
    """Keep libtiff from printing warnings and errors to standard error. Pillow raises the errors that matter.

    This sets the handlers of the library itself, because redirecting file descriptor 2 would also redirect the output
    of other threads.
    """
    extension = find_spec("PIL._imaging")
    with suppress(OSError, AttributeError):  # a statically linked libtiff hides its functions and keeps printing
        library = ctypes.CDLL(extension.origin if extension else None)
        library.TIFFSetWarningHandler(None)
        library.TIFFSetErrorHandler(None)


def open_file(path: Path | RemoteFile) -> IO[bytes]:
    """Open an image file, local or at a URI. Refuses pipes and devices, also as targets of links; see open_regular."""
    if isinstance(path, RemoteFile):
        return path.open(most_bytes=MAX_FILE_BYTES)
    return open_regular(path, MAX_FILE_BYTES)


def _hashed(stream: IO[bytes], sha256: list[str]) -> IO[bytes]:
    """Append the SHA-256 digest of a stream to `sha256` and return a stream of the same bytes.

    A file of up to READ_AT_ONCE_BYTES is read once, so the hashed bytes are those that are decoded even if the file
    changes meanwhile. A larger file is hashed first and then read again. If it changes in between, the digest does not
    match the decoded bytes.
    """
    content = stream.read(READ_AT_ONCE_BYTES + 1)
    if len(content) <= READ_AT_ONCE_BYTES:
        sha256.append(hashlib.sha256(content).hexdigest())
        return io.BytesIO(content)
    stream.seek(0)
    sha256.append(hashlib.file_digest(stream, "sha256").hexdigest())  # type: ignore[arg-type]  # it has readinto
    stream.seek(0)
    return stream
