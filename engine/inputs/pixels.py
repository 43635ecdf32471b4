"""What reading dropped from images that can be read: collected for the run's log, a line for each kind."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import io
import math
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import EngineError, ImageError, UsageError
from engine.inputs import dicom
from engine.inputs.ids import join_some
from engine.inputs.kinds import DECODED, DICOM, HAS_HEIF, HEAD_BYTES, kind_of, open_regular, wrong_content
from engine.inputs.remote import RemoteFile

CLIPPED, TRANSPARENT, FRAMES = "clipped", "transparent", "frames"
"""More than 8 bits a channel, of which values above 255 became white; transparency; more frames than the one used."""
NOTE_TEXTS = {
    CLIPPED: (
        "more than 8 bits a channel: values above 255 become white, as in Hugging Face's processor",
        "; --high-bit-depth scale keeps their range",
    ),
    TRANSPARENT: ("transparency, which is dropped, as in transformers 4.57", ""),
    FRAMES: ("more frames than the one that is used", "; of DICOM files --dicom-frame chooses it"),
}
"""What the images of a kind have, and what to do about it."""


class ImageNote(NamedTuple):
    """An image that was read without something: one of the kinds above, and the image's file or id."""

    kind: str
    name: str


def note_lines(notes: Iterable[ImageNote]) -> list[str]:
    """Return one line for each kind of note: how many images, the first three names, the remedy."""
    names: dict[str, set[str]] = {}
    for kind, name in notes:
        names.setdefault(kind, set()).add(name)
    lines = []
    for kind, (what, remedy) in NOTE_TEXTS.items():
        if found := sorted(names.get(kind, ())):
            images = "1 image has" if len(found) == 1 else f"{len(found)} images have"
            lines.append(f"{images} {what}: {join_some(found, 3)}{remedy}")
    return lines


if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

CLIP, SCALE = "clip", "scale"
"""As Hugging Face's processor reads them, values above 255 white; or each picture's own range made 0 to 255."""
STRIP_PIXELS = 1 << 20
"""Pixels that are scaled at a time."""
HELP = "Pictures of more than 8 bits: `clip` (above 255 white, as Hugging Face), `scale` (own range), or LOW,HIGH."


def is_deep(picture: Image.Image) -> bool:
    """Return whether a picture has more than 8 bits a channel here. Pillow itself halves 16-bit colour to 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;")


def as_rgb(picture: Image.Image, depth: str | None = CLIP) -> Image.Image:
    """Return an image as RGB, one with more than 8 bits a channel read as `depth` says, see to_bytes (None is CLIP)."""
    from PIL import Image  # here, since the command line reads this file for its help

    if depth in (None, CLIP) or not is_deep(picture):
        return picture.convert("RGB")
    return Image.fromarray(to_bytes(picture, depth)).convert("RGB")


def to_bytes(source: Image.Image | NDArray[Any], depth: str) -> NDArray[np.uint8]:
    """Return a deep image, or an array [h,w] or [h,w,3] of real numbers, as u8 of the same shape.

    With a window of values LOW to HIGH, v becomes round(255 (v - LOW) / (HIGH - LOW)), held between 0 and 255; SCALE
    takes the image's least and greatest value, and makes an image of one value black. CLIP holds v itself between 0 and
    255 and cuts its fraction, as Pillow does. What is not a number is black.
    """
    import numpy as np

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
    """Return the least and the greatest number in an image; 0 and 1 where nothing in it is a number."""
    import numpy as np

    seen = (strip[np.isfinite(strip)] for strip in _strips(source))
    ends = [(float(numbers.min()), float(numbers.max())) for numbers in seen if numbers.size]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0.0, 1.0)


def _strips(source: Image.Image | NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield an image in strips of rows: float64 copies of 89 million pixels at once would take gigabytes."""
    import numpy as np

    width, height = source.shape[1::-1] if isinstance(source, np.ndarray) else source.size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        if isinstance(source, np.ndarray):
            yield source[top : top + rows]
        else:
            yield np.asarray(source.crop((0, top, width, min(top + rows, height))))


@functools.lru_cache(maxsize=16)
def window_of(depth: str) -> tuple[float, float] | None:
    """Return the window of values a text LOW,HIGH names, None for CLIP and SCALE. Raises UsageError for any other."""
    if depth in (CLIP, SCALE):
        return None
    try:
        low, high = (float(number) for number in depth.split(","))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"high bit depth {depth!r}: give {CLIP}, {SCALE}, or two numbers LOW,HIGH, the lower first")
    return low, high


