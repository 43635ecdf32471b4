"""Unpack parquet files of pictures and captions into picture files, once; knows nothing of splits and other layouts."""

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
"""Rows of an unpacked folder. Its first line names the parquet files it was made of; written last, it is the marker."""
ROWS_AT_ONCE = 64
NUMBERED = re.compile(r"captions?_?\d+")
CONCEPT_COLUMNS = ("cui", "cuis", "concepts")
SUFFIX_OF = {"PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WebP": ".webp", "TIFF": ".tif", "DICOM": ".dcm"}
"""Suffixes of unnamed pictures by what they are; .jpg for any other, since readers go by the content."""


@dataclass(frozen=True)
class ParquetRow:
    """One row: `file` is the picture's path, None where the row had none; texts are empty where they were null."""

    id: str
    file: Path | None
    caption: str
    concepts: tuple[str, ...]
    prompt: str = ""


def unpack(files: list[Path], into: Path, chosen: Columns = USUAL) -> list[ParquetRow]:
    """Write the pictures of parquet files as files into the folder `into`, unless they are there; return the rows.

    Needed are a column of images (a struct of bytes and path, or bytes alone) and captions; image_id, cui and prompt
    are read where they are.
    A few rows are in memory at a time. The work is done in a folder beside, renamed at its end: what was cut off is
    unpacked again, and so are parquet files that changed. Ids come from strangers and name no path: see `safe_name`.
    Raises DataError naming the file, UsageError when pyarrow is missing or another process unpacks, OutputError when
    `into` cannot be written or holds something else.
    """
    made_of = [_describe(file, chosen) for file in files]
    rows = _read_index(into, made_of)
    if rows is not None:
        return rows
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with OutputLock(into):
            rows = _read_index(into, made_of)  # whoever held the lock before may have done it
            if rows is not None:
                return rows
            if into.exists() and not (into / INDEX).is_file():
                raise OutputError(f"{into} exists and was not unpacked from parquet: move it, or unpack elsewhere")
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
            "unpacked there, --unpack-into takes another folder"
        ) from error
    return _read_index(into, made_of) or []


def safe_name(name: str) -> str:
    """Return a file name (without extension) for an id: itself where it is harmless, else what is left and its hash."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,159}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{re.sub('[^A-Za-z0-9_-]+', '_', name)[:80] or '_'}~{digest}"


def _describe(file: Path, chosen: Columns) -> list[Any]:
    """Return what tells whether a file is still the one that was unpacked: name, bytes, time of change in ns.

    Also whether it has prompts: folders that an earlier version unpacked lack them.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    with _opened(file) as opened:
        has_prompts = any(name.lower() == PROMPT for name in opened.schema_arrow.names)
        names = list(opened.schema_arrow.names)
    chosen.note(file, names)
    places = (chosen.place_of_id(names), chosen.place_of_caption(names), chosen.place_of_prompt(names))
    roles = (chosen.id, chosen.caption, chosen.prompt)
    by_name = {str(role): names[place] for role, place in zip(roles, places, strict=True) if role and place is not None}
    described = [file.name, status.st_size, status.st_mtime_ns, *([PROMPT] if has_prompts else [])]
    return [*described, *([by_name] if by_name else [])]


