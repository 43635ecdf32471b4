"""Files that a folder collected from the web may hold: those no reader can read, and odd ones it must.

Used by the tests, one by one, and by benchmarks.soak, mixed into the corpus.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def _picture(size: int = 48) -> Image.Image:
    rng = np.random.default_rng(size)
    blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)


def encoded(kind: str, picture: Image.Image | None = None, **options: object) -> bytes:
    """Return a picture, a small colourful one when None, as a file of Pillow's format `kind`."""
    stream = io.BytesIO()
    (picture or _picture()).save(stream, kind, **options)
    return stream.getvalue()


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb() -> bytes:
    """A PNG of a few kilobytes that says it is 30,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b"")


def _write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _link_to_pipe(path: Path) -> None:
    pipe = path.with_name(".pipe")
    if not pipe.exists():
        os.mkfifo(pipe)
    path.symlink_to(pipe.name)


UNREADABLE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "nothing": (".jpg", _write(b""), "empty file: copy or download it again"),
    "text": (".jpg", _write(b"<html>404 not found</html>\n"), "an HTML page instead of the file"),
    "noise": (".png", _write(np.random.default_rng(1).bytes(5000)), "not an image, or damaged"),
    "truncated JPEG": (".jpg", _write(encoded("JPEG")[:-400]), "truncated"),
    "a JPEG's first bytes": (".jpg", _write(encoded("JPEG")[:20]), "not an image, or damaged"),
    "truncated PNG": (".png", _write(encoded("PNG")[:-600]), "truncated"),
    "truncated WEBP": (".webp", _write(encoded("WEBP")[:-100]), "decoder"),
    "truncated TIFF": (".tif", _write(encoded("TIFF")[:200]), ""),
    "decompression bomb": (".png", _write(_bomb()), "a decompression bomb?"),
    "a format that is not decoded": (".jpg", _write(encoded("SGI")), "not an image, or damaged"),
    "loop of links": (".jpg", lambda path: path.symlink_to(path.name), "symbolic links"),
    "link to nowhere": (".jpg", lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to a folder": (".jpg", lambda path: path.symlink_to("."), "a folder, a pipe or a device"),
    "link to a pipe": (".jpg", _link_to_pipe, "a pipe or a device"),
    "link to a device": (".jpg", lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
    "text called DICOM": (".dcm", _write(b"not DICOM" * 50), "not a DICOM file, or damaged"),
}
"""What it is -> (extension, how to write it, what the reason says of it)."""


def _grey(dtype: type) -> Image.Image:
    values = np.asarray(_picture().convert("L")).astype(dtype)
    return Image.fromarray(values * 257 if dtype is np.uint16 else values)


def _palette_with_transparency() -> bytes:
    return encoded("PNG", _picture().quantize(16), transparency=3)


def _animation() -> bytes:
    return encoded("GIF", _picture(), save_all=True, append_images=[_picture(40).resize((48, 48))])


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    return encoded("JPEG", _picture(), exif=exif)


UNUSUAL: dict[str, tuple[str, bytes]] = {
    "16 bits a channel": (".png", encoded("PNG", _grey(np.uint16))),
    "1 bit": (".png", encoded("PNG", _picture().convert("1"))),
    "grey with alpha": (".png", encoded("PNG", _picture().convert("LA"))),
    "palette with transparency": (".png", _palette_with_transparency()),
    "CMYK": (".jpg", encoded("JPEG", _picture().convert("CMYK"))),
    "floating point": (".tif", encoded("TIFF", _grey(np.float32))),
    "animation": (".gif", _animation()),
    "EXIF rotation": (".jpg", _rotated()),
    "PNG called JPEG": (".jpg", encoded("PNG")),
    "one pixel": (".png", encoded("PNG", _picture().resize((1, 1)))),
    "a thousand times wider than high": (".png", encoded("PNG", _picture().resize((2000, 2)))),
}
"""What it is -> (extension, bytes); every one has a caption."""


def write_unreadable(kind: str, directory: Path, stem: str) -> Path:
    """Write a file of UNREADABLE into a directory; return its path."""
    extension, write, _ = UNREADABLE[kind]
    path = directory / (stem + extension)
    write(path)
    return path
