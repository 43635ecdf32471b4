"""Read one frame of a DICOM file as an RGB image. Needs the extra `dicom` (pydicom).

Only the tags listed in TAGS are read. The header's names, dates and private tags are never read as values, so they
cannot appear in messages or output files.
"""

from __future__ import annotations

import re
import warnings
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import EngineError, install_command
from engine.inputs.kinds import HEAD_BYTES, kind_of

MAX_PIXELS = 40_000_000
"""Pixel limit of one frame. A mammogram has 20 million."""
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
"""Photometric interpretations that pydicom converts to RGB, in addition to palettes."""

TAGS = [
    *("BitsAllocated", "BitsStored", "Columns", "HighBit", "NumberOfFrames", "PhotometricInterpretation"),
    *("PixelRepresentation", "PlanarConfiguration", "Rows", "SamplesPerPixel"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("ModalityLUTSequence", "RescaleIntercept", "RescaleSlope"),
    *("VOILUTFunction", "VOILUTSequence", "WindowCenter", "WindowWidth", "PresentationLUTShape"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


TRANSFER_SYNTAX = 0x0002_0010
SOP_CLASS = re.compile(rb"\x02\x00\x02\x00UI..([0-9.]+)", re.DOTALL)
"""The element (0002,0002) of the file meta information, which is always in explicit little endian (PS3.10, 7.1)."""
CLASS_BYTES = 512
"""Number of bytes at the start of a file that contain its SOP class."""


def require_pydicom() -> Any:
    """Import pydicom. Raises EngineError naming the extra to install if it is missing."""
    try:
        import pydicom.pixels
    except ImportError as error:
        raise EngineError(f"DICOM files need pydicom ({error}): {install_command('dicom')}") from error
    # pydicom's warnings quote values of tags, which may identify a patient. Damaged files are reported by this module.
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    return pydicom


class _RefusedError(ValueError):
    """A reason for refusing a file. Its message quotes nothing of the file."""


class Frame(NamedTuple):
    """One frame as RGB with 8 bits per channel, and the number of frames in the file."""

    image: Image.Image
    frames: int


def holds_image(stream: IO[bytes]) -> bool:
    """Return whether a DICOM file holds an image. Directories, reports and presentation states have no Rows.

    If the SOP class is one of images, pydicom need not read the tags. A damaged or deflated file counts as an image, so
    that reading it later reports the reason.
    """
    pydicom = require_pydicom()
    head = stream.read(CLASS_BYTES)
    stream.seek(0)
    sop_class = SOP_CLASS.search(head)
    if sop_class and "Image Storage" in pydicom.uid.UID(sop_class[1].decode("ascii")).name:
        return True
    try:
        if _is_deflated(pydicom, stream):
            return True
        is_bare = head[128:132] != b"DICM"
        return "Rows" in pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=["Rows"], force=is_bare)
    except Exception:  # read_dicom fails in the same way and reports the reason
        return True


def read_dicom(stream: IO[bytes], frame: int = 0) -> Frame:
    """Return frame number `frame`, counted from 0.

    Stored values go through the modality transform, then through the window or VOI table of the tags. If the tags have
    several, the first is used; without any, the frame's whole range of values. MONOCHROME1 is inverted (DICOM PS3.3,
    C.7.6.3.1.2, C.11.1, C.11.2). Raises ValueError with a reason that quotes no tag of the file, and OSError if the
    disk fails.
    """
    pydicom = require_pydicom()
    try:
        return _read(pydicom, stream, frame)
    except pydicom.errors.InvalidDicomError:
        raise ValueError("not a DICOM file, or damaged") from None
    except (MemoryError, OSError, _RefusedError):
        raise
    except Exception as error:  # damaged tags raise many kinds of errors, and their messages quote the tags
        raise ValueError(f"damaged, or not valid DICOM ({type(error).__name__})") from None


def _is_deflated(pydicom: Any, stream: IO[bytes]) -> bool:
    """Return whether the whole data set is deflated; the position in the stream is 0 afterwards.

    Only the file meta information is read: pydicom's dcmread would inflate the rest at once, perhaps a thousandfold.
    """
    head = stream.read(HEAD_BYTES)
    start = 132 if head[128:132] == b"DICM" else 0
    stream.seek(start)
    syntax = None
    if head[start : start + 2] == b"\x02\x00":
        meta = pydicom.filereader.read_dataset(
            stream,
            is_implicit_VR=False,
            is_little_endian=True,
            stop_when=lambda tag, *_: tag.group != 2,
            specific_tags=[TRANSFER_SYNTAX],
        )
        syntax = meta.get("TransferSyntaxUID")
    stream.seek(0)
    return bool(syntax == pydicom.uid.DeflatedExplicitVRLittleEndian)


def _read(pydicom: Any, stream: IO[bytes], frame: int) -> Frame:
    if _is_deflated(pydicom, stream):
        raise _RefusedError("deflated as a whole, which may hide a decompression bomb: save it in another encoding")
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    is_bare = head[128:132] != b"DICM" and kind_of(head) == "DICOM"  # without preamble, as old programs write
    header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=TAGS, force=is_bare)
    frames = int(header.get("NumberOfFrames") or 1)
    if "Rows" not in header or "Columns" not in header:
        raise _RefusedError("a DICOM file without an image (a directory, a report or a presentation state?)")
    if not frame < frames:
        raise _RefusedError(f"frame {frame} does not exist: the file has {frames}, counted from 0")
    if int(header.Rows) * int(header.Columns) > MAX_PIXELS:
        raise _RefusedError(f"a frame of more than {MAX_PIXELS} pixels, refused")
    if int(header.HighBit) != int(header.BitsStored) - 1:
        raise _RefusedError("unsupported: its values do not begin at the lowest bit (HighBit is not BitsStored - 1)")
    stored = _stored_values(pydicom, header, stream, frame)
    interpretation = str(header.PhotometricInterpretation)
    if interpretation == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(stored, header)
        if colours.dtype.itemsize == 2 and not header.original_encoding[1]:
            colours = colours.byteswap()  # pydicom 3.0 reads big-endian tables in the machine's own order
        brightness = colours / np.float32(_ones(_palette_bits(header)))
    elif stored.ndim == 3:
        if interpretation not in COLOURS:
            raise _RefusedError("unsupported colours (expected RGB, YBR or a palette)")
        brightness = stored / np.float32(_ones(int(header.BitsStored)))
    else:
        brightness = _grey(header, stored, frame)
    pixels = (np.clip(brightness, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return Frame(Image.fromarray(pixels).convert("RGB"), frames)


def _stored_values(pydicom: Any, header: Any, stream: IO[bytes], frame: int) -> NDArray[Any]:
    """Return the stored values of a frame: [rows,columns], or [rows,columns,3] for colours, YBR converted to RGB."""
    stream.seek(0)
    syntax, pixels = header.file_meta.get("TransferSyntaxUID"), stream
    if syntax is None:  # without the header of PS3.10 pixels are uncompressed, in the encoding of the tags
        pixels = pydicom.dcmread(stream, specific_tags=[*TAGS, "PixelData"], force=True)
        is_implicit, is_little = pixels.original_encoding
        uids = pydicom.uid
        plain = uids.ImplicitVRLittleEndian if is_implicit else uids.ExplicitVRLittleEndian
        syntax = plain if is_little else uids.ExplicitVRBigEndian
        pixels.file_meta.TransferSyntaxUID = syntax
    name = syntax.name if not syntax.is_private else "an unnamed encoding"
    try:
        try:
            stored: NDArray[Any] = pydicom.pixels.pixel_array(pixels, index=frame)  # the other frames are not read
        except ValueError:
            if pixels is not stream:
                raise
            # The tags have a different encoding than the header names. Only dcmread detects that and finds the pixels.
            stream.seek(0)
            pixels = pydicom.dcmread(stream, specific_tags=[*TAGS, "PixelData"])
            stored = pydicom.pixels.pixel_array(pixels, index=frame)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # each decoder raises different errors for damaged data
        if "missing dependencies" in str(error):
            raise _RefusedError(f"no decoder for {name} is installed (see pydicom's list of plugins)") from None
        raise _RefusedError(f"its pixels ({name}) cannot be decoded ({type(error).__name__})") from None
    return stored


def _grey(header: Any, stored: NDArray[Any], frame: int) -> NDArray[np.float32]:
    """Convert stored grey values [rows,columns] to brightness: 0 is black, 1 is white, and values may lie outside."""
    transform = _group(header, "PixelValueTransformationSequence", frame)
    values = _modality_values(transform if _has(transform, "RescaleSlope") else header, stored)
    view = _group(header, "FrameVOILUTSequence", frame)
    view = view if _has(view, "WindowWidth") or _has(view, "VOILUTSequence") else header
    if _has(view, "VOILUTSequence"):
        brightness = _looked_up(values, view.VOILUTSequence[0])
    elif _has(view, "WindowCenter") and _has(view, "WindowWidth"):
        brightness = _window(values, _first(view.WindowCenter), _first(view.WindowWidth), view.get("VOILUTFunction"))
    else:
        brightness = _whole_range(values, stored, header)
    is_inverted = header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    return np.float32(1.0) - brightness if is_inverted else brightness


def _modality_values(tags: Any, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Apply the modality transform to stored values: a table, or slope and intercept, or none (PS3.3 C.11.1)."""
    if _has(tags, "ModalityLUTSequence"):
        table, first = _table(tags.ModalityLUTSequence[0])
        return table[np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)].astype(np.float32)
    slope = float(tags.RescaleSlope) if _has(tags, "RescaleSlope") else 1.0
    intercept = float(tags.RescaleIntercept) if _has(tags, "RescaleIntercept") else 0.0
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _looked_up(values: NDArray[np.float32], item: Any) -> NDArray[np.float32]:
    """Map values through a VOI table (PS3.3 C.11.2.1.1), relative to its largest possible entry."""
    table, first = _table(item)
    indices = np.clip(values.astype(np.int64) - first, 0, len(table) - 1)
    return table[indices].astype(np.float32) / np.float32(_ones(int(item.LUTDescriptor[2])))


def _table(item: Any) -> tuple[NDArray[np.int64], int]:
    """Return the entries of a lookup table and the value that its first entry is for."""
    count, first, _ = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if item.is_little_endian in (True, None) else ">"
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * (count or 65536) else "u1")
    return np.asarray(data, np.int64)[: count or 65536], first


def _window(values: NDArray[np.float32], center: float, width: float, function: str | None) -> NDArray[np.float32]:
    """Apply one of the window functions of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, scaled to 0 .. 1."""
    if function == "SIGMOID":
        # more than 20 widths from the centre the result is 0 or 1 anyway; the clip avoids an overflow in exp
        steps = -4.0 * (values - np.float32(center)) / np.float32(max(width, 1e-9))
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(steps, -80.0, 80.0))), np.float32)
    if function == "LINEAR_EXACT":
        return (values - np.float32(center)) / np.float32(max(width, 1e-9)) + np.float32(0.5)
    return (values - np.float32(center - 0.5)) / np.float32(max(width - 1.0, 1e-9)) + np.float32(0.5)


def _whole_range(values: NDArray[np.float32], stored: NDArray[Any], header: Any) -> NDArray[np.float32]:
    """Scale a frame without a window, so that its smallest value becomes 0 and its largest 1; padding is ignored."""
    seen = values
    if _has(header, "PixelPaddingValue"):
        ends = [int(header.PixelPaddingValue)]
        ends += [int(header.PixelPaddingRangeLimit)] if _has(header, "PixelPaddingRangeLimit") else []
        seen = values[(stored < min(ends)) | (stored > max(ends))]
    seen = seen if seen.size else values
    low, high = float(seen.min()), float(seen.max())
    return (values - np.float32(low)) / np.float32(max(high - low, 1e-9))


def _group(header: Any, name: str, frame: int) -> Any:
    """Return the frame's item of a functional group, or the item that all frames share, or None."""
    for groups, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = header.get(groups) or []
        if number < len(items) and items[number].get(name):
            return items[number][name].value[0]
    return None


def _palette_bits(header: Any) -> int:
    bits = int(header.RedPaletteColorLookupTableDescriptor[2])
    return bits if bits in (8, 16) else 16


def _has(tags: Any, name: str) -> bool:
    """Return whether a tag is present and not empty. Anonymising programs leave empty tags."""
    value = tags.get(name) if tags is not None else None
    return value is not None and value != "" and not (hasattr(value, "__len__") and len(value) == 0)


def _ones(bits: int) -> int:
    return int((1 << bits) - 1)


def _first(value: Any) -> float:
    """Return a tag's value, or its first value if it has several."""
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)
