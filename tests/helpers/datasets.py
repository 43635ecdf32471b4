"""Small data sets made by tests."""

from __future__ import annotations

import io
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


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def seen(splits: dict[str, Split], root: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Return (id, picture below the root, caption) of every example."""
    return {
        name: [(e.id, e.image.relative_to(root).as_posix(), e.caption) for e in split.examples]
        for name, split in splits.items()
    }


def write_parquet(path: Path, columns: dict[str, list], rows_a_group: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return path
