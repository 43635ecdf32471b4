"""Reading images: equality with Pillow across its releases, notes on what is dropped, and limits.

Pillow 13 changed the order of its two resize passes for images that are narrower and taller than the target. The
digests were recorded with make_image and the releases named next to them.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import warnings

import numpy as np
import PIL
import pytest
from PIL import Image

from engine.errors import ImageError
from engine.inputs import pixels
from engine.inputs.pixels import CLIPPED, FRAMES, TRANSPARENT, ImageNote, decode_image, note_lines, read_image
from tests.helpers.datasets import extreme_png

SIZE = 224
SAME = {
    (256, 216): "f996ed71b3724498",
    (500, 200): "4bfa4bb9ac5e54df",
    (300, 300): "ba754e5c72b82a40",
    (100, 100): "8ea0547c72a6fdee",
    (224, 500): "0c2f12d968f5db00",
    (640, 480): "93d216d26c5e8813",
}
"""(width, height): SHA-256 of the resized pixels, equal with Pillow 10.4.0 and 13.0.0."""
DIFFERENT = {
    (216, 256): ("916c71216f1726d2", "b468808ab3fc4f5d"),
    (200, 500): ("499f616db30bad0e", "103fdf7996ee8094"),
    (223, 300): ("964328239cf1b73c", "e172efeabcf7a281"),
}
"""(width, height): SHA-256 with Pillow 10.4.0, and with 13.0.0."""


def make_image(width: int, height: int) -> Image.Image:
    """An image with detail at every scale, computed with integers only, so that it is the same everywhere."""
    x, y, channel = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)
    return Image.fromarray(((x * x * 3 + y * y * 5 + x * y * 7 + channel * 41) % 256).astype(np.uint8))


def digest(width: int, height: int) -> str:
    pixels = read_image(make_image(width, height), SIZE, SIZE, "bicubic")
    assert pixels.shape == (SIZE, SIZE, 3)
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("size", "expected"), SAME.items())
def test_most_sizes_are_equal_in_all_pillow_releases(size, expected):
    assert digest(*size) == expected


@pytest.mark.parametrize(("size", "expected"), DIFFERENT.items())
def test_narrow_and_tall_images_match_this_pillow_release(size, expected):
    assert digest(*size) == expected[int(PIL.__version__.partition(".")[0]) >= 13]


@pytest.mark.parametrize("limit", [1 << 26, 100])
def test_digest_is_of_the_bytes_that_were_read(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("engine.inputs.pixels.READ_AT_ONCE_BYTES", limit)
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(2700, dtype=np.uint8).reshape(30, 30, 3)).save(path)
    digests: list[str] = []
    pixels = read_image(path, 8, 8, "bicubic", sha256=digests)
    assert (pixels == read_image(path, 8, 8, "bicubic")).all()
    assert digests == [hashlib.sha256(path.read_bytes()).hexdigest()]


def kinds_noted(path) -> list[str]:
    notes: list[ImageNote] = []
    decode_image(path, notes=notes)
    assert all(note.name == str(path) for note in notes)
    return [note.kind for note in notes]


def with_alpha(values: list[int], mode: str) -> Image.Image:
    rgba = make_image(len(values), 1).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.array([values], np.uint8)))
    return rgba.quantize(method=Image.Quantize.FASTOCTREE) if mode == "P" else rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_and_noted(mode, tmp_path):
    path = tmp_path / "x.png"
    with_alpha([0, 255, 255], mode).save(path)
    assert kinds_noted(path) == [TRANSPARENT]
    with Image.open(path) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_image(path).tobytes() == opened.convert("RGB").tobytes()
    with_alpha([255, 255, 255], mode).save(path)
    assert kinds_noted(path) == [], "an opaque alpha channel is not transparency"


def test_a_transparent_colour_is_noted(tmp_path):
    colours = make_image(3, 1)
    colours.save(tmp_path / "x.png", transparency=colours.getpixel((1, 0)))
    assert kinds_noted(tmp_path / "x.png") == [TRANSPARENT]
    notes: list[ImageNote] = []
    decode_image(with_alpha([0, 9], "RGBA"), notes=notes)
    decode_image(np.full((2, 2, 4), 7, np.uint8), notes=notes)
    assert notes == [(TRANSPARENT, "image")] * 2


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_further_frames_are_noted_and_the_first_is_read(suffix, tmp_path):
    first, second = Image.new("RGB", (6, 6), "red"), Image.new("RGB", (6, 6), "blue")
    path = tmp_path / f"x.{suffix}"
    first.save(path, save_all=True, append_images=[second], **({"lossless": True} if suffix == "webp" else {}))
    assert kinds_noted(path) == [FRAMES]
    assert decode_image(path).getpixel((3, 3)) == (255, 0, 0)
    first.save(path)
    assert kinds_noted(path) == []


def test_previews_in_mpo_files_are_not_noted(tmp_path):
    path = tmp_path / "x.mpo"
    make_image(8, 8).save(path, save_all=True, append_images=[make_image(4, 4)])
    with Image.open(path) as opened:
        assert opened.n_frames == 2
    assert kinds_noted(path) == []


def test_notes_become_one_line_per_kind():
    notes = [ImageNote(FRAMES, "a.gif"), *(ImageNote(CLIPPED, f"{i}.png") for i in (3, 1, 0, 2, 1))]
    deep, frames = note_lines(notes)
    assert deep.startswith("4 images have more than 8 bits per channel: ")
    assert deep.endswith("0.png, 1.png, 2.png and 1 more; --high-bit-depth scale keeps their range")
    assert frames.startswith("1 image has more frames than the one that is used: a.gif")


@pytest.mark.parametrize("size", [(1_000_001, 1), (1, 1_000_001)])
def test_extreme_sides_are_refused_before_they_are_decoded(size, tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(extreme_png(*size))
    monkeypatch.setattr(Image.Image, "resize", None)
    with pytest.raises(ImageError, match=r"x\.png: refused: a side of 1000001 pixels, the limit is 1000000"):
        read_image(path, 8, 8, "bicubic")


def test_image_that_needs_too_much_memory_fails_alone(monkeypatch):
    tries = []

    def short(*_: object) -> Image.Image:
        tries.append(pixels._ALONE.locked())
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", short)
    with pytest.raises(ImageError, match="image: reading it needs more memory than is free"):
        read_image(make_image(9, 9), 8, 8, "bicubic")
    assert tries == [False, True], "it is read again while no other large image is read"
    monkeypatch.setattr(Image.Image, "convert", short)
    with pytest.raises(ImageError, match="more memory than is free"):
        decode_image(make_image(9, 9))


def test_image_is_read_again_after_a_memory_error(monkeypatch):
    resize, lock = Image.Image.resize, threading.Lock()

    def short_once(self, *arguments: object) -> Image.Image:
        if lock.acquire(blocking=False):
            raise MemoryError
        return resize(self, *arguments)

    expected = read_image(make_image(9, 9), 8, 8, "bicubic")
    monkeypatch.setattr(Image.Image, "resize", short_once)
    np.testing.assert_array_equal(read_image(make_image(9, 9), 8, 8, "bicubic"), expected)


def test_small_tiff_in_a_huge_tile_is_refused(tmp_path):
    path = tmp_path / "x.tif"
    entries = [(256, 3, 64), (257, 3, 64), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1)]
    entries += [(322, 3, 26_000), (323, 3, 26_000), (324, 4, 8), (325, 4, 4096)]
    content = b"II*\0" + struct.pack("<IH", 8, len(entries))
    content += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(5000)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.tif: larger than \d+ pixels, refused: a decompression bomb"):
        decode_image(path)


def progressive_jpeg(further_scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated `further_scans` times."""
    stream = io.BytesIO()
    make_image(16, 16).convert("L").save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * further_scans + content[-2:]