FORMATS = ("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "HEIF")
"""Decoders Pillow may use, whatever a file calls itself: a small surface for files from strangers."""

SYSTEM_TROUBLE = (
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
)
"""The system's trouble, not the image's: the run stops instead of listing every image that follows as unreadable."""
MAX_FILE_BYTES = 1 << 30
"""A larger file is refused unread: some decoders read all of it before they look at the size of the picture."""
READ_AT_ONCE_BYTES = 1 << 26
"""A file up to this size is read into memory as a whole when its digest is wanted."""
MAX_SIDE = 1_000_000
"""Pixels of a side. Pillow's resize needs 32 bytes for each pixel of the longer side, however narrow the image is: 2 GB
for 68,000,000 x 1 pixels, which are a PNG of 66 KB. The largest slides of pathology have about 200,000."""
MAX_SCANS = 256
"""Scans of a progressive JPEG; programs write about 10. NVIDIA's nvImageCodec has the same limit."""
SCAN_BLOCK = 1 << 16
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""A marker in the data of a scan: what is followed by 0 is a byte of the data, d0 to d7 are restarts."""
TILE_WIDTH, TILE_LENGTH = 322, 323
"""TIFF 6.0, section 15."""
_ALONE = threading.Lock()
"""Held while an image is read for which memory did not suffice next to others."""

Picture = Path | str | RemoteFile | Image.Image | NDArray[np.uint8]
"""What can be read: a file, a Pillow image or an array u8[h,w,3]; see decode_image for other arrays."""
RESAMPLING = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}


def read_image(
    source: Picture,
    height: int,
    width: int,
    resample: str,
    *,
    frame: int = 0,
    depth: str | None = None,
    notes: list[ImageNote] | None = None,
    sha256: list[str] | None = None,
) -> NDArray[np.uint8]:
    """Return RGB bytes u8[height,width,3] of a file, a Pillow image or an array.

    The steps are those of Hugging Face's slow BlipImageProcessor (transformers 4.57): convert to RGB, then
    resize to exactly height x width px with Pillow's filter, ignoring the aspect ratio and EXIF rotation. See
    decode_image for what is read, for `frame`, `depth` and `notes`, and for the errors. `sha256` gets the digest of a
    file's bytes, in hexadecimal.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape == (height, width, 3):
        return source.copy()  # nothing to convert or to resize: Pillow would copy it four times

    def read() -> NDArray[np.uint8]:
        image = _decode(source, frame, depth, notes, sha256)
        return np.asarray(image.resize((width, height), RESAMPLING[resample]))

    with image_errors(source):
        with suppress(MemoryError):
            return read()
        with _ALONE:  # memory was short, perhaps only because other threads read large images at that moment
            return read()


def decode_image(
    source: Picture, *, frame: int = 0, depth: str | None = None, notes: list[ImageNote] | None = None
) -> Image.Image:
    """Return a file, a Pillow image or an array as an RGB image.

    An array is u8 [h,w], [h,w,1], [h,w,3] or [h,w,4], or bool [h,w]. Of a file with several frames the first is read,
    of a DICOM file number `frame`. Transparency is dropped. More than 8 bits a channel are read as `depth` says
    (depth.py), without it as CLIP from a file; Pillow images and arrays of other numbers than u8 are refused then,
    since values from 0 to 1 would become black and 16 bits white. `notes` gets what was dropped.

    Raises ImageError with the file's name and the reason, also when the image needs more memory than there is, and
    EngineError when the system has no more file handles or the disk fails.
    """
    with image_errors(source):
        return _decode(source, frame, depth, notes)


@contextmanager
def image_errors(source: object) -> Iterator[None]:
    """Turn whatever a decoder raises into ImageError, and the system's trouble into EngineError."""
    name = str(source) if isinstance(source, Path | str | RemoteFile) else "image"
    try:
        yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(name, f"larger than {Image.MAX_IMAGE_PIXELS} pixels, refused: a decompression bomb?") from None
    except EngineError:
        raise
    except Exception as error:  # decoders meet hostile bytes in more ways than they document
        if isinstance(error, OSError) and error.errno in SYSTEM_TROUBLE:
            hint = (
                "raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else "is its disk there?"
            )
            raise EngineError(f"{name} cannot be read: {error.strerror}: {hint}") from error
        is_short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if is_short or "out of memory" in str(error):
            raise ImageError(name, "reading it needs more memory than is free: make it smaller") from error
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        reason = "not an image, or damaged" if "cannot identify" in reason else reason
        raise ImageError(name, " ".join(reason.split())) from error


def _decode(
    source: Picture,
    frame: int,
    depth: str | None,
    notes: list[ImageNote] | None,
    sha256: list[str] | None = None,
) -> Image.Image:
    """See decode_image; raises whatever the decoders raise."""
    if isinstance(source, Image.Image):
        check_size(*source.size)
        if depth is None and is_deep(source):
            raise ValueError(UNCLEAR_RANGE.format(what=f"a Pillow image of mode {source.mode}"))
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
    """Open an image file of Pillow's, decoding no pixel yet; raise ValueError for one that would take too much."""
    image = Image.open(stream, formats=picture_formats())
    check_size(*image.size)
    limit = Image.MAX_IMAGE_PIXELS
    tags = getattr(image, "tag_v2", {})  # TIFF: a small image may lie in one huge tile
    largest = max(image.width * image.height, int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_LENGTH, 0)))
    if limit is not None and largest > limit:  # Pillow itself only warns of images up to twice its limit
        raise Image.DecompressionBombError
    if image.info.get("progressive") and has_too_many_scans(stream):
        raise ValueError(f"a progressive JPEG of more than {MAX_SCANS} scans, refused: it would take minutes to decode")
    return image


