"""Augmentation that keeps a radiology caption true; knows nothing of models.

No flips: left and right are in the captions. No colour shifts, no crops that could cut off what a caption names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

MAX_DEGREES, MAX_SHIFT, MAX_ZOOM = 7.0, 0.04, 0.06
"""Rotation, shift (share of the width) and zoom about the centre: how patients and scanners differ."""
GAMMA, CONTRAST, MAX_BLUR_PX = (0.8, 1.25), (0.9, 1.1), 0.8
"""Window and display differ: gamma, contrast about the mean, and a Gaussian blur in px."""


def radiology(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return u8[h,w,3] a little turned, shifted, zoomed, blurred and windowed differently."""
    height, width = pixels.shape[:2]
    angle = np.deg2rad(rng.uniform(-MAX_DEGREES, MAX_DEGREES))
    scale = 1 / (1 + rng.uniform(-MAX_ZOOM, MAX_ZOOM))
    shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * (width, height)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([width, height]) / 2
    offset = centre - turn @ (centre + shift)
    matrix = (*turn[0], offset[0], *turn[1], offset[1])
    corner = tuple(int(value) for value in pixels[0, 0])  # the background, black or white
    picture = Image.fromarray(pixels).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner
    )
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, MAX_BLUR_PX)))
    values = np.asarray(picture, np.float32) / 255
    values = values ** rng.uniform(*GAMMA)
    values = (values - values.mean()) * rng.uniform(*CONTRAST) + values.mean()
    return np.asarray(np.clip(values * 255 + 0.5, 0, 255), np.uint8)


Augmentation = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]
AUGMENTATIONS: dict[str, Augmentation | None] = {"none": None, "radiology": radiology}
