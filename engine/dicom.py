"""One frame of a DICOM file as an RGB picture; needs the extra `dicom` (pydicom).

Only the tags listed here are read. Names, dates and private tags of the header never reach this program's memory as
values, its messages or its files.
"""

from __future__ import annotations

import warnings
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import EngineError

EXTENSIONS = frozenset({".dcm", ".dicom"})

TAGS = [
    *("BitsAllocated", "BitsStored", "Columns", "HighBit", "NumberOfFrames", "PhotometricInterpretation"),
    *("PixelRepresentation", "PlanarConfiguration", "Rows", "SamplesPerPixel", "PixelPaddingValue"),
    *("ModalityLUTSequence", "RescaleIntercept", "RescaleSlope"),
    *("VOILUTFunction", "VOILUTSequence", "WindowCenter", "WindowWidth", "PresentationLUTShape"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


def require_pydicom() -> Any:
    """Import pydicom, or raise EngineError naming the extra that brings it."""
    try:
        import pydicom.pixels
    except ImportError as error:
        raise EngineError(
            f"DICOM files need pydicom ({error}): pip install 'blip-caption-engine[dicom]', or '.[dicom]' in a checkout"
        ) from error
    # Warnings quote values of tags, and a damaged file is reported by us.
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    return pydicom


class _RefusedError(ValueError):
    """A reason that quotes nothing of the file."""


def read_dicom(stream: IO[bytes], frame: int = 0) -> Image.Image:
    """Return frame number `frame` (from 0) as RGB, 8 bits a channel.

    Stored values go through the modality transform, then the window or VOI table of the tags (their first view; the
    whole range of the frame where there is none), and MONOCHROME1 is inverted (DICOM PS3.3, C.7.6.3.1.2, C.11.1,
    C.11.2). Raises ValueError with a reason, quoting no tag of the file; Image.DecompressionBombError for a frame
    larger than Pillow's limit.
    """
    pydicom = require_pydicom()
    try:
        return _read(pydicom, stream, frame)
    except pydicom.errors.InvalidDicomError:
        raise ValueError("not a DICOM file, or damaged") from None
    except (MemoryError, Image.DecompressionBombError, _RefusedError):
        raise
    except Exception as error:  # damaged tags fail in many ways, and in words that quote them
        raise ValueError(f"damaged, or not of the standard ({type(error).__name__})") from None


def _read(pydicom: Any, stream: IO[bytes], frame: int) -> Image.Image:
    header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=TAGS)
    frames = int(header.get("NumberOfFrames") or 1)
    if "Rows" not in header or "Columns" not in header:
        raise _RefusedError("a DICOM file without a picture")
    if not frame < frames:
        raise _RefusedError(f"frame {frame} was asked for, and it has {frames}, counted from 0")
    if Image.MAX_IMAGE_PIXELS is not None and int(header.Rows) * int(header.Columns) > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    stored = _stored_values(pydicom, header, stream, frame)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(stored, header)
        if colours.dtype.itemsize == 2 and not header.original_encoding[1]:
            colours = colours.byteswap()  # pydicom 3.0 reads big-endian tables in the machine's own order
        share = colours / float(_ones(_palette_bits(header)))
    elif stored.ndim == 3:
        share = stored / float(_ones(int(header.BitsStored)))
    else:
        share = _grey(pydicom, header, stored, frame)
    pixels = (np.clip(share, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


def _stored_values(pydicom: Any, header: Any, stream: IO[bytes], frame: int) -> NDArray[Any]:
    """Return one frame, [rows,columns] or, with YBR turned into RGB, [rows,columns,3]."""
    stream.seek(0)
    syntax = header.file_meta.get("TransferSyntaxUID")
    name = syntax.name if syntax is not None and not syntax.is_private else "an unnamed encoding"
    try:
        # a frame is found in the file without reading the others, except where all is deflated together
        is_deflated = syntax == pydicom.uid.DeflatedExplicitVRLittleEndian
        source = pydicom.dcmread(stream, specific_tags=[*TAGS, "PixelData"]) if is_deflated else stream
        stored: NDArray[Any] = pydicom.pixels.pixel_array(source, index=frame)
    except MemoryError:
        raise
    except Exception as error:  # each decoder meets damage in its own way
        if "missing dependencies" in str(error):
            raise _RefusedError(f"no decoder for {name} is installed (see pydicom's list of plugins)") from None
        raise _RefusedError(f"its pixels ({name}) cannot be decoded ({type(error).__name__})") from None
    return stored


def _grey(pydicom: Any, header: Any, stored: NDArray[Any], frame: int) -> NDArray[np.float64]:
    """Return stored grey values [rows,columns] as brightness 0 to 1, 1 being white."""
    transform = _group(header, "PixelValueTransformationSequence", frame) or pydicom.Dataset()
    values = pydicom.pixels.apply_modality_lut(stored, transform if "RescaleSlope" in transform else header)
    view = _group(header, "FrameVOILUTSequence", frame) or header
    if view.get("VOILUTSequence"):
        bits = int(view.VOILUTSequence[0].LUTDescriptor[2])
        share = np.asarray(pydicom.pixels.apply_voi(values, view) / float(_ones(bits)))
    elif "WindowCenter" in view and "WindowWidth" in view:
        share = _window(values, _first(view.WindowCenter), _first(view.WindowWidth), view.get("VOILUTFunction"))
    else:
        share = _whole_range(values, stored, header)
    is_inverted = header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    return 1.0 - share if is_inverted else share


def _window(values: NDArray[Any], center: float, width: float, function: str | None) -> NDArray[np.float64]:
    """The three window functions of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, scaled to 0 .. 1."""
    if function == "SIGMOID":
        # beyond 40 widths it is 0 or 1 anyway
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / max(width, 1e-9), -160.0, 160.0)))
    if function == "LINEAR_EXACT":
        return (values - center) / max(width, 1e-9) + 0.5
    return (values - (center - 0.5)) / max(width - 1.0, 1e-9) + 0.5


def _whole_range(values: NDArray[Any], stored: NDArray[Any], header: Any) -> NDArray[np.float64]:
    """Stretch a frame without a window from its smallest to its largest value, padding left out."""
    seen = values[stored != header.PixelPaddingValue] if "PixelPaddingValue" in header else values
    seen = seen if seen.size else values
    low, high = float(seen.min()), float(seen.max())
    return (values - low) / max(high - low, 1e-9)


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


def _ones(bits: int) -> int:
    return int((1 << bits) - 1)


def _first(value: Any) -> float:
    """Return a tag's value, its first where it offers several views."""
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)