def check_size(width: int, height: int) -> None:
    """Raise ValueError for an image without a pixel, and for one with a side that no camera or scanner makes."""
    if width == 0 or height == 0:
        raise ValueError(f"an empty image ({width} x {height} pixels)")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"a side of {max(width, height)} pixels, refused: at most {MAX_SIDE} are read")


def has_too_many_scans(stream: IO[bytes]) -> bool:
    """Return whether a JPEG has more than MAX_SCANS scans; the position in the stream stays.

    Each scan of a progressive JPEG is a pass over all coefficients, and may take only a few hundred bytes of the file.
    """
    before, at, scans = stream.tell(), 2, 0
    while scans <= MAX_SCANS:
        stream.seek(at)
        block = stream.read(SCAN_BLOCK)
        marker = JPEG_MARKER.search(block)
        if marker is None or marker.end() > len(block) - 2:  # none here, or without the length that follows it
            if len(block) < SCAN_BLOCK:
                break
            at += len(block) - 1 if marker is None else marker.start()
            continue
        if marker[0] == b"\xff\xd9":  # the end of the image; what follows are previews, videos, further frames
            break
        scans += marker[0] == b"\xff\xda"
        length = int.from_bytes(block[marker.end() : marker.end() + 2])
        at += marker.end() + max(2, length)
    stream.seek(before)
    return scans > MAX_SCANS


def _converted(image: Image.Image, name: str, depth: str | None, notes: list[ImageNote] | None) -> Image.Image:
    """Return an image as RGB; `notes` gets what was dropped."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours in the end, without Pillow's warning
    rgb = as_rgb(image, depth)
    if notes is not None:
        if depth in (None, CLIP) and is_deep(image):
            notes.append(ImageNote(CLIPPED, name))
        if _is_transparent(image):
            notes.append(ImageNote(TRANSPARENT, name))
    return rgb


def _is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel lets a background through: many programs write an alpha channel that is opaque."""
    if not image.has_transparency_data:
        return False
    with suppress(ValueError):  # no way from this mode to RGBA
        opaque = image if image.mode in ("RGBA", "LA", "PA") else image.convert("RGBA")
        least, _ = opaque.getchannel("A").getextrema()
        return bool(least < 255)  # type: ignore[operator]  # of one channel it is a number
    return True


def _has_more_frames(image: Image.Image) -> bool:
    """Return whether a file holds more frames than the first, which must have been decoded: GIF has to look for more.

    Not of MPO: telephones add previews and gain maps to photographs.
    """
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # the second frame of a GIF is damaged: the first is fine
        return False


def _image_of_array(array: NDArray[Any], depth: str | None, notes: list[ImageNote] | None) -> Image.Image:
    """Return an array as a Pillow image of 8 bits a channel; see decode_image for the arrays that are taken."""
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
    "{what} instead of uint8: give high_bit_depth='scale' (its own range becomes 0 to 255) or 'LOW,HIGH' (that range), "
    "or convert it to uint8"
)
NOT_DECODED = "{kind}, which is not decoded: {remedy}convert it to JPEG or PNG"
REMEDIES = {"HEIC": "install the extra [heic], or "}


@functools.lru_cache(maxsize=1)
def picture_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow has."""
    Image.init()
    _silence_libtiff()
    if HAS_HEIF:
        import pi_heif

        pi_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _silence_libtiff() -> None:
    """Keep libtiff from printing warnings and errors to standard error; Pillow raises what matters.

    Done in the library itself, since redirecting file descriptor 2 would take the lines of other threads along.
    """
    extension = find_spec("PIL._imaging")
    with suppress(OSError, AttributeError):  # linked statically, its functions cannot be found: it stays loud
        library = ctypes.CDLL(extension.origin if extension else None)
        library.TIFFSetWarningHandler(None)
        library.TIFFSetErrorHandler(None)


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
