"""Unpack parquet files with images and captions into image files, once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import DataError, OutputError, UsageError
from engine.files.lock import OutputLock
from engine.inputs.columns import CAPTION_COLUMNS, PROMPT, USUAL, Columns
from engine.inputs.kinds import HEAD_BYTES, SUFFIXES, image_id, kind_of

INDEX = "index.jsonl"
"""The rows of an unpacked folder. Its first line describes the parquet files they came from. It is written last, so its
existence marks a complete folder.
"""
ROWS_AT_ONCE = 64
NUMBERED = re.compile(r"captions?_?\d+")
CONCEPT_COLUMNS = ("cui", "cuis", "concepts")
SUFFIX_OF = {"PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WebP": ".webp", "TIFF": ".tif", "DICOM": ".dcm"}
"""Suffixes of images without a file name, by image format. All others get .jpg: readers go by the content."""


@dataclass(frozen=True)
class Row:
    """A caption of an image, as read from a table, a parquet file or any other layout.

    `file` is the path of an image that was unpacked from parquet. It is None for a parquet row without an image, and in
    all other layouts, where the image is found by `id`. `caption`, `concepts` and `prompt` may be empty.
    """

    id: str
    file: Path | None
    caption: str
    concepts: tuple[str, ...]
    prompt: str = ""


def unpack(files: list[Path], into: Path, chosen: Columns = USUAL) -> list[Row]:
    """Write the images of parquet files into the folder `into`, unless this was done before, and return the rows.

    The files need a column of images (a struct of bytes and path, or bytes alone) and a column of captions. The columns
    image_id, cui and prompt are optional.
    Only a few rows are in memory at a time. The images are written to a temporary folder next to `into`, which is
    renamed at the end, so an interrupted run unpacks again. So does a run whose parquet files have changed. Ids come
    from strangers and are not used as paths: see `safe_name`.
    Raises DataError naming the file, UsageError if pyarrow is missing or another process is unpacking, and OutputError
    if `into` cannot be written or holds something else.
    """
    made_of = [_describe(file, chosen) for file in files]
    rows = _read_index(into, made_of)
    if rows is not None:
        return rows
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with OutputLock(into):
            rows = _read_index(into, made_of)  # the previous holder of the lock may have unpacked it
            if rows is not None:
                return rows
            if into.exists() and not (into / INDEX).is_file():
                raise OutputError(f"{into} exists and was not unpacked from parquet: move it, or set --unpack-into")
            partial = into.with_name(f".{into.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _write(_rows(files, into.name, chosen), made_of, partial)
            if into.exists():
                shutil.rmtree(into)
            partial.rename(into)
    except OSError as error:
        raise OutputError(
            f"{error.filename or into} cannot be written: {error.strerror or error}: the images of parquet files are "
            "unpacked there, set --unpack-into to another folder"
        ) from error
    return _read_index(into, made_of) or []


def safe_name(name: str) -> str:
    """Return a file name (without extension) for an id: the id if it is safe, else its safe characters and a hash."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,159}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{re.sub('[^A-Za-z0-9_-]+', '_', name)[:80] or '_'}~{digest}"


def _describe(file: Path, chosen: Columns) -> list[Any]:
    """Return what identifies an unpacked parquet file: name, size in bytes, modification time in ns, column choices.

    It also records whether the file has prompts, because folders unpacked by an earlier version lack them.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    with _open_parquet(file) as opened:
        has_prompts = any(name.lower() == PROMPT for name in opened.schema_arrow.names)
        names = list(opened.schema_arrow.names)
    chosen.note(file, names)
    indices = (chosen.place_of_id(names), chosen.place_of_caption(names), chosen.place_of_prompt(names))
    roles = (chosen.id, chosen.caption, chosen.prompt)
    by_role = {str(role): names[i] for role, i in zip(roles, indices, strict=True) if role and i is not None}
    described = [file.name, status.st_size, status.st_mtime_ns, *([PROMPT] if has_prompts else [])]
    return [*described, *([by_role] if by_role else [])]


def _read_index(folder: Path, made_of: list[list[Any]]) -> list[Row] | None:
    """Return the rows of a folder that was unpacked from these files, or None if there is no such folder."""
    try:
        header, *lines = (folder / INDEX).read_text("utf-8").splitlines()
        if json.loads(header) != made_of:
            return None
        rows = [json.loads(line) for line in lines]
        # Use only the file name: the index may come with a data set from a stranger and must not lead elsewhere.
        return [
            Row(
                str(row["id"]),
                folder / Path(row["file"]).name if row["file"] else None,
                str(row["caption"]),
                tuple(map(str, row["cui"])),
                str(row.get("prompt", "")),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(rows: Iterable[_Cells], made_of: list[list[Any]], folder: Path) -> None:
    written: dict[str, list[tuple[bytes, str]]] = {}
    taken: set[str] = set()
    with (folder / (INDEX + ".partial")).open("w", encoding="utf-8", newline="\n") as index:
        index.write(json.dumps(made_of) + "\n")
        for row in rows:
            file = None
            if row.image is not None:
                digest = hashlib.sha256(row.image).digest()
                images = written.setdefault(row.id, [])
                file = next((known for known_digest, known in images if known_digest == digest), None)
                if file is None:  # an id may occur twice with different images: each image gets a separate file
                    file = _free_name(row.id, len(images), row.suffix, taken)
                    (folder / file).write_bytes(row.image)
                    images.append((digest, file))
            entry = {"id": row.id, "file": file, "caption": row.caption, "cui": row.concepts}
            index.write(json.dumps(entry | ({"prompt": row.prompt} if row.prompt else {})) + "\n")
        index.flush()
        os.fsync(index.fileno())
    (folder / (INDEX + ".partial")).rename(folder / INDEX)


def _free_name(name: str, number: int, suffix: str, taken: set[str]) -> str:
    """Return an unused file name. Names that differ only in case count as equal, for case-insensitive file systems."""
    stem = safe_name(name) + (f"~{number + 1}" if number else "")
    if stem.lower() in taken:
        stem += "~" + hashlib.sha256(stem.encode()).hexdigest()[:16]
    taken.add(stem.lower())
    return stem + suffix


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """Open a pyarrow ParquetFile. Raises DataError naming an unreadable file, and UsageError without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error