def test_progressive_jpeg_with_too_many_scans_is_refused(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(progressive_jpeg(pixels.MAX_SCANS))
    with pytest.raises(ImageError, match=r"x\.jpg: a progressive JPEG of more than 256 scans, refused"):
        decode_image(path)


@pytest.mark.parametrize("block", [4, 7, 1 << 16])
def test_scans_are_counted_only_up_to_the_end_of_the_image(block, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "SCAN_BLOCK", block)
    plain = progressive_jpeg(0)
    monkeypatch.setattr(pixels, "MAX_SCANS", plain.count(b"\xff\xda"))
    preview = b"\xff\xe2" + struct.pack(">H", 2 + 80) + b"\xff\xda\0\0" * 20
    video = b"\0\2" + b"\xff\xda\0\2" * 500
    path = tmp_path / "x.jpg"
    path.write_bytes(plain[:2] + preview + plain[2:] + video)
    decode_image(path)
    path.write_bytes(progressive_jpeg(1))
    with pytest.raises(ImageError, match="scans, refused"):
        decode_image(path)


def test_bitmap_without_file_header_is_read(tmp_path):
    make_image(9, 5).save(tmp_path / "x.bmp")
    (tmp_path / "x.dib").write_bytes((tmp_path / "x.bmp").read_bytes()[14:])
    assert decode_image(tmp_path / "x.dib").tobytes() == make_image(9, 5).tobytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>404", "an HTML page"),
        (b"", "empty file"),
    ],
)
def test_lfs_pointers_html_and_empty_files_are_recognised(content, reason, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"x\.jpg: {reason}"):
        decode_image(tmp_path / "x.jpg")


def test_libtiff_prints_nothing(tmp_path, capfd):
    stream = io.BytesIO()
    make_image(64, 64).save(stream, "TIFF", compression="tiff_lzw")
    content = bytearray(stream.getvalue())
    content[100:3000] = b"\x77" * 2900
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ImageError):
        decode_image(tmp_path / "x.tif")
    assert capfd.readouterr().err == ""
