"""Pictures of more than 8 bits a channel, or of floats, as 8 bits a channel; knows nothing of files."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from engine.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

CLIP, SCALE = "clip", "scale"
"""As Hugging Face's processor reads them, values above 255 white; or each picture's own range made 0 to 255."""
HELP = "Pictures of more than 8 bits: `clip` (above 255 white, as Hugging Face), `scale` (own range), or LOW,HIGH."


def is_deep(picture: Image.Image) -> bool:
    """Return whether a picture has more than 8 bits a channel here. Pillow itself halves 16-bit colour to 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;")


def as_rgb(picture: Image.Image, depth: str = CLIP) -> Image.Image:
    """Return a picture as RGB; `depth` says what becomes of one with more than 8 bits a channel, see window_of.

    With a window of values LOW to HIGH, v becomes round(255 (v - LOW) / (HIGH - LOW)), held between 0 and 255; SCALE
    takes the picture's least and greatest value, and makes a picture of one value black. What is not a number is black.
    """
    import numpy as np  # here, since the command line reads this file for its help
    from PIL import Image

    if depth == CLIP or not is_deep(picture):
        return picture.convert("RGB")
    values = np.asarray(picture, np.float64)
    numbers = np.isfinite(values)
    if (window := window_of(depth)) is None:
        seen = values[numbers]
        window = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    low, high = window
    shares = (np.where(numbers, values, low) - low) / ((high - low) or 1.0)
    return Image.fromarray((np.clip(shares, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)).convert("RGB")


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
