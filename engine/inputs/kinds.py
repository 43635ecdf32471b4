"""Recognise the kind of a file by its suffix or first bytes, and derive image ids from file names."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from engine.errors import counted

JPEG = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo"})
"""All suffixes of JPEG files. An .mpo file holds several images, of which the first is used."""
JPEG_2000 = frozenset({".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"})
OTHERS = frozenset(
    {".bmp", ".dib", ".gif", ".png", ".apng", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"}
)
HEIC = frozenset({".heic", ".heif", ".hif"})
DICOM = frozenset({".dcm", ".dicom", ".ima"})
HAS_HEIF = find_spec("pi_heif") is not None
"""Whether the extra `heic` is installed. Without it HEIC files are skipped and reported."""
SUFFIXES = JPEG | JPEG_2000 | OTHERS | DICOM | (HEIC if HAS_HEIF else frozenset())
"""Suffixes, in lower case, of files that count as images."""
NEVER = frozenset(
    {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".html", ".pdf", ".npy", ".npz", ".parquet", ".arrow"}
    | {".zip", ".tar", ".gz", ".db", ".ini", ".log", ".py", ".yaml", ".yml", ".journal", ".lock", ".caption"}
)
"""Suffixes of files that often lie next to images. They are not opened to look at their first bytes."""
LITTER = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "@recycle", "system volume information"})
"""Folders that file servers and archive programs create, in lower case. They hold previews and deleted files."""
HEAD_BYTES = 144
"""Number of bytes that are read to recognise a file. A DICOM file has its mark at offset 128."""
MAX_FILE_BYTES = 1 << 30
"""Larger files are refused without reading them: some decoders read the whole file before they check the image size."""

DECODED = frozenset({"JPEG", "PNG", "GIF", "BMP", "TIFF", "WebP", "AVIF", "JPEG 2000", "PPM", "DICOM"}) | (
    {"HEIC"} if HAS_HEIF else set()
)
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis"), "HEIC")
_REPRESENTATIONS = (
    b"AE AS AT CS DA DS DT FL FD IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
"""DICOM PS3.5, 6.2: value representations, the two letters after a tag."""


_PPM = re.compile(rb"P[1-6](?:\s|#[^\r\n]*[\r\n])+(?:\d+(?:\s|#[^\r\n]*[\r\n])+\d+\s|#[^\r\n]*$)")
"""Magic number, width and height, as in the netpbm manual; comments may fill all of the bytes that are read."""


def kind_of(head: bytes) -> str | None:
    """Return the kind of a file by its first HEAD_BYTES, or None if it is not a known image format."""
    if head[128:132] == b"DICM" or _begins_with_tags(head):
        return "DICOM"
    if head[4:8] == b"ftyp":
        return (
            _BRANDS.get(head[8:12])
            or next((k for b, k in _BRANDS.items() if b in head[16:HEAD_BYTES]), None)
            or ("HEIC" if head[8:12] in (b"mif1", b"msf1") else None)
        )
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] == b"BM" and len(head) > 18 and struct.unpack("<I", head[14:18])[0] in (12, 40, 52, 56, 64, 108, 124):
        return "BMP"
    if _PPM.match(head):
        return "PPM"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def _begins_with_tags(head: bytes) -> bool:
    """Return whether a file begins directly with DICOM tags: without the preamble, or without the header of PS3.10."""
    if len(head) < 16:
        return False
    group, element, length = struct.unpack("<HHI", head[:8])
    if group not in (0x0002, 0x0008) or element > 0x0100:
        return False
    if head[4:6] in _REPRESENTATIONS:
        return True
    following = head[8 + length : 10 + length] if length <= HEAD_BYTES else b""
    return group == 8 and length % 2 == 0 and following in (b"\x08\0", b"\x10\0")  # an implicit tag followed by another


def wrong_content(head: bytes) -> str | None:
    """Return why the first bytes of a file do not fit its name, or None if nothing is wrong.

    Recognises what an incomplete clone or download leaves in place of a file: an empty file, a Git LFS pointer
    (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md), an HTML page. Callers put the file's name in front.
    """
    if not head:
        return "empty file: copy or download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer instead of the file: run `git lfs pull`"
    if re.match(rb"\s*<(!doctype html|html|head)\b", head, re.IGNORECASE):
        return "an HTML page instead of the file: the download failed"
    return None


def packed_content(head: bytes, suffix: str) -> str | None:
    """Return a description of a workbook or archive with the remedy, or None if the file is neither."""
    is_workbook = suffix.lower() in (".xlsx", ".xlsm", ".ods") or b"xl/" in head
    is_zip = head.startswith((b"PK\x03\x04", b"PK\x05\x06"))
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1") or (is_zip and is_workbook):
        return "an Excel workbook: save it as `CSV UTF-8`"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive: unpack it with gunzip"
    return "a zip archive: unpack it" if is_zip else None


def open_regular(path: Path, most_bytes: int, *, follow: bool = True) -> IO[bytes]:
    """Open a regular file of at most `most_bytes`. Never opens a pipe, on which a reader would hang, or a device.

    Links are followed only with `follow`. Raises OSError, or ValueError if the file is of another type or too large.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file but a folder, a pipe or a device")
        if status.st_size > most_bytes:
            raise ValueError(f"larger than {most_bytes} bytes, refused")
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def file_kind(path: Path, *, follow: bool = True) -> str | None:
    """Return "image", or a name in DECODED, for a local file that is an image by its suffix or first bytes; else None.

    Folders, pipes and devices, and links to them, are never opened. Without `follow`, a link is an image only by its
    suffix.
    """
    mode = os.lstat(path).st_mode
    if (
        suffix := path.suffix.lower()
    ) in SUFFIXES:  # a link counts whatever its target is: reading it reports a bad one
        return kind_by_suffix(suffix) if stat.S_ISREG(mode) or stat.S_ISLNK(mode) else None
    kind = kind_of_content(path) if stat.S_ISREG(mode) or (follow and path.is_file()) else None
    return kind if kind in DECODED else None


