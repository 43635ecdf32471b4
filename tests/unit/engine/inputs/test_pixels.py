"""Pixels are Pillow's: where its releases differ, and where they do not.

Pillow 13 shrinks a picture that is narrower and taller than the target in another order of its two passes. The digests
are of the releases named beside them, recorded by this very picture.
"""

from __future__ import annotations

import hashlib

import numpy as np
import PIL
import pytest
from PIL import Image

from engine.inputs.pixels import read_image

SIZE = 224
SAME = {
    (256, 216): "f996ed71b3724498",
    (500, 200): "4bfa4bb9ac5e54df",
    (300, 300): "ba754e5c72b82a40",
    (100, 100): "8ea0547c72a6fdee",
    (224, 500): "0c2f12d968f5db00",
    (640, 480): "93d216d26c5e8813",
}
"""Width and height -> sha256 of the 224 px pixels by Pillow 10.4.0 and 13.0.0."""
DIFFERENT = {
    (216, 256): ("916c71216f1726d2", "b468808ab3fc4f5d"),
    (200, 500): ("499f616db30bad0e", "103fdf7996ee8094"),
    (223, 300): ("964328239cf1b73c", "e172efeabcf7a281"),
}
"""The same by Pillow 10.4.0, and by 13.0.0."""


def picture(width: int, height: int) -> Image.Image:
    """A picture with detail at every scale, drawn by integers alone."""
    x, y, channel = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)
    return Image.fromarray(((x * x * 3 + y * y * 5 + x * y * 7 + channel * 41) % 256).astype(np.uint8))


def digest(width: int, height: int) -> str:
    pixels = read_image(picture(width, height), SIZE, SIZE, "bicubic")
    assert pixels.shape == (SIZE, SIZE, 3)
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("size", "expected"), SAME.items())
def test_most_shapes_are_the_same_by_every_release(size, expected):
    assert digest(*size) == expected


@pytest.mark.parametrize(("size", "expected"), DIFFERENT.items())
def test_narrow_and_tall_pictures_are_as_this_release_makes_them(size, expected):
    assert digest(*size) == expected[int(PIL.__version__.partition(".")[0]) >= 13]


@pytest.mark.parametrize("limit", [1 << 26, 100])
def test_the_digest_is_of_the_bytes_that_were_read(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("engine.inputs.pixels.READ_AT_ONCE_BYTES", limit)
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(2700, dtype=np.uint8).reshape(30, 30, 3)).save(path)
    digests: list[str] = []
    pixels = read_image(path, 8, 8, "bicubic", sha256=digests)
    assert (pixels == read_image(path, 8, 8, "bicubic")).all()
    assert digests == [hashlib.sha256(path.read_bytes()).hexdigest()]