class _Cells(NamedTuple):
    """The cells of a row: `image` is the content of an image file, or None, and `suffix` its extension."""

    id: str
    image: bytes | None
    suffix: str
    caption: str
    concepts: list[str]
    prompt: str


def _rows(files: list[Path], prefix: str, chosen: Columns) -> Iterator[_Cells]:
    """Yield the cells of every row, once for each of its captions."""
    number = 0
    for path in files:
        with _open_parquet(path) as file:
            names = _columns(path, file.schema_arrow, chosen)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names.wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield from _row(row, names, f"{prefix}_{number:08d}")


def _row(row: dict[str, Any], names: _Columns, fallback: str) -> Iterator[_Cells]:
    """Yield the cells of one row for each of its captions.

    A row without an id gets the file name of its image as its id, else `fallback`.
    """
    image, identity, concepts = row.get(names.image), row.get(names.identity), row.get(names.concepts)
    if isinstance(image, list):
        image = image[0] if image else None
    image = {"bytes": image} if isinstance(image, bytes) else image or {}
    content, label = image.get("bytes"), str(image.get("path") or "")
    name = ("" if identity is None else str(identity)) or image_id(label) or fallback
    captions: list[str | None] = []
    for column in names.captions:
        value = row.get(column)
        captions += value if isinstance(value, list) else [value]
    texts = [caption for caption in captions if caption] or [""]
    prompt = str(row.get(names.prompt) or "")
    for caption in texts:
        yield _Cells(name, content, _suffix(label, content or b""), str(caption), split_concepts(concepts), prompt)


@dataclass(frozen=True)
class _Columns:
    """Names of columns; those of ids, concepts and prompts may be ''. Numbered columns give several captions."""

    image: str
    identity: str
    captions: tuple[str, ...]
    concepts: str
    prompt: str

    @property
    def wanted(self) -> list[str]:
        return [name for name in (self.image, self.identity, *self.captions, self.concepts, self.prompt) if name]


def _require_text(path: Path, entry: Any, *, is_prompt: bool) -> None:
    """Raise DataError if a column does not hold text. A column of captions may also hold lists of text."""
    import pyarrow

    kind = entry.type
    if not is_prompt and (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
        needed = "prompts: text" if is_prompt else "captions: text, or lists of text"
        raise DataError(f"{path}: the column {entry.name} holds {entry.type}, not {needed}")


def _columns(path: Path, schema: Any, chosen: Columns) -> _Columns:
    """Return the columns to read. Raises DataError if there are no images or no captions of text."""
    lowered = {entry.name.lower(): entry.name for entry in schema}
    images = [entry.name for entry in schema if _holds_images(entry.type)]
    images = images or [entry.name for entry in schema if _is_binary(entry.type)]
    texts = [entry.name for entry in schema if entry.name not in images]
    index = chosen.place_of_caption(texts, [name for name in CAPTION_COLUMNS if name != PROMPT])
    captions = [texts[index]] if index is not None else [name for name in texts if NUMBERED.fullmatch(name.lower())]
    if not images or not captions:
        raise DataError(
            f"{path} has no {'captions' if images else 'images'}, only {', '.join(lowered.values())}: it needs a "
            "column of images (a struct of bytes and path, or bytes) and one named caption, or set --caption-column"
        )
    index = chosen.place_of_id(texts, ("image_id", "id", "__key__"))
    identity = "" if index is None else texts[index]
    concepts = next((lowered[name] for name in CONCEPT_COLUMNS if name in lowered), "")
    index = chosen.place_of_prompt(texts)
    prompt = "" if index is None else texts[index]
    for entry in schema:
        if entry.name in (*captions, prompt):
            _require_text(path, entry, is_prompt=entry.name == prompt)
    return _Columns(images[0], identity, tuple(captions), concepts, prompt)


def _holds_images(kind: Any) -> bool:
    """Return whether a column holds images as Hugging Face writes them, or lists of them (only the first is read)."""
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) else kind
    return bool(pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def split_concepts(value: Any) -> list[str]:
    """Return the concepts of a cell: a list, or text separated by `;` (by commas if it contains no `;`)."""
    if isinstance(value, list):
        return [str(item) for item in value if item is not None]
    text = str(value or "").strip().removeprefix("[").removesuffix("]")
    parts = text.split(";" if ";" in text else ",")
    return [concept for part in parts if (concept := part.strip(" \t\r\n'\""))]


def _suffix(label: str, content: bytes) -> str:
    """Return the extension in an image's file name, else the one of the format that its first bytes have."""
    suffix = Path(label).suffix.lower()
    return suffix if suffix in SUFFIXES else SUFFIX_OF.get(kind_of(content[:HEAD_BYTES]) or "", ".jpg")
