"""Pictures of more than 8 bits a channel: Hugging Face's way, their own range, or a window."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engine.errors import UsageError
from engine.inputs.depth import as_rgb, is_deep, window_of
from engine.inputs.pixels import decode_image

VALUES = np.array([[0, 100, 255], [256, 2048, 4095]])


def rgb(picture: Image.Image, depth: str) -> list[int]:
    pixels = np.asarray(as_rgb(picture, depth))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_own_range_and_windows(dtype):
    picture = Image.fromarray(VALUES.astype(dtype))
    assert is_deep(picture)
    assert rgb(picture, "clip") == [0, 100, 255, 255, 255, 255]
    assert rgb(picture, "scale") == [0, 6, 16, 16, 128, 255]  # 255 v / 4095, rounded: 6.2, 15.9, 15.9, 127.5
    assert rgb(picture, "100,2048") == [0, 0, 20, 20, 255, 255]  # 255 (v - 100) / 1948: 20.3, 20.4
    assert rgb(picture, "-4095,4095") == [128, 131, 135, 135, 191, 255]


def test_eight_bits_stay_as_they_are():
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert not is_deep(picture)
    assert rgb(picture, "scale") == rgb(picture, "10,20") == list(range(256))


def test_what_is_no_number_is_black_and_out_of_the_range():
    values = np.array([[np.nan, 2.0, 3.0, np.inf, -np.inf]], np.float32)
    assert rgb(Image.fromarray(values), "scale") == [0, 0, 255, 0, 0]
    assert rgb(Image.fromarray(np.full((1, 2), np.nan, np.float32)), "scale") == [0, 0]
    assert rgb(Image.fromarray(np.full((1, 2), 7.0, np.float32)), "scale") == [0, 0]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_files_are_scaled_and_nothing_is_clipped(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(VALUES.astype(np.uint16)).save(path)
    clipped: list[str] = []
    pixels = np.asarray(decode_image(path, depth="scale", clipped=clipped))
    assert pixels[..., 0].ravel().tolist() == [0, 6, 16, 16, 128, 255]
    assert clipped == []
    decode_image(path, clipped=clipped)
    assert clipped == [str(path)]


@pytest.mark.parametrize("text", ["", "Scale", "5", "5,5", "9,1", "nan,1", "0,inf", "1,2,3"])
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError, match="give clip, scale, or two numbers LOW,HIGH"):
        window_of(text)