def kind_by_suffix(suffix: str) -> str:
    """Return the kind of an image by its suffix: "DICOM" or "image"."""
    return "DICOM" if suffix in DICOM else "image"


def kind_of_content(path: Path) -> str | None:
    """Return the kind of a local file by its first bytes, or None if it is unreadable or not a known image format."""
    try:
        with open_regular(path, MAX_FILE_BYTES) as stream:
            return kind_of(stream.read(HEAD_BYTES))
    except (OSError, ValueError):
        return None


def cut_suffix(name: str) -> str:
    """Return a file name without its suffix if that is an image suffix. 1.2.840 and scan.v2 stay unchanged."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and stem and f".{suffix.lower()}" in SUFFIXES | HEIC else name


def image_id(name: str) -> str:
    """Return the id of an image that a table names: without folders (POSIX or Windows), suffix and `#n`."""
    return cut_caption_number(re.split(r"[/\\]", name)[-1])


def cut_caption_number(name: str) -> str:
    """Return a name without suffix and without the caption number of Flickr's tables: `x` for `x.jpg#0`."""
    bare = re.sub(r"#\d+$", "", name)
    return cut_suffix(bare) if cut_suffix(bare) != bare else cut_suffix(name)


def count_kinds(names: Iterable[str]) -> str:
    """Return the number of files of each suffix as text: `3 .heic, 1 .txt`; names of folders end with a slash."""
    suffixes = Counter(_shown_suffix(name) for name in names)
    return ", ".join(
        counted(count, suffix) if suffix == FOLDER else f"{count} {suffix}"
        for suffix, count in sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    )


FOLDER = "folder"


def _shown_suffix(name: str) -> str:
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if last.startswith("."):
        return "hidden"
    if name.endswith("/"):
        return FOLDER
    suffix = f".{last.rpartition('.')[2].lower()}" if "." in last else ""
    return suffix if re.fullmatch(r"\.[a-z0-9_]{1,8}", suffix) else "without a suffix"
