"""Pixels are those of Hugging Face's slow image processors with a center crop, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    DeiTImageProcessor,
    ViTImageProcessor,
)

from engine.errors import ImageError
from engine.inputs.pixels import read_image
from tests.helpers.tiny import random_pictures

RAW = {"do_rescale": False, "do_normalize": False}
RULES = {
    "CLIP": (CLIPImageProcessor(), (224, 224), "bicubic", (224,)),
    "CLIP that pads": (
        CLIPImageProcessor(size={"shortest_edge": 31}, crop_size={"height": 64, "width": 33}, resample=2),
        (64, 33),
        "bilinear",
        (31,),
    ),
    "DeiT": (DeiTImageProcessor(), (224, 224), "bicubic", (256, 256)),
    "DINOv2": (BitImageProcessor(size={"shortest_edge": 256}), (224, 224), "bicubic", (256,)),
    "ViT": (ViTImageProcessor(), (224, 224), "bilinear", ()),
    "BEiT": (BeitImageProcessor(do_center_crop=True), (224, 224), "bicubic", (256, 256)),
    "DeiT that pads": (
        DeiTImageProcessor(size={"height": 29, "width": 40}, crop_size={"height": 32, "width": 31}),
        (32, 31),
        "bicubic",
        (29, 40),
    ),
}
SHAPES = [(224, 224), (256, 256), (640, 480), (333, 500), (31, 64), (33, 31), (100, 7), (5, 200), (225, 1000)]
"""(width, height). transformers fails for a height of 1 or 3."""
MODES = ["L", "LA", "P", "RGBA", "CMYK", "1"]


def expected(rule: str, image: Image.Image) -> np.ndarray:
    processor = RULES[rule][0]
    return processor([image.convert("RGB")], **RAW, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def ours(rule: str, image: object) -> np.ndarray:
    _, (height, width), resample, resize = RULES[rule]
    return read_image(image, height, width, resample, resize=resize)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_with_a_center_crop_equal_the_processor(rule, shape):
    (picture,) = random_pictures(1)
    picture = picture.resize(shape, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(ours(rule, picture), expected(rule, picture))
    np.testing.assert_array_equal(ours(rule, np.asarray(picture)), expected(rule, picture))


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_a_center_crop_equal_the_processor(mode, tmp_path):
    picture = random_pictures(1)[0].resize((300, 250))
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    path = tmp_path / "x.tif"
    picture.convert(mode).save(path)
    np.testing.assert_array_equal(ours("CLIP", path), expected("CLIP", Image.open(path)))


def test_transparent_palette_with_a_center_crop_equals_the_processor(tmp_path):
    picture = random_pictures(1)[0].resize((300, 250)).quantize(32)
    picture.save(tmp_path / "x.png", transparency=bytes(range(0, 256, 8)))
    np.testing.assert_array_equal(ours("CLIP", tmp_path / "x.png"), expected("CLIP", picture))


def test_a_line_that_would_fill_the_memory_is_refused():
    with pytest.raises(ImageError, match="too long and narrow: resized to 224000000 x 224 pixels"):
        read_image(Image.new("RGB", (1_000_000, 1)), 224, 224, "bicubic", resize=(224,))
    assert read_image(Image.new("RGB", (1_000_000, 1)), 224, 224, "bicubic").shape == (224, 224, 3)
