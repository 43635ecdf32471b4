"""One frame of a DICOM file as an RGB image; needs the extra `dicom` (pydicom).

Only the tags listed here are read. Names, dates and private tags of the header never reach this program's memory as
values, its messages or its files.
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
"""Of one frame; a mammogram has 20 million."""
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
"""Kinds of colour that pydicom turns into RGB, beside palettes."""

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
"""The element (0002,0002) of the file meta information, which is in explicit little endian always (PS3.10, 7.1)."""
CLASS_BYTES = 512
"""Of a file, in which its SOP class stands."""


def require_pydicom() -> Any:
    """Import pydicom, or raise EngineError naming the extra that brings it."""
    try:
        import pydicom.pixels
    except ImportError as error:
        raise EngineError(f"DICOM files need pydicom ({error}): {install_command('dicom')}") from error
    # Warnings quote values of tags, and a damaged file is reported by us.
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    return pydicom


class _RefusedError(ValueError):
    """A reason that quotes nothing of the file."""


class Frame(NamedTuple):
    """One frame as RGB, 8 bits a channel, and how many the file has."""

    image: Image.Image
    frames: int


def holds_image(stream: IO[bytes]) -> bool:
    """Return whether a DICOM file is an image: directories, reports and presentation states have no Rows.

    Its SOP class tells without pydicom reading the tags, if it is one of images. A file that cannot be judged, being
    damaged or deflated, counts as an image, so that reading it reports the reason.
    """
    pydicom = require_pydicom()
    head = stream.read(CLASS_BYTES)
    stream.seek(0)
    found = SOP_CLASS.search(head)
    if found and "Image Storage" in pydicom.uid.UID(found[1].decode("ascii")).name:
        return True
    try:
        if _is_deflated(pydicom, stream):
            return True
        is_bare = head[128:132] != b"DICM"
        return "Rows" in pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=["Rows"], force=is_bare)
    except Exception:  # as read_dicom, which says what it is
        return True


def read_dicom(stream: IO[bytes], frame: int = 0) -> Frame:
    """Return frame number `frame` (from 0).

    Stored values go through the modality transform, then the window or VOI table of the tags (their first view; the
    whole range of the frame where there is none), and MONOCHROME1 is inverted (DICOM PS3.3, C.7.6.3.1.2, C.11.1,
    C.11.2). Raises ValueError with a reason, quoting no tag of the file, and OSError as the disk does.
    """
    pydicom = require_pydicom()
    try:
        return _read(pydicom, stream, frame)
    except pydicom.errors.InvalidDicomError:
        raise ValueError("not a DICOM file, or damaged") from None
    except (MemoryError, OSError, _RefusedError):
        raise
    except Exception as error:  # damaged tags fail in many ways, and in words that quote them
        raise ValueError(f"damaged, or not of the standard ({type(error).__name__})") from None


def _is_deflated(pydicom: Any, stream: IO[bytes]) -> bool:
    """Return whether the data set is deflated as a whole; the position in the stream is 0 afterwards.

    Read from the file meta information alone: pydicom's dcmread would inflate the rest at once, a thousandfold perhaps.
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
        raise _RefusedError("deflated as a whole, which may hide a decompression bomb: write it in another encoding")
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    is_bare = head[128:132] != b"DICM" and kind_of(head) == "DICOM"  # tags at once, as old programs write them
    header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=TAGS, force=is_bare)
    frames = int(header.get("NumberOfFrames") or 1)
    if "Rows" not in header or "Columns" not in header:
        raise _RefusedError("a DICOM file without an image (a directory, a report, a presentation state?)")
    if not frame < frames:
        raise _RefusedError(f"frame {frame} was asked for, and it has {frames}, counted from 0")
    if int(header.Rows) * int(header.Columns) > MAX_PIXELS:
        raise _RefusedError(f"a frame of more than {MAX_PIXELS} pixels, refused")
    if int(header.HighBit) != int(header.BitsStored) - 1:
        raise _RefusedError("its values do not begin at the lowest bit, which is not read")
    stored = _stored_values(pydicom, header, stream, frame)
    interpretation = str(header.PhotometricInterpretation)
    if interpretation == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(stored, header)
        if colours.dtype.itemsize == 2 and not header.original_encoding[1]:
            colours = colours.byteswap()  # pydicom 3.0 reads big-endian tables in the machine's own order
        share = colours / np.float32(_ones(_palette_bits(header)))
    elif stored.ndim == 3:
        if interpretation not in COLOURS:
            raise _RefusedError("colours of a kind that is not read (neither RGB, YBR nor a palette)")
        share = stored / np.float32(_ones(int(header.BitsStored)))
    else:
        share = _grey(header, stored, frame)
    pixels = (np.clip(share, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return Frame(Image.fromarray(pixels).convert("RGB"), frames)


def _stored_values(pydicom: Any, header: Any, stream: IO[bytes], frame: int) -> NDArray[Any]:
    """Return one frame, [rows,columns] or, with YBR turned into RGB, [rows,columns,3]."""
    stream.seek(0)
    syntax, pixels = header.file_meta.get("TransferSyntaxUID"), stream
    if syntax is None:  # without the header of PS3.10 pixels are plain, in the encoding of the tags
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
            # Tags in another encoding than the header names: only dcmread notices, and finds the pixels.
            stream.seek(0)
            pixels = pydicom.dcmread(stream, specific_tags=[*TAGS, "PixelData"])
            stored = pydicom.pixels.pixel_array(pixels, index=frame)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # each decoder meets damage in its own way
        if "missing dependencies" in str(error):
            raise _RefusedError(f"no decoder for {name} is installed (see pydicom's list of plugins)") from None
        raise _RefusedError(f"its pixels ({name}) cannot be decoded ({type(error).__name__})") from None
    return stored


def _grey(header: Any, stored: NDArray[Any], frame: int) -> NDArray[np.float32]:
    """Return stored grey values [rows,columns] as brightness 0 to 1, 1 being white."""
    transform = _group(header, "PixelValueTransformationSequence", frame)
    values = _modality_values(transform if _has(transform, "RescaleSlope") else header, stored)
    view = _group(header, "FrameVOILUTSequence", frame)
    view = view if _has(view, "WindowWidth") or _has(view, "VOILUTSequence") else header
    if _has(view, "VOILUTSequence"):
        share = _looked_up(values, view.VOILUTSequence[0])
    elif _has(view, "WindowCenter") and _has(view, "WindowWidth"):
        share = _window(values, _first(view.WindowCenter), _first(view.WindowWidth), view.get("VOILUTFunction"))
    else:
        share = _whole_range(values, stored, header)
    is_inverted = header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    return np.float32(1.0) - share if is_inverted else share


def _modality_values(tags: Any, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Return what stored values stand for: by table, by slope and intercept, or as they are (PS3.3 C.11.1)."""
    if _has(tags, "ModalityLUTSequence"):
        table, first = _table(tags.ModalityLUTSequence[0])
        return table[np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)].astype(np.float32)
    slope = float(tags.RescaleSlope) if _has(tags, "RescaleSlope") else 1.0
    intercept = float(tags.RescaleIntercept) if _has(tags, "RescaleIntercept") else 0.0
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _looked_up(values: NDArray[np.float32], item: Any) -> NDArray[np.float32]:
    """Send values through a VOI table (PS3.3 C.11.2.1.1), as a share of its largest possible entry."""
    table, first = _table(item)
    places = np.clip(values.astype(np.int64) - first, 0, len(table) - 1)
    return table[places].astype(np.float32) / np.float32(_ones(int(item.LUTDescriptor[2])))


def _table(item: Any) -> tuple[NDArray[np.int64], int]:
    """Return the entries of a lookup table and the value its first entry is for."""
    count, first, _ = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if item.is_little_endian in (True, None) else ">"
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * (count or 65536) else "u1")
    return np.asarray(data, np.int64)[: count or 65536], first


def _window(values: NDArray[np.float32], center: float, width: float, function: str | None) -> NDArray[np.float32]:
    """The three window functions of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, scaled to 0 .. 1."""
    if function == "SIGMOID":
        # beyond 20 widths it is 0 or 1 anyway
        steps = -4.0 * (values - np.float32(center)) / np.float32(max(width, 1e-9))
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(steps, -80.0, 80.0))), np.float32)
    if function == "LINEAR_EXACT":
        return (values - np.float32(center)) / np.float32(max(width, 1e-9)) + np.float32(0.5)
    return (values - np.float32(center - 0.5)) / np.float32(max(width - 1.0, 1e-9)) + np.float32(0.5)


def _whole_range(values: NDArray[np.float32], stored: NDArray[Any], header: Any) -> NDArray[np.float32]:
    """Stretch a frame without a window from its smallest to its largest value, padding left out."""
    seen = values
    if _has(header, "PixelPaddingValue"):
        ends = [int(header.PixelPaddingValue)]
        ends += [int(header.PixelPaddingRangeLimit)] if _has(header, "PixelPaddingRangeLimit") else []
        seen = values[(stored < min(ends)) | (stored > max(ends))]
    seen = seen if seen.size else values
    low, high = float(seen.min()), float(seen.max())
    return (values - np.float32(low)) / np.float32(max(high - low, 1e-9))


def _group(header: Any, name: str, frame: int) -> Any:
    """Return a frame's own item of a functional group, else the one all frames share, else None."""
    for groups, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = header.get(groups) or []
        if number < len(items) and items[number].get(name):
            return items[number][name].value[0]
    return None


def _palette_bits(header: Any) -> int:
    bits = int(header.RedPaletteColorLookupTableDescriptor[2])
    return bits if bits in (8, 16) else 16


def _has(tags: Any, name: str) -> bool:
    """Return whether a tag is there and not empty, as anonymising programs leave it."""
    value = tags.get(name) if tags is not None else None
    return value is not None and value != "" and not (hasattr(value, "__len__") and len(value) == 0)


def _ones(bits: int) -> int:
    return int((1 << bits) - 1)


def _first(value: Any) -> float:
    """Return a tag's value, its first where it offers several views."""
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)