def _read_index(folder: Path, made_of: list[list[Any]]) -> list[ParquetRow] | None:
    """Return the rows of a folder that was unpacked from these files, None where there is none."""
    try:
        header, *lines = (folder / INDEX).read_text("utf-8").splitlines()
        if json.loads(header) != made_of:
            return None
        rows = [json.loads(line) for line in lines]
        # Only the last part of a path counts: the folder may come with the data set, from a stranger.
        return [
            ParquetRow(
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
            if row.picture is not None:
                digest = hashlib.sha256(row.picture).digest()
                pictures = written.setdefault(row.id, [])
                file = next((known for known_digest, known in pictures if known_digest == digest), None)
                if file is None:  # an id may come twice, with different pictures: each gets a file of its own
                    file = _free_name(row.id, len(pictures), row.suffix, taken)
                    (folder / file).write_bytes(row.picture)
                    pictures.append((digest, file))
            entry = {"id": row.id, "file": file, "caption": row.caption, "cui": row.concepts}
            index.write(json.dumps(entry | ({"prompt": row.prompt} if row.prompt else {})) + "\n")
        index.flush()
        os.fsync(index.fileno())
    (folder / (INDEX + ".partial")).rename(folder / INDEX)


def _free_name(name: str, number: int, suffix: str, taken: set[str]) -> str:
    """Return a file name nobody has, also where file systems do not tell upper from lower case."""
    stem = safe_name(name) + (f"~{number + 1}" if number else "")
    if stem.lower() in taken:
        stem += "~" + hashlib.sha256(stem.encode()).hexdigest()[:16]
    taken.add(stem.lower())
    return stem + suffix


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a parquet file as pyarrow has it. Raises DataError naming the file, UsageError without pyarrow."""
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
    """What is wanted of a row: `picture` are the bytes of an image file, None without one, `suffix` its extension."""

    id: str
    picture: bytes | None
    suffix: str
    caption: str
    concepts: list[str]
    prompt: str


def _rows(files: list[Path], prefix: str, chosen: Columns) -> Iterator[_Cells]:
    """Yield every row, one for each of its captions."""
    number = 0
    for path in files:
        with _opened(path) as file:
            names = _columns(path, file.schema_arrow, chosen)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names.wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield from _row(row, names, f"{prefix}_{number:08d}")


def _row(row: dict[str, Any], names: _Columns, fallback: str) -> Iterator[_Cells]:
    """Take one row apart, a caption at a time; without an id it is called by its picture's file name, or `fallback`."""
    picture, identity, concepts = row.get(names.picture), row.get(names.identity), row.get(names.concepts)
    if isinstance(picture, list):
        picture = picture[0] if picture else None
    picture = {"bytes": picture} if isinstance(picture, bytes) else picture or {}
    content, label = picture.get("bytes"), str(picture.get("path") or "")
    name = ("" if identity is None else str(identity)) or image_id(label) or fallback
    captions: list[str | None] = []
    for column in names.captions:
        value = row.get(column)
        captions += value if isinstance(value, list) else [value]
    kept = [caption for caption in captions if caption] or [""]
    prompt = str(row.get(names.prompt) or "")
    for caption in kept:
        yield _Cells(name, content, _suffix(label, content or b""), str(caption), split_concepts(concepts), prompt)


@dataclass(frozen=True)
class _Columns:
    """Names of columns; those of ids, concepts and prompts may be ''. There are several of captions where they are
    numbered.
    """

    picture: str
    identity: str
    captions: tuple[str, ...]
    concepts: str
    prompt: str

    @property
    def wanted(self) -> list[str]:
        return [name for name in (self.picture, self.identity, *self.captions, self.concepts, self.prompt) if name]


def _require_text(path: Path, entry: Any, *, is_prompt: bool) -> None:
    """Raise DataError for a column that does not hold text, nor lists of text where it is one of captions."""
    import pyarrow

    kind = entry.type
    if not is_prompt and (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
        needed = "prompts: text" if is_prompt else "captions: text, or lists of text"
        raise DataError(f"{path}: the column {entry.name} holds {entry.type}, not {needed}")


def _columns(path: Path, schema: Any, chosen: Columns) -> _Columns:
    """Return the columns that are read. Raises DataError where there are no images or no captions of text."""
    lowered = {entry.name.lower(): entry.name for entry in schema}
    pictures = [entry.name for entry in schema if _holds_images(entry.type)]
    pictures = pictures or [entry.name for entry in schema if _is_binary(entry.type)]
    texts = [entry.name for entry in schema if entry.name not in pictures]
    place = chosen.place_of_caption(texts, [name for name in CAPTION_COLUMNS if name != PROMPT])
    captions = [texts[place]] if place is not None else [name for name in texts if NUMBERED.fullmatch(name.lower())]
    if not pictures or not captions:
        raise DataError(
            f"{path} has no {'captions' if pictures else 'pictures'}, only {', '.join(lowered.values())}: it needs a "
            "column of images (a struct of bytes and path, or bytes) and one named caption, or give --caption-column"
        )
    place = chosen.place_of_id(texts, ("image_id", "id", "__key__"))
    identity = "" if place is None else texts[place]
    concepts = next((lowered[name] for name in CONCEPT_COLUMNS if name in lowered), "")
    place = chosen.place_of_prompt(texts)
    prompt = "" if place is None else texts[place]
    for entry in schema:
        if entry.name in (*captions, prompt):
            _require_text(path, entry, is_prompt=entry.name == prompt)
    return _Columns(pictures[0], identity, tuple(captions), concepts, prompt)


def _holds_images(kind: Any) -> bool:
    """Return whether a column holds images as Hugging Face writes them, or lists of them, of which the first counts."""
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) else kind
    return bool(pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def split_concepts(value: Any) -> list[str]:
    """Return the concepts of a cell: a list, or text separated by `;` (or commas, where there is no `;`)."""
    if isinstance(value, list):
        return [str(one) for one in value if one is not None]
    text = str(value or "").strip().removeprefix("[").removesuffix("]")
    return [one for part in text.split(";" if ";" in text else ",") if (one := part.strip(" \t\r\n'\""))]


def _suffix(label: str, content: bytes) -> str:
    """Return the extension of a picture's own name, else that of its first bytes."""
    suffix = Path(label).suffix.lower()
    return suffix if suffix in SUFFIXES else SUFFIX_OF.get(kind_of(content[:HEAD_BYTES]) or "", ".jpg")
