"""Images with more than 8 bits per channel: clipped as in Hugging Face, scaled to their range, or windowed."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from engine.errors import ImageError, UsageError
from engine.inputs import pixels as pixels_module
from engine.inputs.pixels import CLIPPED, ImageNote, as_rgb, decode_image, is_deep, read_image, to_bytes
from engine.options import window_of

VALUES = np.array([[0, 100, 255], [256, 2048, 4095]])


def rgb(image: Image.Image, depth: str) -> list[int]:
    pixels = np.asarray(as_rgb(image, depth))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_depth_clip_scale_and_windows(dtype):
    image = Image.fromarray(VALUES.astype(dtype))
    assert is_deep(image)
    assert rgb(image, "clip") == [0, 100, 255, 255, 255, 255]
    assert rgb(image, "scale") == [0, 6, 16, 16, 128, 255]  # 255 v / 4095, rounded: 6.2, 15.9, 15.9, 127.5
    assert rgb(image, "100,2048") == [0, 0, 20, 20, 255, 255]  # 255 (v - 100) / 1948: 20.3, 20.4
    assert rgb(image, "-4095,4095") == [128, 131, 135, 135, 191, 255]


def test_8_bit_images_are_unchanged():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert not is_deep(image)
    assert rgb(image, "scale") == rgb(image, "10,20") == list(range(256))


def test_nan_and_infinity_become_black():
    values = np.array([[np.nan, 2.0, 3.0, np.inf, -np.inf]], np.float32)
    assert rgb(Image.fromarray(values), "scale") == [0, 0, 255, 0, 0]
    assert rgb(Image.fromarray(np.full((1, 2), np.nan, np.float32)), "scale") == [0, 0]
    assert rgb(Image.fromarray(np.full((1, 2), 7.0, np.float32)), "scale") == [0, 0]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_files_are_scaled_and_nothing_is_clipped(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(VALUES.astype(np.uint16)).save(path)
    notes: list[ImageNote] = []
    pixels = np.asarray(decode_image(path, depth="scale", notes=notes))
    assert pixels[..., 0].ravel().tolist() == [0, 6, 16, 16, 128, 255]
    assert notes == []
    decode_image(path, notes=notes)
    assert notes == [(CLIPPED, str(path))]


def test_strips_give_the_values_of_the_whole_image(monkeypatch):
    values = np.random.default_rng(0).normal(9000, 5000, (57, 23)).astype(np.float32)
    values[3, 5], values[40, 1] = np.nan, np.inf
    image = Image.fromarray(values)
    expected = {depth: rgb(image, depth) for depth in ("scale", "100,9000.5")}
    monkeypatch.setattr(pixels_module, "STRIP_PIXELS", 100)
    assert {depth: rgb(image, depth) for depth in expected} == expected
    colours = np.stack([values] * 3, 2)
    assert to_bytes(colours, "scale")[..., 1].ravel().tolist() == expected["scale"]


def test_scaling_needs_little_memory():
    tracemalloc.start()
    as_rgb(Image.new("I;16", (4000, 3000), 7), "scale")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80_000_000, "a float64 copy of these 12 million pixels takes 96 MB"


DEEP = VALUES.astype(np.float32)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (DEEP, "an array of float32 instead of uint8: give high_bit_depth='scale'"),
        (VALUES.astype(np.uint16), "an array of uint16"),
        (VALUES, "an array of int64"),
        (np.stack([DEEP] * 3, 2), "an array of float32"),
        (VALUES.astype(complex), "an array of complex128: convert it to uint8"),
        (Image.fromarray(VALUES.astype(np.uint16)), "a Pillow image of mode I;16 instead of uint8: give"),
        (Image.fromarray(VALUES.astype(np.int32)), "mode I "),
        (Image.fromarray(DEEP), "mode F "),
        (np.zeros((0, 0, 3), np.uint8), r"an empty image \(0 x 0 pixels\)"),
        (np.zeros((0, 5), np.uint8), r"an empty image \(5 x 0"),
        (Image.new("RGB", (0, 4)), r"an empty image \(0 x 4"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]: expected \[height, width\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"shape \[1, 8, 8, 3\]"),
        (3, "expected a path, a Pillow image or a NumPy array, not int"),
    ],
)
def test_sources_of_unclear_range_or_shape_are_refused(source, reason):
    with pytest.raises(ImageError, match=f"^image: .*{reason}"):
        read_image(source, 8, 8, "bicubic")


@pytest.mark.parametrize("convert", [np.asarray, lambda a: np.stack([a] * 4, 2), Image.fromarray])
def test_arrays_and_pillow_images_follow_depth(convert):
    def first_channel(depth: str) -> list[int]:
        return np.asarray(decode_image(convert(DEEP), depth=depth, notes=notes))[..., 0].ravel().tolist()

    notes: list[ImageNote] = []
    assert first_channel("scale") == [0, 6, 16, 16, 128, 255]
    assert first_channel("100,2048") == [0, 0, 20, 20, 255, 255]
    assert notes == []
    assert first_channel("clip") == [0, 100, 255, 255, 255, 255]
    assert notes == [(CLIPPED, "image")]


def test_8_bit_arrays_and_masks_are_read():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (grey, grey[..., None], np.stack([grey] * 3, 2), np.stack([grey] * 4, 2)):
        np.testing.assert_array_equal(np.asarray(decode_image(array)), np.stack([grey] * 3, 2))
    np.testing.assert_array_equal(np.asarray(decode_image(grey > 5))[..., 0], (grey > 5) * 255)


@pytest.mark.parametrize("text", ["", "Scale", "5", "5,5", "9,1", "nan,1", "0,inf", "1,2,3"])
def test_invalid_windows_are_refused(text):
    with pytest.raises(UsageError, match="give clip, scale, or two numbers LOW,HIGH"):
        window_of(text)
