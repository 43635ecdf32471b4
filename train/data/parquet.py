"""Unpack parquet files with images and captions into image files, once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import DataError, OutputError, UsageError
from engine.files.lock import OutputLock
from engine.inputs.columns import CAPTION_COLUMNS, PROMPT, USUAL, Columns
from engine.inputs.kinds import HEAD_BYTES, SUFFIXES, image_id, kind_of
from train.data.examples import Example

INDEX = "index.jsonl"
"""The rows of an unpacked folder. Its first line describes the parquet files they came from. It is written last, so its
existence marks a complete folder.
"""
ROWS_AT_ONCE = 64
NUMBERED = re.compile(r"captions?_?\d+")
CONCEPT_COLUMNS = ("cui", "cuis", "concepts")
SUFFIX_OF = {"PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WebP": ".webp", "TIFF": ".tif", "DICOM": ".dcm"}
"""Suffixes of images without a file name, by image format. All others get .jpg: readers go by the content."""


def unpack(files: list[Path], into: Path, chosen: Columns = USUAL) -> list[Example]:
    """Write the images of parquet files into the folder `into`, unless this was done before; return the examples.

    The files need a column of images (a struct of bytes and path, or bytes alone) and a column of captions. The columns
    image_id, cui and prompt are optional. The example of a row without an image has a path that does not exist.
    Only a few rows are in memory at a time. The images are written to a temporary folder next to `into`, which is
    renamed at the end, so an interrupted run unpacks again. So does a run whose parquet files have changed. Ids come
    from strangers and are not used as paths: see `safe_name`.
    Raises DataError naming the file, UsageError if pyarrow is missing or another process is unpacking, and OutputError
    if `into` cannot be written or holds something else.
    """
    made_of = [_describe(file, chosen) for file in files]
    examples = _read_index(into, made_of)
    if examples is not None:
        return examples
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with OutputLock(into):
            examples = _read_index(into, made_of)  # the previous holder of the lock may have unpacked it
            if examples is not None:
                return examples
            if into.exists() and not (into / INDEX).is_file():
                raise OutputError(f"{into} exists and was not unpacked from parquet: move it, or set --unpack-into")
            partial = into.with_name(f".{into.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _write(files, chosen, into.name, made_of, partial)
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
        names = list(opened.schema_arrow.names)
    chosen.note(file, names)
    indices = (chosen.place_of_id(names), chosen.place_of_caption(names), chosen.place_of_prompt(names))
    roles = (chosen.id, chosen.caption, chosen.prompt)
    by_role = {str(role): names[i] for role, i in zip(roles, indices, strict=True) if role and i is not None}
    described = [file.name, status.st_size, status.st_mtime_ns, *([PROMPT] if PROMPT in map(str.lower, names) else [])]
    return [*described, *([by_role] if by_role else [])]


def _read_index(folder: Path, made_of: list[list[Any]]) -> list[Example] | None:
    """Return the examples of a folder that was unpacked from these files, or None if there is no such folder."""
    try:
        header, *lines = (folder / INDEX).read_text("utf-8").splitlines()
        if json.loads(header) != made_of:
            return None
        # Use only the file name: the index may come with a data set from a stranger and must not lead elsewhere.
        return [
            Example(
                str(row["id"]),
                folder / (Path(row["file"]).name if row["file"] else f"{safe_name(str(row['id']))}.missing"),
                str(row["caption"]),
                tuple(map(str, row["cui"])),
                str(row.get("prompt", "")),
            )
            for row in map(json.loads, lines)
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(files: list[Path], chosen: Columns, prefix: str, made_of: list[list[Any]], folder: Path) -> None:
    """Write the images and the index, which has a line for each caption of a row.

    A row without an id gets the file name of its image as its id, else `prefix` and the number of the row.
    """
    written: dict[str, dict[bytes, str]] = {}
    taken: set[str] = set()
    with (folder / (INDEX + ".partial")).open("w", encoding="utf-8", newline="\n") as index:
        index.write(json.dumps(made_of) + "\n")
        for number, (row, names) in enumerate(_rows(files, chosen), 1):
            image, identity = row[names.image], row.get(names.identity)
            if isinstance(image, list):
                image = image[0] if image else None
            image = {"bytes": image} if isinstance(image, bytes) else image or {}
            content, label = image.get("bytes"), str(image.get("path") or "")
            name = ("" if identity is None else str(identity)) or image_id(label) or f"{prefix}_{number:08d}"
            file = None
            if content is not None:
                digest = hashlib.sha256(content).digest()
                known = written.setdefault(name, {})
                if digest not in known:  # an id may occur twice with different images: each gets a separate file
                    suffix = Path(label).suffix.lower()
                    if suffix not in SUFFIXES:
                        suffix = SUFFIX_OF.get(kind_of(content[:HEAD_BYTES]) or "", ".jpg")
                    known[digest] = _free_name(name, len(known), suffix, taken)
                    (folder / known[digest]).write_bytes(content)
                file = known[digest]
            prompt = str(row.get(names.prompt) or "")
            cells = [row[column] for column in names.captions]
            captions = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell]) if text]
            for caption in captions or [""]:
                entry: dict[str, Any] = {"id": name, "file": file, "caption": str(caption)}
                entry |= {"cui": split_concepts(row.get(names.concepts))} | ({"prompt": prompt} if prompt else {})
                index.write(json.dumps(entry) + "\n")
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


@dataclass(frozen=True)
class _Columns:
    """Names of columns; those of ids, concepts and prompts may be ''. Numbered columns give several captions."""

    image: str
    identity: str
    captions: tuple[str, ...]
    concepts: str
    prompt: str


def _rows(files: list[Path], chosen: Columns) -> Iterator[tuple[dict[str, Any], _Columns]]:
    """Yield every row with the names of its columns."""
    for path in files:
        with _open_parquet(path) as file:
            names = _columns(path, file.schema_arrow, chosen)
            wanted = [names.image, names.identity, *names.captions, names.concepts, names.prompt]
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(filter(None, wanted))):
                for row in batch.to_pylist():
                    yield row, names


def _columns(path: Path, schema: Any, chosen: Columns) -> _Columns:
    """Return the columns to read. Raises DataError if there are no images or no captions of text."""
    from pyarrow import types

    def item(kind: Any) -> Any:
        return kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind

    lowered = {entry.name.lower(): entry.name for entry in schema}
    # Hugging Face writes images as structs; of a list of images only the first is read.
    kinds = [(entry.name, item(entry.type)) for entry in schema]
    images = [name for name, kind in kinds if types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    images = images or [e.name for e in schema if types.is_binary(e.type) or types.is_large_binary(e.type)]
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
        is_prompt, kind = entry.name == prompt, entry.type if entry.name == prompt else item(entry.type)
        is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
        if (is_prompt or entry.name in captions) and not is_text:
            needed = "prompts: text" if is_prompt else "captions: text, or lists of text"
            raise DataError(f"{path}: the column {entry.name} holds {entry.type}, not {needed}")
    return _Columns(images[0], identity, tuple(captions), concepts, prompt)


def split_concepts(value: Any) -> list[str]:
    """Return the concepts of a cell: a list, or text separated by `;` (by commas if it contains no `;`)."""
    if isinstance(value, list):
        return [str(item) for item in value if item is not None]
    text = str(value or "").strip().removeprefix("[").removesuffix("]")
    parts = text.split(";" if ";" in text else ",")
    return [concept for part in parts if (concept := part.strip(" \t\r\n'\""))]
