"""Read images and arrays of more than 8 bits a channel, or of floats, as 8 bits a channel; files are elsewhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.errors import UsageError

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
