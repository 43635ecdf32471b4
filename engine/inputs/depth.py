"""The setting --high-bit-depth: how images with more than 8 bits per channel become 8 bits.

Free of numpy and Pillow, so that `--help` starts quickly. pixels.py applies the setting.
"""

from __future__ import annotations

import functools
import math

from engine.errors import UsageError

CLIP, SCALE = "clip", "scale"
"""CLIP makes values above 255 white, like Hugging Face's processor. SCALE maps each image's range to 0 to 255."""
HELP = (
    "How images with more than 8 bits become 8: `clip` (above 255 is white, as in Hugging Face), `scale` (each image's "
    "range), or a range LOW,HIGH."
)


@functools.lru_cache(maxsize=16)
def window_of(depth: str) -> tuple[float, float] | None:
    """Parse LOW,HIGH into a window of values. Returns None for CLIP and SCALE; raises UsageError for other texts."""
    if depth in (CLIP, SCALE):
        return None
    try:
        low, high = (float(number) for number in depth.split(","))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"high bit depth {depth!r}: give {CLIP}, {SCALE}, or two numbers LOW,HIGH, the lower first")
    return low, high
