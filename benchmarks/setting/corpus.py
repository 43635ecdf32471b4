"""A challenge-sized directory of distinct JPEGs made of real voxels, the same bytes wherever it is made.

Every picture is one of the example slices turned, zoomed, shifted and given another contrast, by its number. Nothing
is fetched. JPEG bytes depend on the release of Pillow.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from engine.inputs.images import find_images
from engine.inputs.pixels import decode_image

CHALLENGE_SIZE = 17_237
"""Test images of ImageCLEFmedical Caption 2024."""
LONGER_SIDE = 320
"""Pixels; most of ROCOv2's pictures are larger, a JPEG of this size already costs more to decode than to resize."""


def make_picture(number: int, bases: list[Image.Image]) -> Image.Image:
    """Return picture `number`: a base slice turned by up to 12 degrees, zoomed, shifted, gamma 0.7 to 1.4."""
    rng = np.random.default_rng(number)
    base = bases[number % len(bases)].convert("L")
    scale = LONGER_SIDE / max(base.size)
    base = base.resize((round(base.width * scale), round(base.height * scale)), Image.Resampling.BICUBIC)
    angle, zoom = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.88, 1.12)
    shift = rng.uniform(-0.05, 0.05, 2) * base.size
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    x, y = base.width / 2, base.height / 2
    affine = (cos, sin, x - cos * x - sin * y + shift[0], -sin, cos, y + sin * x - cos * y + shift[1])
    turned = base.transform(base.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    contrast = (np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.4) * 255).astype(np.uint8)
    return turned.point(contrast.tolist())


def write_corpus(out: Path, count: int, pictures: Path) -> Path:
    """Write `count` JPEGs made from the pictures of a directory into `out`; those already there are kept."""
    bases = [decode_image(image.path) for image in find_images(pictures).images]
    out.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        path = out / f"corpus_{number:06d}.jpg"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make_picture(number, bases).save(unfinished, "JPEG", quality=90)
            unfinished.rename(path)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    return out
