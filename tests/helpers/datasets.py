"""Write small data sets for tests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from train.data.dataset import Split


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), shade).save(path)
    return path


def png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 3), shade).save(stream, "PNG")
    return stream.getvalue()


def extreme_png(width: int, height: int) -> bytes:
    """Return a black PNG of any width and height."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = zlib.compress(bytes(height * (1 + width)), 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def imageless(path: Path, sop_class: str, **tags: object) -> Path:
    """Write a DICOM file of a SOP class without an image: it has no Rows unless `tags` has them."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = sop_class
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.PatientName = "Secret^Name"
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def seen(splits: dict[str, Split], root: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Return {split: [(id, image path relative to the root, caption), ...]}."""
    return {
        name: [(e.id, e.image.relative_to(root).as_posix(), e.caption) for e in split.examples]
        for name, split in splits.items()
    }


def write_parquet(path: Path, columns: dict[str, list], rows_a_group: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return path
